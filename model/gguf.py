"""GGUF files of architecture `llama` (llama.cpp's format), dequantised to float32.

The `gguf` package reads the container and unpacks the quantised blocks. llama.cpp stores the rows of q and k in the
order of interleaved rotary pairs; they are put back into the order of rotated halves here.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import jax
import numpy as np

from . import layout, rope
from .config import ModelConfig, RopeScaling
from .materialise import materialise
from .transformer import Params

NAMES = {
    "embedding": "token_embd.weight",
    "attention_norm": "blk.{}.attn_norm.weight",
    **{name: f"blk.{{}}.attn_{name}.weight" for name in "qkv"},
    "o": "blk.{}.attn_output.weight",
    **{f"{name}_bias": f"blk.{{}}.attn_{name}.bias" for name in "qkv"},
    "o_bias": "blk.{}.attn_output.bias",
    "mlp_norm": "blk.{}.ffn_norm.weight",
    **{name: f"blk.{{}}.ffn_{name}.weight" for name in ("gate", "up", "down")},
    **{f"{name}_bias": f"blk.{{}}.ffn_{name}.bias" for name in ("gate", "up", "down")},
    "final_norm": "output_norm.weight",
    "head": "output.weight",
}
"""Our parameter name -> the file's tensor name, with a place for the layer."""

ROPE_TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
KNOWN_KEYS = frozenset({
    "block_count", "context_length", "embedding_length", "feed_forward_length", "vocab_size", "tensor_data_layout",
    "attention.head_count", "attention.head_count_kv", "attention.key_length", "attention.value_length",
    "attention.layer_norm_rms_epsilon", "rope.dimension_count", "rope.freq_base", "rope.scale_linear",
    "rope.scaling.type", "rope.scaling.factor", "rope.scaling.attn_factor", "rope.scaling.yarn_attn_factor",
    "rope.scaling.original_context_length", "rope.scaling.finetuned", "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow",
})  # fmt: skip
STOP_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")

Tensors = Mapping[str, gguf.ReaderTensor]


def read(path: Path | str, *, mesh: jax.sharding.Mesh | None = None) -> tuple[ModelConfig, Params]:
    """Config and float32 parameters of a GGUF file.

    Raises:
        ValueError: for a broken file, another architecture, metadata that is not computed here, a missing or extra
            tensor, one of another shape, or a quantisation type that cannot be unpacked.
    """
    path = Path(path)
    metadata, tensors = _open(path)
    config = _config(metadata, tensors, path)
    layout.check(
        layout.entries(config, NAMES),
        {name: (path, tuple(reversed(tensor.shape.tolist()))) for name, tensor in tensors.items()},
        folder=path,
        unused=lambda name: name in ROPE_TENSORS,
    )
    heads = {"q": config.num_heads, "k": config.num_kv_heads}

    def read_tensor(name: str, index: tuple[int, ...], shape: tuple[int, ...]) -> np.ndarray:
        values = _dequantize(tensors[NAMES[name].format(*index)], path)
        if name[0] in heads and name in ("q", "k", "q_bias", "k_bias"):
            values = halves(values, heads[name[0]])
        return layout.from_file(name, values, shape)

    return config, materialise(config, read_tensor, mesh=mesh)


def read_config(path: Path | str) -> ModelConfig:
    """Config of a GGUF file, without its weights. Errors as for `read`."""
    return _config(*_open(Path(path)), Path(path))


def halves(rows: np.ndarray, num_heads: int) -> np.ndarray:
    """Rows (head, pair, 2) of llama.cpp's interleaved rotary order back as (head, 2, pair)."""
    return rows.reshape(num_heads, -1, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def _open(path: Path) -> tuple[dict[str, Any], Tensors]:
    try:
        reader = gguf.GGUFReader(path)
        metadata = {
            key: field.contents()
            for key, field in reader.fields.items()
            if (field.types and field.types[0] != gguf.GGUFValueType.ARRAY) or key.endswith("head_count_kv")
        }
    except (ValueError, IndexError, KeyError, OverflowError) as error:
        raise ValueError(
            f"{path} ({path.stat().st_size} bytes) is truncated or not a GGUF file ({error}): copy or download it again"
        ) from error
    return metadata, {tensor.name: tensor for tensor in reader.tensors}


def _dequantize(tensor: gguf.ReaderTensor, path: Path) -> np.ndarray:
    try:
        return gguf.dequantize(tensor.data, tensor.tensor_type)
    except NotImplementedError as error:
        raise ValueError(
            f"{path}: tensor {tensor.name} is of type {tensor.tensor_type.name}, which cannot be unpacked: "
            "choose a file quantised to Q8_0, Q6_K, Q4_K or F16"
        ) from error


def _config(metadata: Mapping[str, Any], tensors: Tensors, path: Path) -> ModelConfig:
    architecture = metadata.get("general.architecture")
    if architecture != "llama":
        raise ValueError(
            f"{path}: architecture {architecture!r} is not supported, only 'llama' is: choose another file"
        )
    keys = {key.removeprefix("llama."): value for key, value in metadata.items() if key.startswith("llama.")}
    unknown = {k: v for k, v in keys.items() if k not in KNOWN_KEYS and v not in (0, False, None)}
    if unknown:
        raise ValueError(f"{path}: metadata {unknown} is not supported for architecture llama: choose another file")
    for name in ("embedding_length", "block_count", "feed_forward_length", "attention.head_count"):
        if not isinstance(keys.get(name), int):
            raise ValueError(
                f"{path}: llama.{name} is {keys.get(name)}, one number is needed: the metadata is incomplete"
            )
    if NAMES["embedding"] not in tensors:
        raise ValueError(f"{path}: tensor {NAMES['embedding']} is missing: the file is incomplete")
    heads = keys["attention.head_count"]
    head_dim = keys.get("attention.key_length", keys["embedding_length"] // heads)
    for name in ("rope.dimension_count", "attention.value_length"):
        if keys.get(name, head_dim) != head_dim:
            raise ValueError(f"{path}: llama.{name} is {keys[name]}, only the head dimension {head_dim} is supported")
    token = {key.removeprefix("tokenizer.ggml."): value for key, value in metadata.items()}
    stops = [token[key] for key in STOP_KEYS if key in token]
    config = ModelConfig(
        vocab_size=int(tensors[NAMES["embedding"]].shape[1]),
        embed_dim=keys["embedding_length"],
        num_layers=keys["block_count"],
        num_heads=heads,
        num_kv_heads=_kv_heads(keys.get("attention.head_count_kv", heads), path),
        head_dim=head_dim,
        mlp_dim=keys["feed_forward_length"],
        rope_theta=_shortest(keys.get("rope.freq_base", 10_000.0)),
        norm_eps=_shortest(keys.get("attention.layer_norm_rms_epsilon", 1e-5)),
        tie_embeddings=NAMES["head"] not in tensors,
        attention_bias=NAMES["q_bias"].format(0) in tensors,
        mlp_bias=NAMES["gate_bias"].format(0) in tensors,
        context=keys.get("context_length", 2048),
        bos_id=token.get("bos_token_id"),
        eos_ids=tuple(dict.fromkeys(stops)),
        pad_id=token.get("padding_token_id"),
    )
    return config.replace(rope_scaling=_scaling(config, keys, tensors, path))


def _shortest(value: float) -> float:
    """The shortest decimal that is this float32: 1e-05 for 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _kv_heads(value: int | list[int], path: Path) -> int:
    counts = set(value) if isinstance(value, list) else {value}
    if len(counts) != 1:
        raise ValueError(
            f"{path}: llama.attention.head_count_kv differs between layers ({value}), one number is needed"
        )
    return counts.pop()


def _scaling(config: ModelConfig, keys: Mapping[str, Any], tensors: Tensors, path: Path) -> RopeScaling | None:
    """What the rope keys and factor tensors say."""
    kind = keys.get("rope.scaling.type", "linear" if "rope.scale_linear" in keys else "none")
    original = keys.get("rope.scaling.original_context_length", config.context)
    factor = float(keys.get("rope.scaling.factor", keys.get("rope.scale_linear", 1.0)))
    attention = float(keys.get("rope.scaling.attn_factor", keys.get("rope.scaling.yarn_attn_factor", 1.0)))
    if "rope_freqs.weight" in tensors:
        if kind != "none":
            raise ValueError(f"{path}: rope_freqs.weight together with rope scaling {kind!r} is not supported")
        return _from_factors(config, _dequantize(tensors["rope_freqs.weight"], path))
    if kind == "none":
        return None
    if kind == "linear":
        return RopeScaling(kind="linear", factor=factor) if factor != 1.0 else None
    if kind == "yarn":
        return RopeScaling(
            kind="yarn",
            factor=factor,
            original_context=original,
            attention_factor=attention * (0.1 * math.log(factor) + 1.0 if factor > 1.0 else 1.0),
            beta_fast=float(keys.get("rope.scaling.yarn_beta_fast", 32.0)),
            beta_slow=float(keys.get("rope.scaling.yarn_beta_slow", 1.0)),
        )
    if kind == "longrope" and all(name in tensors for name in ROPE_TENSORS[1:]):
        long, short = (_floats(_dequantize(tensors[name], path)) for name in ROPE_TENSORS[1:])
        return RopeScaling(
            kind="longrope",
            factor=config.context / original,
            original_context=original,
            attention_factor=attention,
            short_factor=short,
            long_factor=long,
        )
    raise ValueError(f"{path}: rope scaling {kind!r} is not supported or lacks its factor tensors: choose another file")


def _from_factors(config: ModelConfig, factors: np.ndarray) -> RopeScaling:
    """Per-frequency divisors: Llama 3's rule where they are its result, else the same divisors at every length."""
    llama3 = RopeScaling(kind="llama3", factor=float(factors.max()), original_context=8192)
    if np.allclose(rope.frequencies(config) / rope.llama3(config, llama3), factors, rtol=1e-5, atol=0):
        return llama3
    divisors = _floats(factors)
    return RopeScaling(
        kind="longrope", original_context=8192, attention_factor=1.0, short_factor=divisors, long_factor=divisors
    )


def _floats(values: np.ndarray) -> tuple[float, ...]:
    return tuple(float(value) for value in values)
