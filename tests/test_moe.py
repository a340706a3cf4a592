"""Mixtures of experts: transformers' Qwen3, who sees whom, devices, and the experts that are recorded and replayed."""

import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from safetensors.numpy import load_file

from posttrain import model
from posttrain.model import attention, cache, hf, hf_config, transformer
from posttrain.model.config import QWEN_3_30B_A3B
from posttrain.sharding import mesh as meshes

GOLDEN = Path(__file__).parent / "golden"
CONFIG = model.ModelConfig(
    vocab_size=64, embed_dim=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=16, num_experts=8,
    experts_per_token=2, norm_topk_prob=True, qk_norm=True,
)  # fmt: skip
PLAIN = attention.BRANCHES
jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def random_params(config: model.ModelConfig, seed: int = 0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: rng.normal(0.0, 0.3, leaf.shape).astype(np.float32), transformer.abstract_params(config)
    )


@partial(jit, static_argnums=0)
def recorded(config, params, tokens, segments, positions):
    """Logits [B, T, V] and the experts [B, T, L, k] that a mixture chose, from a forward pass into a cache."""
    state = cache.empty(config, *tokens.shape)
    hidden, state = model.apply(config, params, tokens, positions=positions, segments=segments, cache=state)
    return model.logits(config, params, hidden), state.experts if state.experts is None else jnp.moveaxis(
        state.experts, 0, 2
    )


def plain(tokens):
    return np.full_like(tokens, PLAIN), np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)


@pytest.mark.parametrize("case", ["mixture", "unnormalised", "dense"])
def test_logits_and_choices_equal_those_of_transformers(case):
    config, params = model.load(GOLDEN / "qwen3" / case)
    with np.load(GOLDEN / "qwen3.npz") as golden:
        tokens, expected = golden[f"{case}/tokens"], golden[f"{case}/logits"]
        experts = golden[f"{case}/experts"] if config.num_experts else None
    logits, chosen = recorded(config, params, tokens, *plain(tokens))
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-4)
    if experts is None:
        assert chosen is None
        return
    np.testing.assert_array_equal(np.sort(np.moveaxis(chosen, 2, 0)), experts)
    for changes in ({"norm_topk_prob": not config.norm_topk_prob}, {"experts_per_token": 2}, {"rope_theta": 1e4}):
        wrong, _ = recorded(config.replace(**changes), params, tokens, *plain(tokens))
        assert np.abs(wrong - expected).max() > 1e-2, f"the golden logits do not notice {changes}"


@pytest.mark.parametrize("case", ["mixture", "dense"])
def test_a_saved_model_is_what_transformers_would_have_saved(tmp_path, case):
    config, params = model.load(GOLDEN / "qwen3" / case)
    model.save_hf(tmp_path / "out", config, params, dtype="bfloat16")
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", GOLDEN / "qwen3" / case))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        np.testing.assert_array_equal(ours[name], tensor)
    read = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    assert hf_config.from_fields({**read.to_dict(), "architectures": None}, {}, tmp_path) == config
    assert model.load(tmp_path / "out")[0] == config


def test_a_mixture_that_is_not_computed_here_is_refused_by_name(tmp_path):
    fields = json.loads((GOLDEN / "qwen3" / "mixture" / "config.json").read_text())
    for changes, message in (
        ({"mlp_only_layers": [0]}, "mlp_only_layers"),
        ({"decoder_sparse_step": 2}, "decoder_sparse_step is 2"),
        ({"use_sliding_window": True, "sliding_window": 8}, "use_sliding_window"),
        ({"num_experts_per_tok": 9}, "experts_per_token is 9: choose from 1 to all 6"),
    ):
        with pytest.raises(ValueError, match=message):
            hf_config.from_fields({**fields, **changes}, {}, tmp_path)
    with pytest.raises(ValueError, match="no architecture of transformers has qk_norm False"):
        hf_config.to_fields(CONFIG.replace(qk_norm=False), "float32")


def test_sizes_and_names_are_those_of_the_published_qwen3_30b():
    assert QWEN_3_30B_A3B.num_params == 30_532_122_624
    assert QWEN_3_30B_A3B.num_active_params == 3_353_032_704
    made = jax.tree.leaves(transformer.abstract_params(QWEN_3_30B_A3B))
    assert sum(leaf.size for leaf in made) == QWEN_3_30B_A3B.num_params
    names = hf.layout.entries(QWEN_3_30B_A3B, hf.NAMES)
    assert names["model.layers.47.mlp.experts.127.down_proj.weight"].shape == (2048, 768)
    assert names["model.layers.0.mlp.gate.weight"].shape == (128, 2048)
    assert len(names) == 18_867


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, CONFIG.vocab_size, (4, 8), dtype=np.int32)
    return tokens, np.repeat([[PLAIN, 2 * PLAIN]], [5, 3], axis=1).repeat(4, axis=0).astype(np.int32)


def logp_and_gradient(params, tokens, segments, experts=None):
    positions = jnp.broadcast_to(jnp.array([0, 1, 2, 3, 4, 0, 1, 2]), tokens.shape)

    def loss(params):
        hidden, _ = model.apply(CONFIG, params, tokens, positions=positions, segments=segments, experts=experts)
        logp = model.token_logp(CONFIG, params, hidden, jnp.roll(tokens, -1, axis=1), chunk=32)
        return jnp.sum(logp), logp

    return jax.grad(loss, has_aux=True)(params)


@pytest.fixture(scope="module")
def unsharded(batch):
    return jax.device_get(jit(logp_and_gradient)(random_params(CONFIG), *batch))


@pytest.mark.parametrize(
    "split", [{"data": 1, "fsdp": 2, "expert": 2, "tensor": 2}, {"data": 1, "fsdp": 8}], ids=["expert", "fsdp"]
)
def test_sharded_log_probabilities_and_gradients_equal_unsharded_ones(batch, unsharded, split):
    mesh = meshes.make_mesh(**split)
    params = jax.device_put(random_params(CONFIG), transformer.shardings(CONFIG, mesh))
    with jax.set_mesh(mesh):
        gradient, logp = jit(logp_and_gradient)(params, *jax.device_put(batch, meshes.batch_shardings(batch, mesh)))
    np.testing.assert_allclose(logp, unsharded[1], rtol=1e-4, atol=1e-5)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4), gradient, unsharded[0])
