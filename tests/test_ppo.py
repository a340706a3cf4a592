"""PPO: what its losses and estimates are, that a run goes on bit for bit, and that the reward goes up."""

# pyright: reportArgumentType=false

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from resumable import logged
from toy import Likes

from posttrain.data.conversations import Demonstrations
from posttrain.data.pack import Example, Group, pack_groups
from posttrain.model import config as configs
from posttrain.model import transformer
from posttrain.model.processing import Sampling
from posttrain.sharding import mesh as meshes
from posttrain.train import checkpoint, ppo, reward, rollout, score, stop
from posttrain.train.compute import Compute
from posttrain.train.optimizer import AdamW
from posttrain.train.ppo import PPO, Objective, Ptx
from posttrain.train.rewards import RewardModels
from posttrain.train.rl import RL
from posttrain.train.validation import Validation

CONFIG = configs.ModelConfig(
    vocab_size=64, embed_dim=32, num_layers=1, num_heads=4, num_kv_heads=4, head_dim=8, mlp_dim=64, context=32,
    tie_embeddings=True, init_std=0.2,
)  # fmt: skip
COMPUTE = Compute(row_tokens=64, micro_rows=4, slots=16, save_every=1)
TASKS = Likes(domain="north")


def one_device():
    return meshes.make_mesh(devices=jax.devices()[:1])


def packed(**fields):
    """Two answers to one prompt and one to another, in a row of 16."""
    rng = np.random.default_rng(0)
    answers = [
        Example(tokens=rng.integers(0, 64, n), mask=np.ones(n), fields={"reward": r})
        for n, r in ((4, 1.0), (3, -1.0), (2, 0.5))
    ]
    groups = [Group(prompt=[1, 2, 3], answers=answers[:2]), Group(prompt=[4, 5], answers=answers[2:])]
    batch = dict(pack_groups(groups, length=16, fields=("reward",)).batch)
    return {**batch, **{name: np.full(batch["mask"].shape, x, np.float32) for name, x in fields.items()}}


def test_an_answers_tokens_earn_its_reward_at_the_end_and_pay_for_leaving_the_reference():
    batch = jax.device_put(packed(old_logp=-1.0, reference_logp=-1.5, old_values=0.25))
    settings = Objective(kl_weight=0.1, decay=1.0, whiten=False)
    found, metrics = ppo.estimate(batch, settings)
    returns, mask = np.asarray(found["returns"]), batch["mask"] > 0
    for length, earned in ((4, 1.0), (3, -1.0), (2, 0.5)):
        own = returns[mask & np.isclose(batch["reward"], earned)]
        np.testing.assert_allclose(own, [earned - 0.05 * n for n in range(length, 0, -1)], rtol=1e-5)
    np.testing.assert_allclose(np.asarray(found["advantage"])[mask], returns[mask] - 0.25, rtol=1e-5)
    np.testing.assert_allclose(metrics["kl"], 0.5 * 9 / 3, rtol=1e-5)  # nine tokens, three answers


def test_pretraining_adds_its_mean_nll_times_the_coefficient_however_it_is_split():
    params = jax.jit(lambda key: transformer.init(CONFIG, key))(jax.random.key(0))
    batch = packed(advantage=1.0, old_logp=-3.0, behavior_logp=-3.0, ptx=0.0)
    mixed = {**batch, "mask": np.zeros_like(batch["mask"]), "ptx": batch["mask"]}
    logp = np.asarray(score.token_logp(CONFIG, params, batch))
    loss = jax.jit(ppo.policy_loss(CONFIG, ptx=5.0))
    constants = jnp.float32(9.0), jnp.float32(18.0)  # twice the pretraining rows, in two micro-batches
    parts = [loss(params, one, *constants) for one in (batch, mixed, mixed)]
    plain = jax.jit(ppo.policy_loss(CONFIG, Objective(clip=1e-4)))
    alone = plain(params, {**batch, "old_logp": logp})
    total, weight = sum(part[0] for part in parts), sum(part[1] for part in parts)
    nll = -np.sum(logp * batch["mask"]) / 9
    assert weight == alone[1] == 9
    ratio = np.minimum(np.exp(logp + 3.0), 1.2)
    np.testing.assert_allclose(total / weight, -np.sum(ratio * batch["mask"]) / 9 + 5.0 * nll, rtol=1e-5)
    np.testing.assert_allclose(sum(part[2]["ptx_nll"] for part in parts) / weight, nll, rtol=1e-5)
    # At the first update nothing is clipped, however tight the clip; after a move, all is.
    assert alone[2]["clipped"] == 0
    assert plain(params, {**batch, "old_logp": logp - 0.1})[2]["clipped"] == 9


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    """A reward model that nobody trained."""
    folder = tmp_path_factory.mktemp("judge")
    checkpoint.save_model(folder / "model", reward.open_scoring("tiny", one_device()))
    return str(folder)


def stage(**settings) -> PPO:
    given = {
        "start": "tiny", "tasks": TASKS, "steps": 3, "sampling": Sampling(max_tokens=4), "prompts": 8, "group": 2,
        "minibatches": 2, "epochs": 2, "optimizer": AdamW(learning_rate=3e-4),
        "critic_optimizer": AdamW(learning_rate=1e-3), "compute": COMPUTE,
    }  # fmt: skip
    return PPO(**{**given, **settings})


def test_a_run_that_is_stopped_goes_on_bit_for_bit_with_critic_reward_model_and_pretraining(
    judge, tmp_path, monkeypatch
):
    ptx = Ptx(data=Demonstrations(tasks=TASKS), coefficient=0.5, batch_size=4)
    asked = Validation(tasks=TASKS, sampling=Sampling(max_tokens=4), every=3, limit=4)
    run = stage(rewards=RewardModels(models=(judge,)), ptx=ptx, validation=asked)
    run.train(tmp_path / "whole", one_device())

    def stopped(folder, step, *rest):
        if step == 2:
            raise stop.Interrupted
        write(folder, step, *rest)

    write = rollout.write
    with monkeypatch.context() as patch:
        patch.setattr(rollout, "write", stopped)
        with pytest.raises(stop.Interrupted):
            run.train(tmp_path / "ended", one_device())
    run.train(tmp_path / "ended", one_device())
    assert logged(tmp_path / "ended") == logged(tmp_path / "whole")
    for part in ("model", "critic", "best"):
        whole, ended = (dict(checkpoint.leaves(tmp_path / name / part, one_device())) for name in ("whole", "ended"))
        assert all(np.array_equal(whole[name], ended[name]) for name in whole)
    scored = [json.loads((tmp_path / name / "validation.json").read_text()) for name in ("whole", "ended")]
    assert scored[0] == scored[1] and [one["step"] for one in scored[0]] == [0, 3]
    lines = logged(tmp_path / "whole")
    assert lines[0]["kl"] == 0 and abs(lines[0]["mismatch"]) < 1e-4 and lines[0]["reward"] != lines[0]["verdict"]
    assert checkpoint.open_config(tmp_path / "whole" / "critic").output == "score"


def test_ppo_raises_the_reward(tmp_path):
    objective = Objective(decay=1.0, kl_weight=0.0)
    settings = {"optimizer": AdamW(learning_rate=1e-3), "steps": 40, "objective": objective}
    quick = dataclasses.replace(COMPUTE, save_every=100)
    stage(**settings, compute=quick).train(tmp_path / "ppo", one_device())
    lines = logged(tmp_path / "ppo")
    early, late = (np.mean([line["reward"] for line in part]) for part in (lines[:5], lines[-5:]))
    assert late > early + 0.2


def test_an_answer_that_was_cut_off_earns_what_the_objective_says():
    run = stage(objective=Objective(unfinished=-10.0))
    answer = rollout.Rollout(
        task=TASKS[0],
        prompt=[1],
        tokens=np.array([5]),
        logp=np.zeros(1),
        reward=0.5,
        reason="",
        finish="length",
        version=0,
    )
    assert run.earned(answer) == -10 and run.earned(dataclasses.replace(answer, finish="stop")) == 0.5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"minibatches": 3}, "8 prompts must divide into 3 minibatches"),
        ({"sampling": Sampling(max_tokens=4, top_p=0.9)}, "biased"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        stage(**settings)


def test_rl_can_be_rewarded_by_a_reward_model_and_reports_the_verdicts(judge, tmp_path):
    run = RL(
        start="tiny", tasks=TASKS, steps=1, sampling=Sampling(max_tokens=4), prompts=8, group=2,
        rewards=RewardModels(models=(judge,)), compute=COMPUTE,
    )  # fmt: skip
    run.train(tmp_path / "rl", one_device())
    (line,) = logged(tmp_path / "rl")
    assert line["groups"] == 8 and line["no_variance"] == 0  # a score in float32 is hardly ever the same twice
    assert 0 <= line["verdict"] <= 1 and line["verdict"] != line["reward"]
