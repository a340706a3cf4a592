"""Hugging Face checkpoints of Llama, Qwen3 and its mixtures: config.json and safetensors, read and written."""

import contextlib
import errno
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
from jax.experimental import multihost_utils
from safetensors.numpy import save_file

from ..sharding import mesh as meshes
from . import layout, transformer
from .config import ModelConfig
from .hf_config import read_config, to_fields, token_fields
from .layout import Entry
from .materialise import materialise
from .transformer import Params

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
NAMES = {
    "embedding": "model.embed_tokens.weight",
    "attention_norm": "model.layers.{}.input_layernorm.weight",
    **{name: f"model.layers.{{}}.self_attn.{name}_proj.weight" for name in "qkvo"},
    **{f"{name}_bias": f"model.layers.{{}}.self_attn.{name}_proj.bias" for name in "qkvo"},
    **{f"{name}_norm": f"model.layers.{{}}.self_attn.{name}_norm.weight" for name in "qk"},
    "mlp_norm": "model.layers.{}.post_attention_layernorm.weight",
    **{name: f"model.layers.{{}}.mlp.{name}_proj.weight" for name in ("gate", "up", "down")},
    **{f"{name}_bias": f"model.layers.{{}}.mlp.{name}_proj.bias" for name in ("gate", "up", "down")},
    "router": "model.layers.{}.mlp.gate.weight",
    **{f"experts_{name}": f"model.layers.{{}}.mlp.experts.{{}}.{name}_proj.weight" for name in ("gate", "up", "down")},
    "final_norm": "model.norm.weight",
    "head": "lm_head.weight",
}
"""Our parameter name -> the checkpoint's tensor name, with a place for the layer and the expert."""

FLOAT_TYPES = ("F64", "F32", "F16", "BF16")


def read(folder: Path | str, *, mesh: jax.sharding.Mesh | None = None) -> tuple[ModelConfig, Params]:
    """Config and float32 parameters of a Hugging Face folder with one or several safetensors files.

    Raises:
        FileNotFoundError: for a missing config.json, index or weight file.
        ValueError: for an unsupported config, a broken file, a missing or extra tensor or one of another shape.
    """
    folder = Path(folder)
    config = read_config(folder)
    with contextlib.ExitStack() as stack:
        files = _open(folder, stack)
        stored = {name: (path, handle.get_slice(name)) for name, (path, handle) in files.items()}
        layout.check(
            layout.entries(config, NAMES),
            {name: (path, tuple(piece.get_shape())) for name, (path, piece) in stored.items()},
            folder=folder,
            unused=lambda name: (
                name.endswith("rotary_emb.inv_freq") or (config.tie_embeddings and name == NAMES["head"])
            ),
        )
        for name, (path, piece) in stored.items():
            if piece.get_dtype() not in FLOAT_TYPES:
                raise ValueError(
                    f"{path}: tensor {name} is of type {piece.get_dtype()}, only {', '.join(FLOAT_TYPES)} can be read"
                )

        def tensor(name: str, index: tuple[int, ...], shape: tuple[int, ...]) -> np.ndarray:
            theirs = NAMES[name].format(*index)
            return layout.from_file(name, files[theirs][1].get_tensor(theirs), shape)

        return config, materialise(config, tensor, mesh=mesh)


def save_hf(
    folder: Path | str,
    config: ModelConfig,
    params: Params,
    *,
    dtype: Literal["float32", "bfloat16"] = "float32",
    shard_bytes: int = 5_000_000_000,
) -> None:
    """Write a folder that `transformers.AutoModelForCausalLM.from_pretrained` loads: weights and both configs.

    Everything is first written beside the folder and then moved, so a failure leaves the folder as it was. Other files
    in the folder (a tokenizer) stay. On several processes every one must call: process 0 writes, the others wait
    for it.

    Raises:
        ValueError: if the parameters do not have the shapes that the config says.
        OSError: if the disk refuses.
    """
    folder = Path(folder)
    if dtype not in ("float32", "bfloat16"):
        raise ValueError(f"dtype {dtype!r}: choose float32 or bfloat16")
    if config.output == "score":
        raise ValueError("a reward model has no place in a causal language model: keep it in the posttrain format")
    plan = layout.entries(config, NAMES)
    _check_params(config, params)
    shards = _split(plan, 2 if dtype == "bfloat16" else 4, shard_bytes)
    partial = folder.with_name(f".{folder.name}.partial")
    writer = jax.process_index() == 0
    try:
        if writer:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        for file, names in shards.items():
            tensors: dict[str, np.ndarray] = {}
            for name in names:
                tensor = _host_tensor(params, plan[name], dtype)
                if writer:
                    tensors[name] = tensor
            if writer:
                save_file(tensors, partial / file, metadata={"format": "pt"})
        if writer:
            _write_configs(partial, config, dtype, shards, plan)
            for file in shards:  # safetensors creates its files readable by their owner alone
                shutil.copymode(partial / "config.json", partial / file)
            _move(partial, folder)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(f"saved {folder}")
    except (OSError, safetensors.SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        gib = sum(math.prod(entry.shape) for entry in plan.values()) * (2 if dtype == "bfloat16" else 4) / 2**30
        code = error.errno if isinstance(error, OSError) and error.errno else errno.EIO
        raise OSError(
            code,
            f"could not write the {gib:.3g} GiB checkpoint {folder} ({error}): free space or choose another folder",
        ) from error


def _open(folder: Path, stack: contextlib.ExitStack) -> dict[str, tuple[Path, Any]]:
    """Tensor name -> (file, open handle), for a single file or the files that an index names."""
    index = folder / INDEX
    if index.is_file():
        try:
            names = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        except (ValueError, KeyError) as error:
            raise ValueError(f"{index} is not a safetensors index ({error!r}): copy or download it again") from error
    elif (folder / WEIGHTS).is_file():
        names = None
    else:
        raise FileNotFoundError(f"{folder} has neither {WEIGHTS} nor {INDEX}: only safetensors weights can be read")
    handles = {}
    for file in [WEIGHTS] if names is None else sorted(set(names.values())):
        path = folder / file
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing, but {INDEX} names it: download the missing file")
        try:
            handles[file] = stack.enter_context(safetensors.safe_open(path, framework="np"))
        except (safetensors.SafetensorError, OSError) as error:
            raise ValueError(
                f"{path} ({path.stat().st_size} bytes) is truncated or not a safetensors file ({error}): "
                "copy or download it again"
            ) from error
    if names is None:
        return dict.fromkeys(handles[WEIGHTS].keys(), (folder / WEIGHTS, handles[WEIGHTS]))
    held = {file: set(handle.keys()) for file, handle in handles.items()}
    for name, file in names.items():
        if name not in held[file]:
            raise ValueError(f"{folder / file} does not hold tensor {name}, but {INDEX} says so: download it again")
    return {name: (folder / file, handles[file]) for name, file in names.items()}


def _check_params(config: ModelConfig, params: Params) -> None:
    expected = {jax.tree_util.keystr(k): v.shape for k, v in _leaves(transformer.abstract_params(config))}
    given = {jax.tree_util.keystr(k): v.shape for k, v in _leaves(params)}
    wrong = sorted(k for k in expected.keys() | given.keys() if expected.get(k) != given.get(k))
    if wrong:
        raise ValueError(
            f"parameter {wrong[0]} has shape {given.get(wrong[0])}, the config says {expected.get(wrong[0])}: "
            "give the config that the parameters were made with"
        )


def _leaves(tree: Params) -> Iterator[tuple[Any, Any]]:
    yield from jax.tree_util.tree_leaves_with_path(tree)


def _split(plan: dict[str, Entry], item_bytes: int, shard_bytes: int) -> dict[str, list[str]]:
    """File name -> tensor names, each file at most `shard_bytes` long unless one tensor alone is longer."""
    groups: list[list[str]] = [[]]
    size = 0
    for name, entry in plan.items():
        bytes_ = math.prod(entry.shape) * item_bytes
        if groups[-1] and size + bytes_ > shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += bytes_
    if len(groups) == 1:
        return {WEIGHTS: groups[0]}
    return {f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups)}


def _host_tensor(params: Params, entry: Entry, dtype: str) -> np.ndarray:
    leaf: Any = params
    for key in entry.path:
        leaf = leaf[key]
    piece = leaf[entry.at] if entry.at else leaf
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        piece = _gather(piece.astype(dtype), leaf.sharding)
    array = np.asarray(piece).astype(jnp.dtype(dtype))
    return np.ascontiguousarray(layout.to_file(entry.path[-1], array))


def _gather(piece: jax.Array, place: jax.sharding.Sharding) -> jax.Array:
    """The whole of an array that lies on the devices of several processes, on this one's first device."""
    if not isinstance(place, jax.sharding.NamedSharding) or not isinstance(place.mesh, jax.sharding.Mesh):
        raise ValueError(f"parameters of several processes need a mesh, not {place}: load or restore them onto one")
    return jax.device_put(piece, meshes.replicated(place.mesh)).addressable_data(0)


def _write_configs(
    folder: Path, config: ModelConfig, dtype: str, shards: dict[str, list[str]], plan: dict[str, Entry]
) -> None:
    def write(name: str, fields: dict[str, Any]) -> None:
        (folder / name).write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")

    write("config.json", to_fields(config, dtype))
    write("generation_config.json", {k: v for k, v in token_fields(config).items() if v is not None})
    if len(shards) > 1:
        size = sum(math.prod(entry.shape) for entry in plan.values()) * jnp.dtype(dtype).itemsize
        where = {name: file for file, names in shards.items() for name in names}
        write(INDEX, {"metadata": {"total_size": size}, "weight_map": where})


def _move(partial: Path, folder: Path) -> None:
    """Put the finished files in place; weights of an earlier save go, anything else in the folder stays."""
    if not folder.exists():
        partial.rename(folder)
        return
    for stale in [folder / INDEX, *folder.glob("model*.safetensors")]:
        stale.unlink(missing_ok=True)
    for file in sorted(partial.iterdir()):
        file.replace(folder / file.name)
    partial.rmdir()
