"""The peer's half of against_tunix.py: google-tunix, used as its guides do, timed on request.

Run by against_tunix.py with the interpreter of an environment that has google-tunix; it needs nothing of posttrain.
Reads one JSON object a line (the settings first, then the workloads to time) and answers each with one.
"""
# pyright: reportMissingImports=none

import json
import os
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx
from tunix.generate.sampler import CacheConfig, Sampler
from tunix.models.llama3 import model as llama3
from tunix.sft import utils
from tunix.sft.peft_trainer import PeftTrainer, TrainingConfig, TrainingInput


class Numbers:
    """The least that the sampler takes for a tokenizer: text is token ids with spaces between, 0 pads."""

    def __init__(self, eos: int) -> None:
        self.eos = eos

    def encode(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]

    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))

    def bos_id(self) -> int:
        return 0  # which the sampler takes for "none"

    def eos_id(self) -> int:
        return self.eos

    def pad_id(self) -> int:
        return 0


def build(model: dict[str, Any], weights: dict[str, np.ndarray]) -> llama3.Llama3:
    """Its Llama 3 with the given weights."""
    net = llama3.Llama3(llama3.ModelConfig(**model), rngs=nnx.Rngs(0))
    net.embedder.input_embedding[...] = weights["embedding"]
    net.lm_head.w[...] = weights["head"]
    net.final_norm.w[...] = weights["final_norm"]
    for index, layer in enumerate(net.layers):
        for name, part in (("q", layer.attn.q_proj), ("k", layer.attn.k_proj), ("v", layer.attn.v_proj)):
            part.w[...] = weights[f"layers.attention.{name}"][index]
        layer.attn.o_proj.w[...] = weights["layers.attention.o"][index]
        for name, part in (("gate", layer.mlp.gate_proj), ("up", layer.mlp.up_proj), ("down", layer.mlp.down_proj)):
            part.kernel[...] = weights[f"layers.mlp.{name}"][index]
        layer.input_layernorm.w[...] = weights["layers.attention_norm"][index]
        layer.post_attention_layernorm.w[...] = weights["layers.mlp_norm"][index]
    return net


def inputs(x: TrainingInput) -> dict[str, Any]:
    """What its default loss takes, made as its guides make it."""
    real = x.input_tokens != 0
    return {
        "input_tokens": x.input_tokens,
        "input_mask": x.input_mask,
        "positions": utils.build_positions_from_mask(real),
        "attention_mask": utils.make_causal_attn_mask(real),
    }


def training(net: llama3.Llama3, learning_rate: float, steps: int, tokens: np.ndarray) -> Callable[[int], dict]:
    """Times the compiled train step of its trainer, as its `train` calls it but without its bookkeeping."""
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(learning_rate, weight_decay=0.0))
    trainer = PeftTrainer(net, optimizer, TrainingConfig(eval_every_n_steps=1_000_000))
    step, _ = trainer.with_gen_model_input_fn(inputs).jit_train_and_eval_step(cache_nnx_graph=True)
    batch = TrainingInput(input_tokens=jax.numpy.asarray(tokens), input_mask=jax.numpy.ones(tokens.shape, bool))

    def run(_: int) -> dict[str, Any]:
        start = time.perf_counter()
        losses = [step(batch)[0] for _ in range(steps)]
        jax.block_until_ready((losses, nnx.state(net), nnx.state(trainer.optimizer)))
        return {"seconds": time.perf_counter() - start, "tokens": steps * tokens.size, "loss": float(losses[0])}

    return run


def generation(
    net: llama3.Llama3, prompts: list[list[int]], batch: int, width: int, new: int, stops: list[int]
) -> Callable[[int], dict]:
    """Times its sampler over all prompts, `batch` at a time, at temperature 1."""
    c = net.config
    cache = CacheConfig(
        cache_size=width + new, num_layers=c.num_layers, num_kv_heads=c.num_kv_heads, head_dim=c.head_dim
    )
    sampler = Sampler(net, Numbers(c.vocab_size), cache)  # an eos id that the model cannot say
    texts = [" ".join(map(str, prompt)) for prompt in prompts]

    def run(seed: int) -> dict[str, Any]:
        start, answers = time.perf_counter(), []
        for first in range(0, len(texts), batch):
            output = sampler(
                texts[first : first + batch], max_generation_steps=new, max_prompt_length=width, temperature=1.0,
                top_p=1.0, seed=seed + first, eos_tokens=stops or None,
            )  # fmt: skip
            answers += output.tokens
        seconds = time.perf_counter() - start
        # It cuts the stop token off; the model said it all the same.
        return {"seconds": seconds, "tokens": sum(min(len(answer) + 1, new) for answer in answers)}

    return run


def main() -> None:
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever the libraries print must not land between the replies
    settings = json.loads(sys.stdin.readline())
    given = {name: dict(np.load(Path(settings["folder"]) / f"{name}.npz")) for name in ("weights", "batch")}
    runs = {"train": training(build(settings["model"], given["weights"]), **settings["train"], **given["batch"])}
    for name in settings["generate"]:
        runs[name] = generation(build(settings["model"], given["weights"]), **settings["generate"][name])
    answer: dict[str, Any] = {"tunix": metadata.version("google-tunix"), "jax": jax.__version__}
    while True:
        print(json.dumps(answer), file=replies, flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        request = json.loads(line)
        answer = runs[request["run"]](request["seed"])


if __name__ == "__main__":
    main()
