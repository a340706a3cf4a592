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
from posttrain.launch import cost
from posttrain.model import attention, cache, hf, hf_config, layout, transformer
from posttrain.model.config import QWEN_3_30B_A3B
from posttrain.sharding import mesh as meshes
from posttrain.train.optimizer import Muon

GOLDEN = Path(__file__).parent / "golden"
CONFIG = model.ModelConfig(
    vocab_size=64, embed_dim=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=16, num_experts=8,
    experts_per_token=2, norm_topk_prob=True, qk_norm=True,
)  # fmt: skip
PLAIN = attention.BRANCHES


def random_params(config: model.ModelConfig, seed: int = 0):
    rng = np.random.default_rng(seed)
    shapes = transformer.abstract_params(config)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0.0, 0.3, leaf.shape), jnp.float32), shapes)


@partial(jax.jit, static_argnums=0)
def recorded(config, params, tokens, segments, positions):
    """Logits [B, T, V] and the experts [B, T, L, k] that a mixture chose, from a forward pass into a cache."""
    state = cache.empty(config, *tokens.shape)
    hidden, state = model.apply(config, params, tokens, positions=positions, segments=segments, cache=state)
    assert state is not None
    experts = None if state.experts is None else jnp.moveaxis(jnp.stack(state.experts), 0, 2)
    return model.logits(config, params, hidden), experts


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


def hidden_and_gradient(params, tokens, segments, experts=None, *, config=CONFIG):
    positions = jnp.broadcast_to(jnp.array([0, 1, 2, 3, 4, 0, 1, 2]), tokens.shape)

    def loss(params):
        hidden, _ = model.apply(config, params, tokens, positions=positions, segments=segments, experts=experts)
        return jnp.sum(jnp.sin(hidden)), hidden

    return jax.grad(loss, has_aux=True)(params)


@pytest.fixture(scope="module")
def unsharded(batch):
    return jax.device_get(jax.jit(hidden_and_gradient)(random_params(CONFIG), *batch))


def on_mesh(params, batch, *more, **split):
    """Gradient and hidden states computed by eight devices."""
    mesh = meshes.make_mesh(**split)
    params = jax.device_put(params, transformer.shardings(CONFIG, mesh))
    with jax.set_mesh(mesh):
        given = jax.device_put((*batch, *more), meshes.batch_shardings((*batch, *more), mesh))
        gradient, hidden = jax.jit(hidden_and_gradient)(params, *given)
    return jax.device_get(gradient), np.asarray(hidden)


def assert_same(actual, expected):
    np.testing.assert_allclose(actual[1], expected[1], rtol=1e-4, atol=1e-5)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4), actual[0], expected[0])


def test_hidden_states_and_gradients_do_not_depend_on_where_experts_lie(batch, unsharded):
    assert_same(on_mesh(random_params(CONFIG), batch, data=1, fsdp=2, expert=2, tensor=2), unsharded)


def test_packed_and_decoded_tokens_are_those_of_separate_rows_and_choose_the_same_experts(batch):
    params, (tokens, segments) = random_params(CONFIG), batch
    alone, experts = recorded(CONFIG, params, tokens, *plain(tokens))
    positions = np.broadcast_to([0, 1, 2, 3, 4, 0, 1, 2], tokens.shape)
    packed, _ = recorded(CONFIG, params, np.roll(tokens, -3, axis=1), segments, positions)
    np.testing.assert_allclose(packed[:, 5:], alone[:, :3], rtol=1e-4, atol=1e-4)
    step = jax.jit(partial(model.apply, CONFIG))
    weights = transformer.for_decoding(CONFIG, params)
    state = cache.unstack(cache.empty(CONFIG, *tokens.shape))
    for place in range(tokens.shape[1]):
        at = jnp.full((len(tokens), 1), place)
        hidden, state = step(weights, tokens[:, place : place + 1], positions=at, cache=state)
        np.testing.assert_allclose(model.logits(CONFIG, params, hidden)[:, 0], alone[:, place], rtol=1e-4, atol=1e-4)
    assert isinstance(state.experts, tuple)
    np.testing.assert_array_equal(np.stack(state.experts, axis=2), experts)


def test_given_experts_and_no_others_are_taken_also_by_rows_that_do_not_divide_over_the_devices(batch, unsharded):
    params, others = random_params(CONFIG), random_params(CONFIG, seed=1)
    rows = (np.roll(batch[0], -shift, axis=1) for shift in (0, 5))  # of two conversations each, the first counts
    first, second = (recorded(CONFIG, params, row, *plain(row))[1] for row in rows)
    replay = partial(on_mesh, data=1, fsdp=8)
    gradient, hidden = replay(params, batch, np.concatenate([first[:, :5], second[:, :3]], axis=1))
    assert_same((gradient, hidden), unsharded)
    assert np.all(np.any(gradient["layers"]["mlp"]["router"] != 0, axis=(1, 2))), "the gates' gradient is missing"

    # Only expert 0 is given, twice: what the others hold is no matter, and they learn nothing.
    only = np.zeros_like(first)
    mlp = others["layers"]["mlp"]
    kernels = {name: mlp[name].at[:, 0].set(params["layers"]["mlp"][name][:, 0]) for name in layout.EXPERT_KERNELS}
    mixed = {**params, "layers": {**params["layers"], "mlp": {**params["layers"]["mlp"], **kernels}}}
    (gradient, hidden), (_, same) = (replay(weights, batch, only) for weights in (params, mixed))
    np.testing.assert_array_equal(hidden, same)
    assert np.abs(hidden - unsharded[1]).max() > 0.1
    learned = [np.any(gradient["layers"]["mlp"]["experts_up"][:, i] != 0) for i in range(CONFIG.num_experts)]
    assert learned == [True] + [False] * (CONFIG.num_experts - 1)
    with pytest.raises(ValueError, match="the model is dense"):
        jax.eval_shape(partial(hidden_and_gradient, config=CONFIG.replace(num_experts=0)), params, *batch, only)


def test_muon_orthogonalises_every_expert_by_itself():
    rng = np.random.default_rng(0)
    optimizer = Muon(learning_rate=0.1).build(10)
    kernels = {"experts_up": (2, 3, 16, 24), "experts_down": (2, 3, 24, 16)}
    weights, gradient = ({name: jnp.asarray(rng.normal(size=x)) for name, x in kernels.items()} for _ in range(2))

    def step(gradient, weights):
        return optimizer.update(gradient, optimizer.init(weights), weights)[0]

    def of(tree, expert):
        return {name.removeprefix("experts_"): x[:, expert] for name, x in tree.items()}

    together, alone = step(gradient, weights), step(of(gradient, 1), of(weights, 1))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), of(together, 1), alone)


def test_a_plan_counts_the_products_of_a_tokens_own_experts_wherever_they_lie(batch):
    rows = [np.concatenate([one, one]) for one in batch]

    def flops(config):
        traced = jax.make_jaxpr(partial(hidden_and_gradient, config=config))
        return cost.matmul_flops(traced(transformer.abstract_params(config), *rows))

    mixture, narrow = flops(CONFIG), CONFIG.replace(num_experts=0, mlp_dim=CONFIG.experts_per_token * CONFIG.mlp_dim)
    one = (
        3 * CONFIG.num_layers * 2 * rows[0].size * CONFIG.embed_dim
    )  # a product with a vector, and its two derivatives
    gates = one * CONFIG.experts_per_token
    assert mixture == flops(narrow) + one * CONFIG.num_experts + gates
    with jax.set_mesh(meshes.make_mesh(data=1, fsdp=2, expert=4)):
        assert flops(CONFIG) == mixture + 3 * gates  # which every device of the expert axis applies
