"""What a model is: sizes, switches and the published shapes. Plain data."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the pretraining context.

    `kind` is the config's name: "linear", "dynamic", "yarn", "longrope" or "llama3"; the fields that a kind does not
    use keep their defaults. `factor` is context / original_context where a checkpoint leaves it to that.
    """

    kind: Literal["linear", "dynamic", "yarn", "longrope", "llama3"]
    factor: float = 1.0
    original_context: int | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shape of a Llama-architecture decoder. Sizes in elements; `dtype` is what activations are computed in.

    With `num_experts` every layer's feed-forward is a mixture of so many, each of width `mlp_dim`, and a token goes to
    `experts_per_token` of them; with `norm_topk_prob` their weights sum to 1. `qk_norm` normalises each head's
    queries and keys, as Qwen3 does.

    `output` "score" has one linear unit on the last hidden states in the place of the vocabulary's head: a reward model
    or a critic.
    """

    vocab_size: int
    embed_dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_dim: int
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-5
    tie_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    num_experts: int = 0
    experts_per_token: int = 0
    norm_topk_prob: bool = False
    context: int = 2048
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    pad_id: int | None = None
    init_std: float = 0.02
    output: Literal["logits", "score"] = "logits"
    dtype: str = "float32"
    remat: Literal["none", "dots", "full"] = "none"

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd: rotary embeddings need pairs")
        if self.num_experts and not 1 <= self.experts_per_token <= self.num_experts:
            raise ValueError(f"experts_per_token is {self.experts_per_token}: choose from 1 to all {self.num_experts}")
        if self.num_experts and self.mlp_bias:
            raise ValueError("experts have no biases: leave mlp_bias off, or num_experts 0")

    def replace(self, **changes: Any) -> "ModelConfig":
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    @property
    def expert_dtype(self) -> Literal["uint8", "uint16"]:
        """The smallest type that numbers all experts."""
        return "uint8" if self.num_experts <= 256 else "uint16"

    @property
    def num_params(self) -> int:
        """Number of weights, tied ones counted once."""
        return self._params(self.num_experts)

    @property
    def num_active_params(self) -> int:
        """Number of weights that a token meets: of its own experts only."""
        return self._params(self.experts_per_token)

    def _params(self, experts: int) -> int:
        attention = self.embed_dim * self.head_dim * (2 * self.num_heads + 2 * self.num_kv_heads)
        if self.attention_bias:
            attention += self.head_dim * (self.num_heads + 2 * self.num_kv_heads) + self.embed_dim
        if self.qk_norm:
            attention += 2 * self.head_dim
        mlp = 3 * self.embed_dim * self.mlp_dim + (2 * self.mlp_dim + self.embed_dim if self.mlp_bias else 0)
        if self.num_experts:
            mlp = experts * mlp + self.embed_dim * self.num_experts
        layers = self.num_layers * (attention + mlp + 2 * self.embed_dim)
        ends = self.vocab_size * self.embed_dim + self.embed_dim
        if self.output == "score":
            return layers + ends + self.embed_dim + 1
        return layers + ends + (0 if self.tie_embeddings else self.vocab_size * self.embed_dim)


RUNTIME_FIELDS = ("dtype", "remat")
"""Fields that say how to compute, not what the model is: two models that differ only here may be merged."""


def to_json(config: ModelConfig) -> str:
    """The config as JSON text, for a checkpoint's own folder."""
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


def from_json(path: Path) -> ModelConfig:
    """Read what `to_json` wrote."""
    fields = json.loads(path.read_text())
    scaling = fields.pop("rope_scaling")
    if scaling is not None:
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in scaling.items()}
        scaling = RopeScaling(**values)
    return ModelConfig(**{**fields, "rope_scaling": scaling, "eos_ids": tuple(fields["eos_ids"])})


TINY = ModelConfig(
    vocab_size=384, embed_dim=128, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=32, mlp_dim=352,
    tie_embeddings=True, context=256,
)  # fmt: skip
TINY_MOE = TINY.replace(mlp_dim=96, num_experts=8, experts_per_token=2, norm_topk_prob=True, qk_norm=True)
SMOLLM2_135M = ModelConfig(
    vocab_size=49_152, embed_dim=576, num_layers=30, num_heads=9, num_kv_heads=3, head_dim=64, mlp_dim=1536,
    rope_theta=100_000.0, tie_embeddings=True, context=8192, bos_id=1, eos_ids=(2,), pad_id=2,
)  # fmt: skip
LLAMA_31_ROPE = RopeScaling(kind="llama3", factor=8.0, original_context=8192)
LLAMA_31_8B = ModelConfig(
    vocab_size=128_256, embed_dim=4096, num_layers=32, num_heads=32, num_kv_heads=8, head_dim=128, mlp_dim=14_336,
    rope_theta=500_000.0, rope_scaling=LLAMA_31_ROPE, context=131_072, bos_id=128_000,
    eos_ids=(128_001, 128_008, 128_009),
)  # fmt: skip
LLAMA_31_70B = LLAMA_31_8B.replace(embed_dim=8192, num_layers=80, num_heads=64, mlp_dim=28_672)
QWEN_25_32B = ModelConfig(
    vocab_size=152_064, embed_dim=5120, num_layers=64, num_heads=40, num_kv_heads=8, head_dim=128, mlp_dim=27_648,
    rope_theta=1_000_000.0, norm_eps=1e-6, attention_bias=True, context=131_072, eos_ids=(151_645, 151_643),
)  # fmt: skip
"""The sizes of Qwen2.5-32B; it has no bias on the attention's output, which here adds 0.001% to its weights."""
QWEN_3_30B_A3B = ModelConfig(
    vocab_size=151_936, embed_dim=2048, num_layers=48, num_heads=32, num_kv_heads=4, head_dim=128, mlp_dim=768,
    num_experts=128, experts_per_token=8, norm_topk_prob=True, qk_norm=True, rope_theta=1_000_000.0, norm_eps=1e-6,
    context=40_960, bos_id=151_643, eos_ids=(151_645, 151_643),
)  # fmt: skip
ON_THE_SPOT = {"tiny": TINY, "tiny-moe": TINY_MOE}
"""Random models that are made where one is asked for by name, with a byte-level tokenizer."""
PUBLISHED = {
    "llama3.1-8b": LLAMA_31_8B, "qwen2.5-32b": QWEN_25_32B, "llama3.1-70b": LLAMA_31_70B,
    "qwen3-30b-a3b": QWEN_3_30B_A3B,
}  # fmt: skip
"""Shapes to plan with, by name; no weights are known for them."""
