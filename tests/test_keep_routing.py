"""Keep routing: the experts that the sampler chose are recorded, packed, and taken by the trainer."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy import Likes

from posttrain.data import tokenizer
from posttrain.data.pack import Example, Group, pack_groups
from posttrain.data.verify.pool import VerifierPool
from posttrain.model import config as configs
from posttrain.model import transformer
from posttrain.model.processing import Sampling
from posttrain.model.sample import Noise
from posttrain.sharding import mesh as meshes
from posttrain.train import checkpoint, metrics, rollout, score, stop
from posttrain.train.compute import Compute
from posttrain.train.objective import deepseek_v32
from posttrain.train.optimizer import AdamW
from posttrain.train.rl import RL
from posttrain.train.rollout import Rollout

TOKENIZER = tokenizer.tiny()
CONFIG = configs.ModelConfig(
    vocab_size=TOKENIZER.vocab_size, embed_dim=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=16,
    num_experts=8, experts_per_token=3, norm_topk_prob=True, qk_norm=True, context=64, tie_embeddings=True,
)  # fmt: skip
COMPUTE = Compute(row_tokens=64, micro_rows=4, slots=8, save_every=1)
SAMPLING = Sampling(max_tokens=8)
TASKS = Likes(domain="north")


def one_device():
    return meshes.make_mesh(devices=jax.devices()[:1])


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(0)
    shapes = transformer.abstract_params(CONFIG)
    values = jax.tree.map(lambda leaf: rng.normal(0.0, 0.3, leaf.shape).astype(np.float32), shapes)
    return jax.device_put(values, transformer.shardings(CONFIG, one_device()))


@pytest.fixture(scope="module")
def answered(params, tmp_path_factory):
    """What `params` say to two prompts, and what the same weights with routers that are off say."""
    mlp, folder = params["layers"]["mlp"], tmp_path_factory.mktemp("log")
    noise = np.random.default_rng(1).normal(0.0, 0.1, mlp["router"].shape).astype(np.float32)
    router = jax.device_put(mlp["router"] + noise, mlp["router"].sharding)
    off = {**params, "layers": {**params["layers"], "mlp": {**mlp, "router": router}}}
    where = {"mesh": one_device(), "slots": COMPUTE.slots}
    with VerifierPool(1) as pool, metrics.Log(folder, title="", total=1) as log, jax.set_mesh(where["mesh"]):
        sampler = rollout.Sampler(sampling=SAMPLING, pool=pool, log=log, return_experts=True, **where)
        models = (checkpoint.Model(CONFIG, weights, TOKENIZER) for weights in (params, off))
        return [sampler.rollouts(one, [TASKS[9], TASKS[10]], num_samples=4, noise=Noise(seed=1)) for one in models]


def batch_of(groups: list[list[Rollout]]) -> dict[str, jax.Array]:
    (micro,) = rollout.micro_batches(groups, COMPUTE, one_device())
    return micro


def sampled(batch, values) -> np.ndarray:
    return np.asarray(values)[np.asarray(batch["mask"]) > 0]


def gaps(params, batch) -> list[np.ndarray]:
    """|log trainer - log sampler| of each sampled token, with replay and without."""
    free = {name: x for name, x in batch.items() if name != "experts"}
    scored = (score.token_logp(CONFIG, params, given) for given in (batch, free))
    return [sampled(batch, np.abs(logp - batch["behavior_logp"])) for logp in scored]


def test_every_token_that_is_fed_is_recorded_and_its_replay_changes_nothing_at_equal_weights(params, answered):
    groups, _ = answered
    for one in (one for group in groups for one in group):
        assert one.experts.shape == (len(one.prompt) + len(one.tokens) - 1, 2, 3) and one.experts.dtype == np.uint8
    batch = batch_of(groups)
    assert batch["experts"].shape == (*batch["tokens"].shape, 2, 3) and batch["experts"].dtype == jnp.uint8
    replayed, routed = gaps(params, batch)
    np.testing.assert_array_equal(replayed, routed)
    assert replayed.max() < 1e-5


def test_replay_brings_the_trainer_nearer_to_a_sampler_whose_routers_are_off(params, answered):
    replayed, routed = gaps(params, batch_of(answered[1]))
    assert 1e-4 < replayed.mean() < 0.5 * routed.mean()


def test_what_is_recorded_of_padding_is_no_matter_and_of_prompts_is(params, answered):
    batch = batch_of(answered[0])
    other = np.random.default_rng(0).integers(0, 8, batch["experts"].shape).astype(np.uint8)
    padding, prompt = batch["segments"] == 0, (batch["segments"] > 0) & (batch["mask"] == 0)
    expected, aside, before = (
        sampled(batch, score.token_logp(CONFIG, params, {**batch, "experts": jnp.where(at, other, batch["experts"])}))
        for at in (jnp.zeros((1, 1, 1, 1), bool), padding[..., None, None], prompt[..., None, None])
    )
    np.testing.assert_array_equal(aside, expected)
    assert np.abs(before - expected).max() > 1e-2
    answer = Example(tokens=[1, 2], mask=[1, 1], fields={"experts": np.zeros((2, 2, 3), np.uint16)})
    short = Group(prompt=[1, 2, 3], answers=[answer], fields={"experts": np.ones((1, 2, 3), np.uint16)})
    with pytest.raises(ValueError, match="2 tokens have 1 values of 'experts'"):
        pack_groups([short], length=8, fields=("experts",))


def test_a_run_that_keeps_its_routing_reports_what_the_sampler_did_and_goes_on_bit_for_bit(
    params, tmp_path, monkeypatch
):
    checkpoint.save_model(tmp_path / "start", checkpoint.Model(CONFIG, params, TOKENIZER))
    run = RL(
        start=str(tmp_path / "start"), tasks=TASKS, steps=2, sampling=SAMPLING, prompts=2, group=4, compute=COMPUTE,
        objective=deepseek_v32(keep_routing=True, keep_sampling_mask=False), optimizer=AdamW(learning_rate=1e-2),
    )  # fmt: skip
    run.train(tmp_path / "whole", one_device())
    write = rollout.write

    def stopped(folder, step, *rest):
        if step == 1:
            raise stop.Interrupted
        write(folder, step, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(rollout, "write", stopped)
        with pytest.raises(stop.Interrupted):
            run.train(tmp_path / "ended", one_device())
    run.train(tmp_path / "ended", one_device())
    whole, ended = (dict(checkpoint.leaves(tmp_path / name / "model", one_device())) for name in ("whole", "ended"))
    assert all(np.array_equal(whole[name], ended[name]) for name in whole)
    lines = metrics.read(tmp_path / "whole" / "metrics.jsonl")
    assert all(line["mismatch_max"] < 1e-5 and line["grad_norm"] > 0 for line in lines)
    assert lines[1]["kl"] > 0
    with pytest.raises(ValueError, match="the objective has keep_routing and tiny is a dense model"):
        replace(run, start="tiny").train(tmp_path / "dense", one_device())
