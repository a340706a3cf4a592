"""Reference logits of transformers' Qwen3MoeForCausalLM and Qwen3ForCausalLM, and the experts that every token chose.

Needs torch and transformers. Writes beside itself `qwen3/<case>/` (tiny checkpoints) and `qwen3.npz` (tokens, all
logits, and for mixtures the chosen experts [L, B, T, k], sorted).
"""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

HERE = Path(__file__).parent
SEED = 0
LENGTH = 16
BASE: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 16, "max_position_embeddings": 64, "rms_norm_eps": 1e-3, "bos_token_id": 1, "eos_token_id": [2, 5],
    "pad_token_id": 0, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}, "initializer_range": 0.05,
}  # fmt: skip
MIXTURE: dict[str, Any] = {"moe_intermediate_size": 24, "num_experts": 6, "num_experts_per_tok": 3}
CASES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "mixture": (
        Qwen3MoeForCausalLM, Qwen3MoeConfig, {**MIXTURE, "norm_topk_prob": True, "tie_word_embeddings": True}
    ),
    "unnormalised": (
        Qwen3MoeForCausalLM, Qwen3MoeConfig, {**MIXTURE, "norm_topk_prob": False, "attention_bias": True}
    ),
    "dense": (Qwen3ForCausalLM, Qwen3Config, {"intermediate_size": 48}),
}  # fmt: skip


def randomise(model: torch.nn.Module, generator: torch.Generator) -> None:
    """Weights large enough that every field of the config moves the logits, exactly representable in bfloat16."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            values = 1.0 + 0.3 * noise if "norm" in name else 0.25 * noise
            parameter.copy_(values.to(torch.bfloat16).float())


def main() -> None:
    """Write each case's checkpoint in bfloat16, and what a freshly loaded model computes in float32."""
    arrays: dict[str, np.ndarray] = {}
    generator = torch.Generator().manual_seed(SEED)
    tokens = np.random.default_rng(SEED).integers(0, BASE["vocab_size"], (2, LENGTH))
    for name, (architecture, config, changes) in CASES.items():
        folder = HERE / "qwen3" / name
        shutil.rmtree(folder, ignore_errors=True)
        model = architecture(config(**{**BASE, **changes}))
        randomise(model, generator)
        model.to(torch.bfloat16).save_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
        mixture = "num_experts" in changes
        with torch.no_grad():
            out = model(torch.from_numpy(tokens), **({"output_router_logits": True} if mixture else {}))
        arrays[f"{name}/tokens"] = tokens.astype(np.int32)
        arrays[f"{name}/logits"] = out.logits.numpy()
        if mixture:
            best = [scores.topk(changes["num_experts_per_tok"]).indices.sort().values for scores in out.router_logits]
            arrays[f"{name}/experts"] = torch.stack(best).reshape(-1, *tokens.shape, best[0].shape[-1]).numpy()
    np.savez_compressed(HERE / "qwen3.npz", allow_pickle=False, **arrays)


if __name__ == "__main__":
    main()
