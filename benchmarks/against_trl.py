"""A DPO step beside TRL's: the same model, weights and pairs, timed in turns on one CPU.

    python benchmarks/against_trl.py --trl-python ENVIRONMENT/bin/python

See README.md for how to make that environment and what each side does.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

from posttrain.data.pack import Example, Group, pack_groups
from posttrain.model import hf, transformer
from posttrain.model.config import ModelConfig
from posttrain.train import prefer, score
from posttrain.train.step import State

CONFIG = ModelConfig(
    vocab_size=512, embed_dim=256, num_layers=4, num_heads=8, num_kv_heads=4, head_dim=32, mlp_dim=704, context=512,
    eos_ids=(0,), pad_id=0,
)  # fmt: skip
PAIRS, PROMPT, SHORTEST, LONGEST, ROW = 8, 96, 64, 128, 320
BETA, LEARNING_RATE, STEPS = 0.1, 1e-4, 4
INSTALL = "make one with `python3 -m venv trl-env && trl-env/bin/pip install trl torch` and pass its bin/python"

Run = Callable[[], dict[str, Any]]


@dataclass(frozen=True)
class Args:
    """Compare the DPO train step with TRL's."""

    trl_python: Path | None = None
    """Interpreter of an environment with TRL; without it only this project is timed."""
    rounds: Annotated[int, tyro.conf.arg(metavar="N")] = 9
    """How often each side is timed, in turns."""


def make_pairs() -> list[dict[str, list[int]]]:
    """Random pairs: a prompt of PROMPT tokens, answers of SHORTEST to LONGEST with an end."""
    rng = np.random.default_rng(1)

    def tokens(count: int) -> list[int]:
        return rng.integers(1, CONFIG.vocab_size, count).tolist()

    return [
        {
            "prompt_ids": tokens(PROMPT),
            "chosen_ids": [*tokens(int(rng.integers(SHORTEST, LONGEST)) - 1), 0],
            "rejected_ids": [*tokens(int(rng.integers(SHORTEST, LONGEST)) - 1), 0],
        }
        for _ in range(PAIRS)
    ]


def ours(params: transformer.Params, pairs: list[dict[str, list[int]]]) -> Run:
    """Times our compiled DPO step; the reference's log-probs are computed before."""
    groups = [
        Group(
            prompt=pair["prompt_ids"],
            answers=[
                Example(tokens=pair[name], mask=np.ones(len(pair[name])), fields={"good": good})
                for name, good in (("chosen_ids", 1.0), ("rejected_ids", 0.0))
            ],
        )
        for pair in pairs
    ]
    batch = {name: jnp.asarray(x) for name, x in pack_groups(groups, length=ROW, fields=("good",)).batch.items()}
    batch["reference_logp"] = score.token_logp(CONFIG, params, batch)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(LEARNING_RATE, b2=0.999, weight_decay=0.0))
    step = jax.jit(prefer.train_step(CONFIG, optimizer, prefer.DPO(beta=BETA)), donate_argnums=0)
    params = jax.tree.map(jnp.copy, params)  # the step donates its state
    state = State(params, optimizer.init(params), jnp.zeros((), jnp.int32))

    def run() -> dict[str, Any]:
        nonlocal state
        start, losses = time.perf_counter(), []
        for _ in range(STEPS):
            state, metrics = step(state, batch)
            losses.append(metrics["loss"])
        jax.block_until_ready((state, losses))
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "loss": float(losses[0]), "last_loss": float(losses[-1])}

    return run


class Peer:
    """TRL in its own environment, timed on request over a pipe."""

    def __init__(self, python: Path, folder: Path, settings: dict[str, Any]) -> None:
        self.errors = folder / "errors.txt"
        script = Path(__file__).with_name("trl_side.py")
        self.process = subprocess.Popen(
            [python, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors.open("w"), text=True,
            env={**os.environ, "PYTHONPATH": "", "HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
        self.versions = self._ask(settings | {"folder": str(folder)})

    def __call__(self) -> dict[str, Any]:
        return self._ask({"steps": STEPS})

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self.process.stdin and self.process.stdout
        print(json.dumps(request), file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"TRL's side ended; its last words: {self.errors.read_text()[-3000:]}")
        return json.loads(answer)

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


def missing(python: Path | None) -> str | None:
    """Why TRL cannot run, in one sentence, or None."""
    if python is None or not python.exists():
        fault = "no environment with it was named" if python is None else f"there is no {python}"
        return f"TRL is not compared: {fault}; {INSTALL}."
    probe = "import importlib.metadata as m; m.version('trl'); m.version('torch')"
    if subprocess.run([python, "-c", probe], capture_output=True, check=False).returncode:
        return f"TRL is not compared: {python} does not have it; {INSTALL}."
    return None


def main(args: Args) -> None:
    jax.config.update("jax_platforms", "cpu")
    params, pairs = transformer.init(CONFIG, jax.random.key(0)), make_pairs()
    sides: dict[str, Run] = {"posttrain": ours(params, pairs)}
    reason, peer = missing(args.trl_python), None
    with tempfile.TemporaryDirectory() as folder:
        if reason is None and args.trl_python is not None:
            hf.save_hf(Path(folder) / "model", CONFIG, params)
            settings = {"model": f"{folder}/model", "pairs": PAIRS, "beta": BETA, "learning_rate": LEARNING_RATE}
            peer = Peer(args.trl_python, Path(folder), settings | {"data": pairs})
            sides["TRL"] = peer
        first = {name: run() for name, run in sides.items()}
        for run in sides.values():
            run()
        rates: dict[str, list[float]] = {name: [] for name in sides}
        for _ in range(args.rounds):
            for name, run in sides.items():
                rates[name].append(STEPS * PAIRS / run()["seconds"])
        if peer:
            peer.close()
    print(f"DPO step of {PAIRS} pairs, medians of {args.rounds} rounds taken in turns (jax {jax.__version__})")
    for name, values in rates.items():
        losses = f"loss of steps 1 and {STEPS}: {first[name]['loss']:.6f}, {first[name]['last_loss']:.6f}"
        print(f"{name:10} {statistics.median(values):8.2f} pairs/s   {losses}")
    if peer:
        each = [a / b for a, b in zip(rates["posttrain"], rates["TRL"], strict=True)]
        ratio = statistics.median(rates["posttrain"]) / statistics.median(rates["TRL"])
        print(
            f"ratio {ratio:.2f} (single rounds {min(each):.2f} to {max(each):.2f}); "
            f"TRL {peer.versions['trl']}, torch {peer.versions['torch']}"
        )
    if reason:
        print(reason, file=sys.stderr)


if __name__ == "__main__":
    main(tyro.cli(Args))
