"""Properties of the decoder: who sees whom, decoding, padding, chunked log-probabilities, precision, remat."""

from functools import partial

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest

from posttrain import model
from posttrain.data import batch as batches
from posttrain.model import attention, cache, transformer

CONFIG = model.ModelConfig(
    vocab_size=97, embed_dim=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=48
)
PLAIN = attention.BRANCHES
WIDTH = 12


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(0)
    shapes = transformer.abstract_params(CONFIG)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0.0, 0.2, leaf.shape), jnp.float32), shapes)


@partial(jax.jit, static_argnums=0)
def hidden_states(config, params, tokens, positions, segments):
    return model.apply(config, params, tokens, positions=positions, segments=segments)[0]


def rows(*lengths: int, seed: int = 1) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, CONFIG.vocab_size, length, dtype=np.int32) for length in lengths]


def alone(params, tokens: np.ndarray) -> np.ndarray:
    """Hidden states [T, D] of one conversation in a row of its own (padded behind, for one compiled shape)."""
    row = np.arange(WIDTH)
    used = row < len(tokens)
    padded = np.pad(tokens, (0, WIDTH - len(tokens)))
    arrays = (x[None] for x in (padded, np.where(used, row, 0), np.where(used, PLAIN, 0)))
    return np.asarray(hidden_states(CONFIG, params, *arrays)[0, : len(tokens)])


def close(actual, expected, atol: float = 2e-5) -> None:
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=atol)


def test_branches_are_numbered_as_in_the_batch_contract():
    assert attention.BRANCHES == batches.BRANCHES


def test_layers_start_from_different_numbers_of_the_configured_size():
    config = CONFIG.replace(init_std=0.3)
    gate = jax.jit(lambda key: model.init(config, key)["layers"]["mlp"]["gate"])(jax.random.key(0))
    assert not np.isclose(gate[0], gate[1]).any()
    assert float(jnp.std(gate)) == pytest.approx(0.3, rel=0.05)


def test_packed_conversations_equal_separate_ones(params):
    first, second = rows(7, 5)
    tokens = np.concatenate([first, second])[None]
    positions = np.concatenate([np.arange(7), np.arange(5)])[None]
    segments = np.repeat([PLAIN, 2 * PLAIN], [7, 5])[None]
    packed = hidden_states(CONFIG, params, tokens, positions, segments)[0]
    close(packed[:7], alone(params, first))
    close(packed[7:], alone(params, second))


def test_a_shared_prompt_equals_separate_rows(params):
    prompt, one, two = rows(4, 3, 5)
    tokens = np.concatenate([prompt, one, two])[None]
    positions = np.concatenate([np.arange(4), np.arange(4, 7), np.arange(4, 9)])[None]
    segments = np.repeat([PLAIN, PLAIN + 1, PLAIN + 2], [4, 3, 5])[None]
    shared = hidden_states(CONFIG, params, tokens, positions, segments)[0]
    close(shared[4:7], alone(params, np.concatenate([prompt, one]))[4:])
    close(shared[7:], alone(params, np.concatenate([prompt, two]))[4:])


def test_the_last_token_leaves_earlier_hidden_states_alone(params):
    (tokens,) = rows(9)
    changed = tokens.copy()
    changed[-1] = (changed[-1] + 1) % CONFIG.vocab_size
    before, after = alone(params, tokens), alone(params, changed)
    np.testing.assert_array_equal(before[:-1], after[:-1])
    assert np.abs(before[-1] - after[-1]).max() > 0.1


def test_padding_changes_neither_values_nor_gradients(params):
    (tokens,) = rows(6)
    filler = rows(4, seed=5)[0]
    padded = np.concatenate([filler[:2], tokens, filler[2:]])[None]
    positions = np.concatenate([[0, 0], np.arange(6), [0, 0]])[None]
    segments = np.repeat([0, PLAIN, 0], [2, 6, 2])[None]

    def loss(params, tokens, positions, segments):
        hidden, _ = model.apply(CONFIG, params, tokens, positions=positions, segments=segments)
        hidden = jnp.where((segments > 0)[..., None], hidden, 0.0)
        return jnp.sum(jnp.sin(hidden)), hidden

    gradient = jax.jit(jax.grad(loss, has_aux=True))
    expected, plain = gradient(params, tokens[None], np.arange(6)[None], np.full((1, 6), PLAIN))
    actual, hidden = gradient(params, padded, positions, segments)
    close(hidden[:, 2:8], plain)
    jax.tree.map(partial(close, atol=1e-4), actual, expected)


def test_a_query_that_sees_nothing_gets_zeros_and_finite_gradients():
    query, key = jnp.ones((1, 2, 4, 8)), jnp.ones((1, 2, 2, 8))
    blind = jnp.zeros((1, 2, 2), bool)
    assert not attention.attend(query, key, key, blind).any()
    gradient = jax.grad(lambda q: jnp.sum(attention.attend(q, key, key, blind)))(query)
    assert not gradient.any()


@pytest.mark.parametrize("unstacked", [False, True])
def test_decoding_equals_prefill_at_every_position_of_ragged_rows(params, unstacked):
    lengths = (9, 4, 7)
    conversations = rows(*lengths)
    slots = 10
    weights = transformer.for_decoding(CONFIG, params) if unstacked else params
    state = jax.tree.map(lambda x: x + 100.0, cache.empty(CONFIG, 3, slots))
    state = cache.unstack(state) if unstacked else state
    step = jax.jit(
        lambda tokens, positions, state: model.apply(CONFIG, weights, tokens, positions=positions, cache=state)
    )
    seen = [[], [], []]
    for time in range(max(lengths) + 2):
        where = [time - row if 0 <= time - row < lengths[row] else slots for row in range(3)]
        tokens = [[conversations[row][p] if p < slots else 0] for row, p in enumerate(where)]
        hidden, state = step(jnp.asarray(tokens), jnp.asarray(where)[:, None], state)
        for row in range(3):
            if where[row] < slots:
                seen[row].append(hidden[row, 0])
    for row in range(3):
        close(np.stack(seen[row]), alone(params, conversations[row]))


def test_a_prefill_into_the_cache_equals_a_training_forward_and_goes_on_from_there(params):
    (tokens,) = rows(8)
    expected = alone(params, tokens)
    apply = jax.jit(partial(model.apply, CONFIG))
    first, state = apply(params, tokens[None, :5], positions=jnp.arange(5)[None], cache=cache.empty(CONFIG, 1, 12))
    rest, _ = apply(params, tokens[None, 5:], positions=jnp.arange(5, 8)[None], cache=state)
    close(np.concatenate([first[0], rest[0]]), expected)


def test_apply_without_segments_or_cache_says_what_it_needs(params):
    with pytest.raises(ValueError, match="needs `segments`"):
        model.apply(CONFIG, params, jnp.zeros((1, 2), int), positions=jnp.zeros((1, 2), int))


@pytest.mark.parametrize("chunk", [1, 6, 16, 1000])
@pytest.mark.parametrize("tied", [False, True])
def test_token_logp_is_the_log_softmax_of_the_logits_in_value_and_gradient(params, chunk, tied):
    config = CONFIG.replace(tie_embeddings=tied)
    hidden = jax.random.normal(jax.random.key(2), (2, 7, CONFIG.embed_dim))
    targets = jnp.asarray(np.stack(rows(7, 7)))
    weight = jax.random.normal(jax.random.key(3), (2, 7))
    ends = {name: params[name] for name in ("embedding", "head")}

    def whole(ends, hidden):
        logp = jax.nn.log_softmax(model.logits(config, ends, hidden))
        return jnp.sum(weight * jnp.take_along_axis(logp, targets[..., None], axis=-1)[..., 0])

    def chunked(ends, hidden):
        return jnp.sum(weight * model.token_logp(config, ends, hidden, targets, chunk=chunk))

    actual, expected = (jax.jit(jax.value_and_grad(f, argnums=(0, 1)))(ends, hidden) for f in (chunked, whole))
    jax.tree.map(close, actual, expected)


def shapes(jaxpr) -> set[tuple[int, ...]]:
    """Shapes of every intermediate of a jaxpr, inner ones included."""
    found = set()
    for equation in jaxpr.eqns:
        found |= {tuple(v.aval.shape) for v in equation.outvars}
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            found |= shapes(inner)
    return found


def test_token_logp_never_holds_the_logits_of_a_whole_batch(params):
    batch, length, chunk = 2, 64, 16
    hidden = jnp.ones((batch, length, CONFIG.embed_dim))
    targets = jnp.zeros((batch, length), int)

    def loss(params, hidden):
        return jnp.sum(model.token_logp(CONFIG, params, hidden, targets, chunk=chunk))

    for function in (loss, jax.grad(loss, argnums=(0, 1))):
        found = shapes(jax.make_jaxpr(function)(params, hidden).jaxpr)
        scores = [int(np.prod(s)) for s in found if s[:2] == (batch, length) and s[2:] != (CONFIG.embed_dim,)]
        assert batch * length < max(scores) <= batch * length * chunk


def test_bfloat16_compute_stays_close_and_logits_stay_float32(params):
    (tokens,) = rows(12)
    low = CONFIG.replace(dtype="bfloat16")
    positions = jnp.arange(12)[None]
    hidden = hidden_states(low, params, tokens[None], positions, jnp.full_like(positions, PLAIN))
    assert hidden.dtype == jnp.bfloat16
    scores = model.logits(low, params, hidden)
    assert scores.dtype == jnp.float32
    expected = model.logits(CONFIG, params, jnp.asarray(alone(params, tokens))[None])
    error = jnp.abs(scores - expected)
    assert 0 < float(error.max()) < 0.1 * float(jnp.std(expected))


def test_remat_changes_no_gradient(params):
    tokens = jnp.asarray(np.stack(rows(8, 8)))
    positions = jnp.broadcast_to(jnp.arange(8), (2, 8))

    def loss(params, config):
        hidden, _ = model.apply(config, params, tokens, positions=positions, segments=jnp.full_like(tokens, PLAIN))
        return jnp.sum(jnp.sin(hidden))

    configs = [CONFIG.replace(remat=remat) for remat in ("none", "dots", "full")]
    plain, dots, full = jax.jit(lambda params: [jax.grad(loss)(params, config) for config in configs])(params)
    jax.tree.map(close, dots, plain)
    jax.tree.map(close, full, plain)
    rules = [str(jax.make_jaxpr(jax.grad(partial(loss, config=config)))(params)).count("remat") for config in configs]
    assert rules[0] == 0 and min(rules[1:]) > 0


def test_the_config_survives_json(tmp_path):
    scaling = model.config.RopeScaling(kind="longrope", short_factor=(1.0, 2.0), long_factor=(3.0, 4.0))
    config = CONFIG.replace(rope_scaling=scaling, eos_ids=(2, 5), head_dim=4)
    (tmp_path / "config.json").write_text(model.config.to_json(config))
    assert model.config.from_json(tmp_path / "config.json") == config


def test_num_params_counts_what_init_makes():
    for config in (CONFIG, CONFIG.replace(attention_bias=True, mlp_bias=True, tie_embeddings=True)):
        made = jax.tree.leaves(transformer.abstract_params(config))
        assert sum(leaf.size for leaf in made) == config.num_params
