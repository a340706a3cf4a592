"""GGUF files: unpacked as the format's blocks are defined, read back as written, refused in one clear sentence."""

from pathlib import Path

import gguf as container
import jax
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from posttrain import model
from posttrain.model import gguf, hf, layout, rope, transformer
from posttrain.model.config import RopeScaling

CONFIG = model.ModelConfig(
    vocab_size=64, embed_dim=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16, mlp_dim=64, rope_theta=5e5,
    norm_eps=1e-6, context=512, bos_id=1, eos_ids=(2, 7), pad_id=0,
)  # fmt: skip


def random_params(config: model.ModelConfig):
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), transformer.abstract_params(config)
    )


def interleaved(rows: np.ndarray, num_heads: int) -> np.ndarray:
    """llama.cpp's row order of q and k, as its converter writes it."""
    return rows.reshape(num_heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def file_tensors(config: model.ModelConfig, params) -> dict[str, np.ndarray]:
    tensors = {}
    for name, entry in layout.entries(config, gguf.NAMES).items():
        leaf = params
        for key in entry.path:
            leaf = leaf[key]
        rows = layout.to_file(entry.path[-1], leaf[entry.at] if entry.at else leaf)
        heads = {"q": config.num_heads, "k": config.num_kv_heads}.get(entry.path[-1].removesuffix("_bias"))
        tensors[name] = np.ascontiguousarray(interleaved(rows, heads) if heads else rows)
    return tensors


def write(
    path: Path, config: model.ModelConfig, tensors: dict[str, np.ndarray], *, arch: str = "llama",
    types: dict[str, Type] | None = None, extra: dict[str, float | str] | None = None,
) -> Path:  # fmt: skip
    """A GGUF file as llama.cpp's converter would make it."""
    writer = container.GGUFWriter(path, arch)
    writer.add_block_count(config.num_layers)
    writer.add_embedding_length(config.embed_dim)
    writer.add_feed_forward_length(config.mlp_dim)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_context_length(config.context)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_eot_token_id(7)
    writer.add_pad_token_id(0)
    for key, value in (extra or {}).items():
        add = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32}[type(value)]
        add(f"{arch}.{key}", value)
    for name, tensor in tensors.items():
        kind = (types or {}).get(name)
        data = tensor if kind is None else container.quantize(tensor, kind)
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def half(block: np.ndarray, start: int) -> float:
    return float(block[start : start + 2].view(np.float16)[0])


def nibbles(bytes_: np.ndarray) -> np.ndarray:
    return np.concatenate([bytes_ & 15, bytes_ >> 4]).astype(np.int64)


def q4_k(block: np.ndarray) -> np.ndarray:
    """256 values: 8 groups of 32 with 6-bit scales and minima packed in 12 bytes."""
    packed, codes, out = block[4:16].astype(int), block[16:], []
    for group in range(8):
        if group < 4:
            scale, least = packed[group] & 63, packed[group + 4] & 63
        else:
            scale = (packed[group + 4] & 15) | (packed[group - 4] >> 6 << 4)
            least = (packed[group + 4] >> 4) | (packed[group] >> 6 << 4)
        quads = codes[group // 2 * 32 : group // 2 * 32 + 32]
        out.append(half(block, 0) * scale * (quads >> 4 * (group % 2) & 15) - half(block, 2) * least)
    return np.concatenate(out)


def q6_k(block: np.ndarray) -> np.ndarray:
    """256 values: low 4 bits, high 2 bits, 16 signed scales, one half-precision factor."""
    low, high, scales = block[:128].astype(int), block[128:192].astype(int), block[192:208].view(np.int8)
    out = np.empty(256)
    for i in range(256):
        part, within = divmod(i, 128)
        quarter, column = divmod(within, 32)
        nibble = low[part * 64 + quarter % 2 * 32 + column] >> 4 * (quarter // 2) & 15
        code = nibble | (high[part * 32 + column] >> 2 * quarter & 3) << 4
        out[i] = half(block, 208) * int(scales[i // 16]) * (code - 32)
    return out


UNPACK = {
    Type.F32: (1, 4, lambda b: b.view(np.float32)),
    Type.F16: (1, 2, lambda b: b.view(np.float16)),
    Type.BF16: (1, 2, lambda b: np.array([0, 0, *b], np.uint8).view(np.float32)),
    Type.Q8_0: (32, 34, lambda b: half(b, 0) * b[2:].view(np.int8)),
    Type.Q4_0: (32, 18, lambda b: half(b, 0) * (nibbles(b[2:]) - 8)),
    Type.Q4_1: (32, 20, lambda b: half(b, 0) * nibbles(b[4:]) + half(b, 2)),
    Type.Q4_K: (256, 144, q4_k),
    Type.Q6_K: (256, 210, q6_k),
}
"""Type -> (values in a block, bytes of a block, one block to its values), straight from the format's definition."""


@pytest.mark.parametrize("kind", UNPACK, ids=lambda kind: kind.name)
def test_each_type_is_unpacked_as_its_blocks_are_defined(tmp_path, kind):
    size, num_bytes, unpack = UNPACK[kind]
    blocks = np.random.default_rng(0).integers(0, 256, (6, num_bytes), dtype=np.uint8)
    halves = {Type.Q4_K: (0, 2), Type.Q6_K: (208,), Type.Q4_1: (0, 2), Type.Q8_0: (0,), Type.Q4_0: (0,)}
    for start in halves.get(kind, ()):
        blocks[:, start : start + 2] = np.array([[0.5], [-0.25], [0.013], [1.0], [2.5], [0.0]], np.float16).view(
            np.uint8
        )
    if kind in (Type.F32, Type.F16, Type.BF16):
        blocks = np.linspace(-2, 2, 6, dtype=np.float32).reshape(6, 1).view(np.uint8)[:, 4 - num_bytes :]
        blocks = np.ascontiguousarray(blocks)
    expected = np.concatenate([np.atleast_1d(unpack(block)) for block in blocks])
    writer = container.GGUFWriter(tmp_path / "x.gguf", "llama")
    raw = {Type.F32: np.float32, Type.F16: np.float16}.get(kind, np.uint8)
    writer.add_tensor("x", blocks.reshape(1, -1).view(raw), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    _, tensors = gguf._open(tmp_path / "x.gguf")
    values = gguf._dequantize(tensors["x"], tmp_path)
    assert values.shape == (1, 6 * size) and values.dtype == np.float32
    np.testing.assert_allclose(values[0], expected, rtol=1e-6)


@pytest.mark.parametrize("tied", [False, True])
def test_a_written_file_is_read_back_bit_for_bit(tmp_path, tied):
    config = CONFIG.replace(tie_embeddings=tied, attention_bias=not tied, mlp_bias=not tied)
    params = random_params(config)
    path = write(tmp_path / "m.gguf", config, file_tensors(config, params))
    read_config, read_params = model.load(path)
    assert read_config == config
    jax.tree.map(np.testing.assert_array_equal, read_params, params)


def test_a_quantised_file_gives_the_dequantised_weights(tmp_path):
    params = random_params(CONFIG)
    tensors = file_tensors(CONFIG, params)
    path = write(
        tmp_path / "m.gguf", CONFIG, tensors, types={name: Type.Q8_0 for name in tensors if "norm" not in name}
    )
    error = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), model.load(path)[1], params)
    largest = max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(params))
    assert 0 < max(jax.tree.leaves(error)) < largest / 127
    assert error["final_norm"] == 0


def test_rope_factors_of_llama_3_are_read_as_its_rule_and_others_as_they_are(tmp_path):
    scaling = RopeScaling(kind="llama3", factor=32.0, original_context=8192)
    factors = (rope.frequencies(CONFIG) / rope.llama3(CONFIG, scaling)).astype(np.float32)
    tensors = file_tensors(CONFIG, random_params(CONFIG))
    path = write(tmp_path / "llama3.gguf", CONFIG, {**tensors, "rope_freqs.weight": factors})
    assert model.load(path)[0].rope_scaling == scaling
    other = np.linspace(1, 3, 8, dtype=np.float32)
    config, _ = model.load(write(tmp_path / "other.gguf", CONFIG, {**tensors, "rope_freqs.weight": other}))
    positions = np.arange(5)[None]
    cos, _ = rope.angles(config, jax.numpy.asarray(positions))
    np.testing.assert_allclose(cos[0], np.cos(positions.T * rope.frequencies(CONFIG) / other), atol=1e-5)


def test_rope_scaling_keys_are_read(tmp_path):
    tensors = file_tensors(CONFIG, random_params(CONFIG))

    def scaling(**keys) -> RopeScaling | None:
        extra = {f"rope.scaling.{key}": value for key, value in keys.items()}
        return model.load(write(tmp_path / "m.gguf", CONFIG, tensors, extra=extra))[0].rope_scaling

    assert scaling(type="none") is None
    assert scaling(type="linear", factor=4.0) == RopeScaling(kind="linear", factor=4.0)
    yarn = scaling(type="yarn", factor=4.0, original_context_length=128)
    assert yarn is not None and (yarn.kind, yarn.factor, yarn.original_context) == ("yarn", 4.0, 128)
    assert yarn.attention_factor == pytest.approx(0.1 * np.log(4.0) + 1.0)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"arch": "qwen2"}, "architecture 'qwen2' is not supported, only 'llama'"),
        ({"extra": {"expert_count": 8}}, "'expert_count': 8"),
        ({"extra": {"rope.scaling.type": "su"}}, "rope scaling 'su' is not supported"),
        ({"without": "blk.1.ffn_up.weight"}, "tensor blk.1.ffn_up.weight is missing"),
        ({"add": ("blk.0.attn_q_norm.weight", np.ones(16, np.float32))}, "attn_q_norm.weight .* has no place"),
        ({"add": ("output_norm.weight", np.ones(30, np.float32))}, r"output_norm.weight has shape \(30,\)"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_by_name(tmp_path, changes, message):
    tensors = file_tensors(CONFIG, random_params(CONFIG))
    tensors.pop(changes.pop("without", ""), None)
    tensors.update([changes.pop("add")] if "add" in changes else [])
    path = write(tmp_path / "m.gguf", CONFIG, tensors, **changes)
    with pytest.raises(ValueError, match=message):
        model.load(path)


def test_a_truncated_or_foreign_file_is_refused_in_one_sentence(tmp_path):
    path = write(tmp_path / "m.gguf", CONFIG, file_tensors(CONFIG, random_params(CONFIG)))
    whole = path.read_bytes()
    for content in (whole[:-5000], whole[:600], whole[:30], b"not a model at all", b""):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"m.gguf \({len(content)} bytes\) is truncated or not a GGUF file"):
            model.load(path)


def test_a_type_that_cannot_be_unpacked_is_named(tmp_path):
    tensors = file_tensors(CONFIG, random_params(CONFIG))
    path = tmp_path / "m.gguf"
    tensors["output_norm.weight"] = tensors["output_norm.weight"].view(np.int32)
    write(path, CONFIG, tensors)
    with pytest.raises(ValueError, match="output_norm.weight is of type I32, which cannot be unpacked"):
        model.load(path)


def test_both_formats_hold_the_same_model(tmp_path):
    params = random_params(CONFIG)
    hf.save_hf(tmp_path / "hf", CONFIG, params)
    path = write(tmp_path / "m.gguf", CONFIG, file_tensors(CONFIG, params))
    ours, theirs = model.load(tmp_path / "hf"), model.load(path)
    assert ours[0] == theirs[0]
    jax.tree.map(np.testing.assert_array_equal, ours[1], theirs[1])
