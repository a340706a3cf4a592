"""Our logits are those of transformers' LlamaForCausalLM, for every kind of config and for a published model."""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posttrain import model
from posttrain.model import pretrained, transformer

GOLDEN = Path(__file__).parent / "golden"
LLAMA = GOLDEN / "llama"
CASES = sorted(folder.name for folder in LLAMA.iterdir())
TOLERANCE = 1e-4
assert_close = partial(np.testing.assert_allclose, rtol=1e-5, atol=TOLERANCE)


def all_logits(config: model.ModelConfig, params, tokens: np.ndarray, lengths=None) -> np.ndarray:
    """Logits [B, T, V]; what lies beyond a row's length is padding, so that one shape serves several lengths."""
    row = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    used = row < np.reshape(tokens.shape[1] if lengths is None else lengths, (-1, 1))
    positions, segments = (jnp.asarray(np.where(used, x, 0)) for x in (row, 1024))
    hidden, _ = model.apply(config, params, jnp.asarray(tokens), positions=positions, segments=segments)
    return np.asarray(model.logits(config, params, hidden))


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_those_of_transformers(case):
    config, params = model.load(LLAMA / case)
    with np.load(GOLDEN / "llama.npz") as golden:
        tokens, expected, short = (golden[f"{case}/{name}"] for name in ("tokens", "logits", "short_logits"))
    for weights in (params, transformer.for_decoding(config, params)):
        assert_close(all_logits(config, weights, tokens), expected)
    length = short.shape[1]
    assert_close(all_logits(config, weights, tokens, length)[:, :length], short)


@pytest.mark.parametrize(
    "case, changes",
    [
        ("untied_theta_eps", {"rope_theta": 10_000.0}),
        ("untied_theta_eps", {"norm_eps": 1e-5}),
        ("linear", {"rope_scaling": None}),
        ("dynamic", {"context": 64}),
        ("yarn", {"rope_scaling": {"beta_fast": 32.0}}),
        ("yarn", {"rope_scaling": {"original_context": 16}}),
        ("yarn_mscale", {"rope_scaling": {"mscale": None}}),
        ("yarn_mscale", {"rope_scaling": {"truncate": True}}),
        ("longrope", {"rope_scaling": {"factor": 1.0}}),
        ("longrope", {"rope_scaling": {"original_context": 64}}),
        ("llama3", {"rope_scaling": {"high_freq_factor": 2.0}}),
        ("llama3", {"rope_scaling": {"original_context": 64}}),
    ],
)
def test_the_goldens_would_notice_an_ignored_field(case, changes):
    config, params = model.load(LLAMA / case)
    if isinstance(changes.get("rope_scaling"), dict):
        values = {**vars(config.rope_scaling), **changes["rope_scaling"]}
        changes = {"rope_scaling": type(config.rope_scaling)(**values)}
    with np.load(GOLDEN / "llama.npz") as golden:
        tokens, expected = golden[f"{case}/tokens"], golden[f"{case}/logits"]
    wrong = all_logits(config.replace(**changes), transformer.for_decoding(config, params), tokens)
    assert np.abs(wrong - expected).max() > 100 * TOLERANCE


def test_smollm2_from_its_gguf_file_has_the_logits_of_transformers():
    try:
        path = pretrained.locate("smollm2")
    except FileNotFoundError as error:
        pytest.skip(str(error))
    config, params = model.load(path)
    with np.load(GOLDEN / "smollm2.npz") as file:
        golden = dict(file)
    prompts = [golden[f"{number}/tokens"][0] for number in range(3)]
    lengths = [len(prompt) for prompt in prompts]
    padded = np.stack([np.pad(prompt, (0, max(lengths) - len(prompt))) for prompt in prompts])
    for number, (row, length) in enumerate(zip(all_logits(config, params, padded, lengths), lengths, strict=True)):
        logits = row[:length]
        partition = jax.nn.logsumexp(logits, axis=-1)
        assert_close(logits[:, ::512], golden[f"{number}/slice"])
        assert_close(partition, golden[f"{number}/logsumexp"])
        best = np.argsort(-logits[-1])[:10]
        np.testing.assert_array_equal(best, golden[f"{number}/best"])
        assert_close(logits[-1][best], golden[f"{number}/best_logits"])
