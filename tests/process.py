"""One of several processes that generate and train together; it writes what came out as JSON: `process.py FILE`.

The environment says which process it is (see `launch.cluster`).
"""

import json
import sys
from pathlib import Path

import compiled_once
import jax
import numpy as np

from posttrain.data import tokenizer
from posttrain.launch import cluster
from posttrain.model import config, sample, transformer
from posttrain.model.processing import Sampling
from posttrain.sharding import mesh as meshes
from posttrain.train import optimizer, sft, state, stop
from posttrain.train.updater import Updater, micro_batches

CHATS = [
    ({"role": "user", "content": f"What is {n} + 3?"}, {"role": "assistant", "content": str(n + 3) * (1 + n % 5)})
    for n in range(12)
]


def results() -> dict[str, list]:
    """Answers of a sharded model, and the losses and weights of its first updates, on a mesh of all devices."""
    tokens = tokenizer.tiny()
    shape = config.TINY.replace(vocab_size=tokens.vocab_size, embed_dim=32, mlp_dim=64, head_dim=8)
    mesh = meshes.make_mesh(data=2, fsdp=2)
    where = transformer.shardings(shape, mesh)
    params = jax.jit(lambda key: transformer.init(shape, key), out_shardings=where)(jax.random.key(0))
    prompts = [tokens.encode(text) for text in ("a", "What is this?", "to be or not", "42")]
    answers = sample.generate(
        shape, params, prompts, num_samples=3, sampling=Sampling(max_tokens=9), noise=sample.Noise(seed=1, step=0),
        slots=4, mesh=mesh,
    )  # fmt: skip
    adamw = optimizer.AdamW(learning_rate=1e-2).build(steps=3)
    now, updater = state.create(params, adamw, mesh), Updater(sft.loss(shape), adamw, mesh)
    losses = []
    for _ in range(3):
        now, metrics = updater.step(now, micro_batches(sft.batch(tokens, CHATS, length=64), 4, mesh))
        losses.append(float(metrics["loss"]))
    sums = [float(np.abs(meshes.to_host(leaf)).sum()) for leaf in jax.tree.leaves(now.params)]
    texts = [[[*answer.tokens.tolist(), answer.finish] for answer in group] for group in answers]
    return {"answers": texts, "losses": losses, "weights": sums}


def main() -> None:
    with cluster.joined():
        Path(sys.argv[1]).write_text(json.dumps(results()))


if __name__ == "__main__":
    compiled_once.share()
    stop.leave_after(main)
