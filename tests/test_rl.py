"""RL: what is learned from, what is left out, and that the reward goes up."""

import functools
import json
import signal

import jax
import numpy as np
import pytest
from toy import Likes

from posttrain.data.characters import Characters
from posttrain.data.conversations import Demonstrations
from posttrain.data.pack import Example, Group, pack_groups
from posttrain.data.verify.pool import VerifierPool
from posttrain.model import config as configs
from posttrain.model import transformer
from posttrain.model.processing import Sampling
from posttrain.model.sample import Noise
from posttrain.sharding import mesh as meshes
from posttrain.train import checkpoint, metrics, rl, rollout, score, step, stop
from posttrain.train.compute import Compute
from posttrain.train.objective import Objective, UnbiasedKL, deepseek_v32, olmo
from posttrain.train.optimizer import AdamW
from posttrain.train.rl import RL
from posttrain.train.rollout import Rollout
from posttrain.train.sft import SFT
from posttrain.train.surrogate import Clip

CONFIG = configs.ModelConfig(
    vocab_size=64, embed_dim=32, num_layers=1, num_heads=4, num_kv_heads=4, head_dim=8, mlp_dim=64, context=32,
    tie_embeddings=True, init_std=0.2,
)  # fmt: skip
SAMPLING = Sampling(max_tokens=6)
COMPUTE = Compute(row_tokens=64, micro_rows=8, slots=64, save_every=100)


def one_device():
    return meshes.make_mesh(devices=jax.devices()[:1])


@pytest.fixture(scope="module")
def params():
    return jax.jit(lambda key: transformer.init(CONFIG, key))(jax.random.key(0))


@pytest.fixture(scope="module")
def batch(params):
    """Two answers to each of two prompts, with the sampler's log-probs those of the parameters."""
    rng = np.random.default_rng(0)
    fields = {"advantage": 0.0, "behavior_logp": 0.0, "old_logp": 0.0, "reference_logp": 0.0}
    answers = [
        Example(tokens=rng.integers(0, 64, n), mask=np.ones(n), fields={**fields, "advantage": a})
        for n, a in ((5, 0.5), (3, -0.5), (4, 0.25), (6, -0.25))
    ]
    groups = [Group(prompt=rng.integers(0, 64, 3), answers=pair) for pair in (answers[:2], answers[2:])]
    packed = dict(pack_groups(groups, length=16, fields=tuple(fields)).batch)
    logp = np.asarray(score.token_logp(CONFIG, params, packed))
    return jax.device_put({**packed, "behavior_logp": logp, "old_logp": logp, "reference_logp": logp})


@functools.cache
def compiled(objective, temperature):
    loss = rl.loss(CONFIG, objective, temperature=temperature)

    def run(params, batch):
        return step.make_accumulate(loss)(step.zero_sums(loss, params, batch), params, batch)

    return jax.jit(run)


def gradient(params, batch, objective=None, temperature=1.0):
    return compiled(objective, temperature)(params, batch)


def flat(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def judged(*rewards):
    """A group of one-token answers with these rewards."""
    task = Likes(domain="north")[0]
    answer = {"tokens": np.asarray([5]), "logp": np.asarray([-1.0], np.float32), "reason": "", "finish": "stop"}
    return [Rollout(task=task, prompt=[1, 2], reward=reward, version=0, **answer) for reward in rewards]


def stage(**settings) -> RL:
    given = {"start": "tiny", "tasks": Likes(domain="north"), "steps": 1, "sampling": SAMPLING, "compute": COMPUTE}
    return RL(**{**given, **settings})


def test_equal_rewards_give_no_gradient_at_all(params):
    (micro,) = rollout.micro_batches(
        [judged(0.7, 0.7, 0.7), judged(0.0, 0.0, 0.0)], stage(prompts=2).compute, one_device()
    )
    assert np.sum(micro["mask"]) == 6
    sums = gradient(params, micro)
    assert np.all(flat(sums.grads) == 0) and sums.loss == 0


def test_unequal_rewards_raise_the_better_answer_and_lower_the_worse(params, batch):
    sums = gradient(params, batch)
    after = jax.tree.map(lambda p, g: p - 0.01 * g, params, sums.grads)
    moved = (np.asarray(score.token_logp(CONFIG, after, batch)) - batch["old_logp"]) * batch["advantage"]
    assert np.sum(moved) > 0.01


def test_at_the_first_update_the_ratio_is_one_and_nothing_is_clipped(params, batch):
    tight = Objective(surrogate=Clip(low=1e-4, high=1e-4))
    given = {name: value for name, value in batch.items() if name != "old_logp"}
    sums = gradient(params, given, tight)
    assert sums.metrics["clipped"].total == 0
    np.testing.assert_allclose(sums.metrics["mismatch"].total, 0, atol=1e-4)
    off = {**batch, "old_logp": batch["old_logp"] - 0.1 * np.sign(batch["advantage"])}
    assert gradient(params, off, tight).metrics["clipped"] == (18, 18)


def test_the_temperature_of_sampling_is_that_of_training(params, batch):
    cold = np.asarray(score.token_logp(CONFIG, params, batch, temperature=0.5))
    given = {**batch, "behavior_logp": cold}
    del given["old_logp"]
    np.testing.assert_allclose(gradient(params, given, temperature=0.5).metrics["mismatch"].total, 0, atol=1e-4)
    assert gradient(params, given).metrics["mismatch"].total > 1


def test_the_kl_term_pulls_towards_the_reference(params, batch):
    reference = jax.jit(lambda key: transformer.init(CONFIG, key))(jax.random.key(1))
    given = {**batch, "advantage": np.zeros_like(batch["advantage"])}
    given["reference_logp"] = np.asarray(score.token_logp(CONFIG, reference, batch))
    sums = gradient(params, given, Objective(kl=UnbiasedKL(weight=1.0)))
    after = jax.tree.map(lambda p, g: p - 0.003 * g, params, sums.grads)
    moved = np.asarray(score.token_logp(CONFIG, after, batch)) - batch["old_logp"]
    wanted = (given["reference_logp"] - batch["old_logp"]) * batch["mask"]
    assert np.sum(moved * wanted) > 0
    at_reference = gradient(
        params, {**given, "reference_logp": batch["old_logp"]}, Objective(kl=UnbiasedKL(weight=1.0))
    )
    assert np.max(np.abs(flat(at_reference.grads))) < 1e-3 * np.max(np.abs(flat(sums.grads)))


def test_groups_without_variance_are_replaced_until_the_number_is_right(tmp_path):
    asked = []

    class Scripted(rollout.Sampler):
        """Answers whose rewards are written down."""

        def rollouts(self, model, tasks, *, num_samples, noise, version=0):
            asked.append((len(tasks), noise.step, [task.id for task in tasks]))
            script = {1: [(1, 1), (0, 1), (0, 0)], 2: [(0, 0), (1, 0)], 3: [(1, 0.5)]}
            return [judged(*map(float, rewards)) for rewards in script[len(asked)]]

    log = metrics.Log(tmp_path, title="", total=1)
    sampler = Scripted(sampling=SAMPLING, slots=2, mesh=one_device(), pool=VerifierPool(1), log=log)
    model = checkpoint.open_model("tiny", one_device())
    kept, taken, numbers = stage(prompts=3)._collect(sampler, model, {"iteration": 4, "next_task": 10})
    assert [[r.reward for r in group] for group in kept] == [[0, 1], [1, 0], [1, 0.5]]
    assert [(count, noise) for count, noise, _ in asked] == [(3, 12), (2, 13), (1, 14)]
    assert taken == 16 and len({task for *_, tasks in asked for task in tasks}) == 6
    assert numbers["groups"] == 3 and numbers["no_variance"] == 0.5
    np.testing.assert_allclose(numbers["reward"], np.mean([1, 1, 0, 1, 0, 0, 0, 0, 1, 0, 1, 0.5]))


@pytest.fixture(scope="module")
def traced(tmp_path_factory):
    """A run of two steps with two updates each, and all that was asked of the policy and the reference."""
    folder = tmp_path_factory.mktemp("traced")
    scored, added = [], []
    patch = pytest.MonkeyPatch()
    token_logp, add = score.token_logp, rl.Updater.add
    patch.setattr(rl.score, "token_logp", lambda c, p, b, **k: scored.append(flat(p)) or token_logp(c, p, b, **k))
    patch.setattr(
        rl.Updater, "add", lambda self, s, now, b: added.append((flat(now.params), b)) or add(self, s, now, b)
    )
    settings = {"prompts": 4, "group": 2, "optimizer": AdamW(learning_rate=1e-2), "steps": 2}
    stage(**settings, updates=2).train(folder / "updates", one_device())
    yield scored, added, folder
    patch.undo()


def test_old_log_probs_are_the_policy_of_before_the_first_update(traced):
    scored, added, folder = traced
    assert len(added) == 4 and len(scored) == 4
    first, second = added[0], added[1]
    assert np.any(first[0] != second[0])
    for policy in scored[:2]:
        np.testing.assert_array_equal(policy, first[0])
    for _, given in (first, second):
        assert set(given) >= {"old_logp", "behavior_logp", "advantage"} and "reference_logp" not in given
        at = np.asarray(given["mask"]) > 0
        np.testing.assert_allclose(np.asarray(given["old_logp"])[at], np.asarray(given["behavior_logp"])[at], atol=1e-4)
    assert [line["mismatch"] < 1e-4 for line in metrics.read(folder / "updates" / "metrics.jsonl")] == [True, True]


def test_the_reference_runs_only_for_a_kl_term(traced):
    scored, added, folder = traced
    assert len(scored) == 4  # two micro-batches a step, for their old log-probs
    (start,) = {policy.tobytes() for policy in scored[:2]}
    stage(prompts=2, group=2, objective=Objective(kl=UnbiasedKL(weight=0.1))).train(folder / "with", one_device())
    assert [policy.tobytes() == start for policy in scored[4:]] == [True]
    assert "reference_logp" in added[-1][1] and "old_logp" not in added[-1][1]


def test_a_signal_ends_the_rollouts_at_the_next_answer(tmp_path):
    model = checkpoint.open_model("tiny", one_device())
    with VerifierPool(1) as pool, metrics.Log(tmp_path, title="", total=1) as log:
        sampler = rollout.Sampler(sampling=SAMPLING, slots=2, mesh=one_device(), pool=pool, log=log)
        stop.request_stop(signal.SIGTERM, None)
        try:
            with pytest.raises(stop.Interrupted):
                sampler.rollouts(model, [Likes(domain="north")[0]] * 4, num_samples=2, noise=Noise())
        finally:
            stop._asked.clear()
        assert pool.counts["judged"] == 0


@pytest.mark.parametrize("cut", [{"top_k": 5}, {"top_p": 0.9}, {"min_p": 0.1}], ids=str)
def test_truncated_sampling_is_refused_unless_its_mask_is_kept(cut):
    with pytest.raises(ValueError, match="RL needs answers from the whole distribution"):
        stage(sampling=Sampling(max_tokens=4, **cut))
    assert stage(sampling=Sampling(max_tokens=4, **cut), objective=deepseek_v32())


def test_under_a_kept_sampling_mask_the_trainer_reports_what_a_truncated_sampler_did(tmp_path):
    """The reference, replaced every step, is then the policy itself at each first update: no KL and no mismatch."""
    cut = Sampling(max_tokens=6, top_k=7, top_p=0.9, temperature=0.8)
    settings = {"sampling": cut, "prompts": 2, "group": 4, "steps": 2, "optimizer": AdamW(learning_rate=1e-2)}
    stage(objective=deepseek_v32(kl_weight=0.1), reference_every=1, **settings).train(tmp_path / "kept", one_device())
    for line in metrics.read(tmp_path / "kept" / "metrics.jsonl"):
        assert line["mismatch_max"] < 1e-4 and line["kl"] < 1e-9 and line["grad_norm"] > 0
        assert line["entropy_estimate"] < np.log(7) + 0.5  # an estimate; 5.6 over all tokens
    with pytest.raises(ValueError, match="reference_every is 3 and the objective has no KL term"):
        stage(reference_every=3)


def test_greedy_sampling_is_refused():
    with pytest.raises(ValueError, match="greedy sample has no policy gradient"):
        stage(sampling=Sampling(max_tokens=4, temperature=0.0), objective=deepseek_v32())


def test_settings_that_cannot_work_are_refused():
    with pytest.raises(ValueError, match="group is 1"):
        stage(group=1)
    with pytest.raises(ValueError, match="prompts 8 must divide into 3 updates"):
        stage(updates=3)


def test_the_reward_on_characters_goes_up(tmp_path):
    tasks, mesh = Characters(operation="copy", length=2, letters=4), one_device()
    adam = AdamW(learning_rate=3e-3, warmup_steps=5)
    learned = SFT(
        start="tiny", data=Demonstrations(tasks=tasks), steps=35, batch_size=16, optimizer=adam, compute=COMPUTE
    )
    learned.train(tmp_path / "start", mesh)
    settings = {
        "steps": 25,
        "prompts": 16,
        "group": 8,
        "objective": olmo(rounds=1),
        "optimizer": AdamW(learning_rate=1e-3),
    }
    stage(start=str(tmp_path / "start"), tasks=tasks, **settings).train(tmp_path / "rl", mesh)
    rewards = [line["reward"] for line in metrics.read(tmp_path / "rl" / "metrics.jsonl")]
    assert np.mean(rewards[-5:]) > np.mean(rewards[:5]) + 0.3  # seen: 0.19 at first, 0.85 at last
    rows = [json.loads(line) for line in (tmp_path / "rl" / "rollouts" / "000024.jsonl").read_text().splitlines()]
    assert {row["domain"] for row in rows} == {"copy"} and {row["version"] for row in rows} == {24}
