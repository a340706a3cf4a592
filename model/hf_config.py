"""config.json of Llama, Qwen3 and Qwen3-MoE, to and from ModelConfig. Every field is understood or refused."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .config import ModelConfig, RopeScaling

Fields = Mapping[str, Any]

SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
DEFAULTS = {
    "num_key_value_heads": None, "head_dim": None, "hidden_act": "silu", "max_position_embeddings": 2048,
    "initializer_range": 0.02, "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "attention_bias": False,
    "mlp_bias": False, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None, "rope_theta": 10_000.0,
    "rope_scaling": None, "rope_parameters": None, "original_max_position_embeddings": None,
}  # fmt: skip
"""What transformers' LlamaConfig takes where config.json is silent."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """An architecture: what its config.json must say, what is meant where it is silent, what means nothing there."""

    architecture: str
    model_type: str
    sizes: tuple[str, ...] = SIZES
    defaults: Mapping[str, Any] = field(default_factory=lambda: DEFAULTS)
    unused: frozenset[str] = frozenset()


_QWEN = {**DEFAULTS, "max_position_embeddings": 32_768, "bos_token_id": None, "eos_token_id": None}
_WINDOW = frozenset({"sliding_window", "max_window_layers"})  # without use_sliding_window, which is refused
LLAMA = Family(architecture="LlamaForCausalLM", model_type="llama")
QWEN3 = Family(
    architecture="Qwen3ForCausalLM",
    model_type="qwen3",
    defaults={**_QWEN, "head_dim": 128, "num_key_value_heads": 32},
    unused=_WINDOW,
)
QWEN3_MOE = Family(
    architecture="Qwen3MoeForCausalLM",
    model_type="qwen3_moe",
    sizes=(*(s for s in SIZES if s != "intermediate_size"), "moe_intermediate_size", "num_experts_per_tok"),
    defaults={
        **_QWEN, "num_key_value_heads": 4, "norm_topk_prob": False, "num_experts": 128, "num_local_experts": None
    },
    unused=_WINDOW | {"intermediate_size", "router_aux_loss_coef"},
)  # fmt: skip
FAMILIES = {family.architecture: family for family in (LLAMA, QWEN3, QWEN3_MOE)}

ONLY = {
    "hidden_act": "silu", "pretraining_tp": 1, "partial_rotary_factor": 1.0, "attention_dropout": 0.0,
    "decoder_sparse_step": 1,
}  # fmt: skip
"""Fields of which one value alone is computed here (as are None and False, for any field)."""

DESCRIPTIVE = frozenset({
    "architectures", "model_type", "torch_dtype", "dtype", "transformers_version", "_name_or_path", "_commit_hash",
    "use_cache", "is_llama_config", "transformers.js_config", "unsloth_version", "unsloth_fixed", "id2label",
    "label2id", "output_attentions", "output_hidden_states", "return_dict", "problem_type", "chunk_size_feed_forward",
    "max_length", "max_new_tokens", "temperature", "top_k", "top_p", "do_sample", "num_beams", "repetition_penalty",
    "use_mambapy",
})  # fmt: skip
"""Fields that say nothing about the logits."""

YARN_KEYS = ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate")
ROPE_KEYS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor", "original_max_position_embeddings", *YARN_KEYS),
    "longrope": ("factor", "original_max_position_embeddings", "attention_factor", "short_factor", "long_factor"),
    "llama3": ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
}
ROPE_NEEDS: dict[str, tuple[str, ...]] = {
    "default": (), "linear": ("factor",), "dynamic": ("factor",), "yarn": (),
    "longrope": ("short_factor", "long_factor"), "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}  # fmt: skip


def read_config(folder: Path) -> ModelConfig:
    """The ModelConfig that a folder's config.json and generation_config.json describe.

    Raises:
        FileNotFoundError: without a config.json.
        ValueError: for another architecture, a missing size, or a field whose value is not computed here.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no config.json: give a folder that save_pretrained or save_hf wrote")
    generation = folder / "generation_config.json"
    return from_fields(_json(path), _json(generation) if generation.is_file() else {}, path)


def from_fields(fields: Fields, generation: Fields, path: Path) -> ModelConfig:
    """ModelConfig from the fields of config.json and generation_config.json; `path` is named in errors."""
    family = _family(fields, path)
    missing = [name for name in family.sizes if name not in fields]
    if missing:
        raise ValueError(f"{path}: {', '.join(missing)} missing: the file is not a complete {family.model_type} config")
    _refuse_unknown(fields, family, path)
    values = {**family.defaults, **fields}
    heads = values["num_attention_heads"]
    head_dim = values["head_dim"] or values["hidden_size"] // heads
    theta, scaling = _rope(values, head_dim, path)
    stops = [*_ids(values["eos_token_id"]), *_ids(generation.get("eos_token_id"))]
    return ModelConfig(
        vocab_size=values["vocab_size"],
        embed_dim=values["hidden_size"],
        num_layers=values["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=values["num_key_value_heads"] or heads,
        head_dim=head_dim,
        mlp_dim=values["moe_intermediate_size" if family is QWEN3_MOE else "intermediate_size"],
        rope_theta=theta,
        rope_scaling=scaling,
        norm_eps=values["rms_norm_eps"],
        tie_embeddings=bool(values["tie_word_embeddings"]),
        attention_bias=bool(values["attention_bias"]),
        mlp_bias=bool(values["mlp_bias"]),
        qk_norm=family is not LLAMA,
        **(_mixture(values) if family is QWEN3_MOE else {}),
        context=values["max_position_embeddings"],
        bos_id=values["bos_token_id"],
        eos_ids=tuple(dict.fromkeys(stops)),
        pad_id=values["pad_token_id"] if values["pad_token_id"] is not None else generation.get("pad_token_id"),
        init_std=values["initializer_range"],
    )


def to_fields(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """The fields of config.json for weights of a type; the spelling that transformers 4 and 5 both read.

    Raises:
        ValueError: for a combination that no architecture of transformers has.
    """
    family = _family_of(config)
    fields: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.embed_dim,
        "intermediate_size": config.mlp_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.context,
        "initializer_range": config.init_std,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "attention_bias": config.attention_bias,
        **({"mlp_bias": config.mlp_bias} if family is LLAMA else {}),
        "rope_theta": config.rope_theta,
        "torch_dtype": dtype,
        "use_cache": True,
    }
    if family is QWEN3_MOE:
        fields |= {
            "intermediate_size": config.mlp_dim * config.experts_per_token,
            "moe_intermediate_size": config.mlp_dim,
            "num_experts": config.num_experts,
            "num_experts_per_tok": config.experts_per_token,
            "norm_topk_prob": config.norm_topk_prob,
        }
    if config.rope_scaling is not None:
        fields["rope_scaling"] = _rope_fields(config.rope_scaling, config.context)
    return {**fields, **token_fields(config)}


def _family(fields: Fields, path: Path) -> Family:
    """The architecture that a config.json is of."""
    types = {family.model_type: [name] for name, family in FAMILIES.items()}
    named = list(fields.get("architectures") or types.get(fields.get("model_type", ""), []))
    if len(named) != 1 or named[0] not in FAMILIES:
        raise ValueError(
            f"{path}: architecture {named} (model_type {fields.get('model_type')!r}) is not supported, "
            f"only {', '.join(FAMILIES)} are: convert the checkpoint or choose another"
        )
    return FAMILIES[named[0]]


def _family_of(config: ModelConfig) -> Family:
    if bool(config.num_experts) > config.qk_norm or (config.qk_norm and config.mlp_bias):
        raise ValueError(
            f"no architecture of transformers has qk_norm {config.qk_norm}, mlp_bias {config.mlp_bias} and "
            f"{config.num_experts} experts: keep the model in the posttrain format"
        )
    return QWEN3_MOE if config.num_experts else QWEN3 if config.qk_norm else LLAMA


def _mixture(values: Fields) -> dict[str, Any]:
    """What a mixture has beside a dense model; transformers 5 writes num_experts under another name."""
    return {
        "num_experts": values["num_local_experts"] or values["num_experts"],
        "experts_per_token": values["num_experts_per_tok"],
        "norm_topk_prob": bool(values["norm_topk_prob"]),
    }


def token_fields(config: ModelConfig) -> dict[str, Any]:
    """Special token ids, as config.json and generation_config.json spell them; several stop ids are a list."""
    stops: Any = list(config.eos_ids)
    if len(stops) < 2:
        stops = stops[0] if stops else None
    return {"bos_token_id": config.bos_id, "eos_token_id": stops, "pad_token_id": config.pad_id}


def _json(path: Path) -> dict[str, Any]:
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}): copy or download it again") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{path} holds a {type(fields).__name__}, not an object: copy or download it again")
    return fields


def _ids(value: int | list[int] | None) -> list[int]:
    if value is None:
        return []
    return list(value) if isinstance(value, list) else [value]


def _refuse_unknown(fields: Fields, family: Family, path: Path) -> None:
    known = {*family.defaults, *family.sizes, *family.unused, *DESCRIPTIVE}
    for name, value in fields.items():
        if value is None or value is False:
            continue
        if name in ONLY:
            if value != ONLY[name]:
                raise ValueError(
                    f"{path}: {name} is {value!r}, only {ONLY[name]!r} is supported: choose another checkpoint"
                )
        elif name == "layer_types":
            if set(value) != {"full_attention"}:
                raise ValueError(f"{path}: layer_types is {value!r}, only full_attention is supported")
        elif name not in known and value not in ({}, []):
            raise ValueError(
                f"{path}: field {name} = {value!r} is not supported for {family.architecture}: remove it if it "
                "does not change what the model computes"
            )


def _rope(values: Fields, head_dim: int, path: Path) -> tuple[float, RopeScaling | None]:
    """Base and scaling from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (transformers 4)."""
    given = {k: v for k, v in (values["rope_scaling"] or values["rope_parameters"] or {}).items() if v is not None}
    old_kind = given.pop("type", "default")
    kind = given.pop("rope_type", old_kind)
    theta = float(given.pop("rope_theta", values["rope_theta"]))
    if given.pop("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(f"{path}: partial_rotary_factor in the rope settings is not 1.0: choose another checkpoint")
    if kind not in ROPE_KEYS:
        raise ValueError(f"{path}: rope_type {kind!r} is not supported, only {', '.join(ROPE_KEYS)} are")
    outer = values["original_max_position_embeddings"]
    if outer is not None:
        given["original_max_position_embeddings"] = outer
    unknown = {k: v for k, v in given.items() if k not in ROPE_KEYS[kind] and v is not False}
    if unknown:
        raise ValueError(
            f"{path}: rope settings {unknown} have no meaning for rope_type {kind!r}: remove them or fix the type"
        )
    missing = [name for name in ROPE_NEEDS[kind] if name not in given]
    if missing:
        raise ValueError(f"{path}: rope_type {kind!r} needs {', '.join(missing)}: the rope settings are incomplete")
    if kind == "default":
        return theta, None
    return theta, _scaling(kind, given, values["max_position_embeddings"], head_dim, path)


def _scaling(kind: Any, given: dict[str, Any], context: int, head_dim: int, path: Path) -> RopeScaling:
    original = given.pop("original_max_position_embeddings", None)
    if kind in ("yarn", "longrope", "llama3"):
        original = original or context
        given.setdefault("factor", context / original)
    for name in ("short_factor", "long_factor"):
        if name in given:
            given[name] = tuple(float(value) for value in given[name])
            if len(given[name]) != head_dim // 2:
                raise ValueError(
                    f"{path}: {name} has {len(given[name])} entries, head_dim {head_dim} needs {head_dim // 2}"
                )
    numbers: dict[str, Any] = {
        k: float(v) if isinstance(v, int) and not isinstance(v, bool) else v for k, v in given.items()
    }
    return RopeScaling(kind=kind, original_context=original, **numbers)


def _rope_fields(scaling: RopeScaling, context: int) -> dict[str, Any]:
    fields: dict[str, Any] = {"rope_type": scaling.kind}
    for name in ROPE_KEYS[scaling.kind]:
        if name == "original_max_position_embeddings":
            fields[name] = scaling.original_context or context
            continue
        value = vars(scaling)[name]
        if value is not None:
            fields[name] = list(value) if isinstance(value, tuple) else value
    return fields
