"""A DPO step beside TRL's: the same model, weights and pairs, timed in turns on one CPU.

    python benchmarks/against_trl.py --trl-python ENVIRONMENT/bin/python

See README.md for how to make that environment and what each side does.
"""

import contextlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import beside
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from beside import TRL, Peer

from posttrain.data import preferences
from posttrain.data.pack import Example, Group, pack_groups
from posttrain.model import hf, transformer
from posttrain.model.config import ModelConfig
from posttrain.train import prefer, score
from posttrain.train.step import State

CONFIG = ModelConfig(
    vocab_size=512, embed_dim=256, num_layers=4, num_heads=8, num_kv_heads=4, head_dim=32, mlp_dim=704, context=512,
    eos_ids=(0,), pad_id=0,
)  # fmt: skip
PAIRS, PROMPT, SHORTEST, LONGEST, ROW = 8, 96, 64, 128, 352
MICRO_PAIRS = 2  # of a micro-batch: what it computes stays in a CPU's cache
BETA, LEARNING_RATE, STEPS = 0.1, 1e-4, 4
Run = Callable[[], dict[str, Any]]


@dataclass(frozen=True)
class Args:
    """Compare the DPO train step with TRL's."""

    trl_python: Path | None = None
    """Interpreter of an environment with TRL; without it only this project is timed."""
    rounds: Annotated[int, tyro.conf.arg(metavar="N")] = 9
    """How often each side is timed, in turns."""
    trl_micro_pairs: Annotated[int, tyro.conf.arg(metavar="N")] = 4
    """Pairs that TRL computes at a time; 2 and 8 were slower for it."""


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
    for group in groups:
        preferences.check_fits(group, ROW)
    batch = {name: jnp.asarray(x) for name, x in pack_groups(groups, length=ROW, fields=("good",)).batch.items()}
    plain = dict(batch)
    batch["reference_logp"] = score.token_logp(CONFIG, params, plain)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(LEARNING_RATE, b2=0.999, weight_decay=0.0))
    step = jax.jit(
        prefer.train_step(CONFIG, optimizer, prefer.DPO(beta=BETA), accumulate=PAIRS // MICRO_PAIRS), donate_argnums=0
    )
    policy = jax.tree.map(jnp.copy, params)  # the step donates its state
    state = State(policy, optimizer.init(policy), jnp.zeros((), jnp.int32))

    def run() -> dict[str, Any]:
        nonlocal state
        start, losses = time.perf_counter(), []
        for _ in range(STEPS):
            state, metrics = step(state, batch)
            losses.append(metrics["loss"])
        jax.block_until_ready((state, losses))
        seconds = time.perf_counter() - start
        start = time.perf_counter()
        jax.block_until_ready(score.token_logp(CONFIG, params, plain))
        scoring = time.perf_counter() - start
        return {"seconds": seconds, "reference": scoring, "losses": [float(x) for x in losses]}

    return run


def main(args: Args) -> None:
    jax.config.update("jax_platforms", "cpu")
    params, pairs = transformer.init(CONFIG, jax.random.key(0)), make_pairs()
    sides: dict[str, Run] = {"posttrain": ours(params, pairs)}
    reason, peer = TRL.missing(args.trl_python), None
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        if reason is None and args.trl_python is not None:
            hf.save_hf(Path(folder) / "model", CONFIG, params)
            settings = {"model": f"{folder}/model", "beta": BETA, "learning_rate": LEARNING_RATE, "data": pairs}
            settings["micro_pairs"] = args.trl_micro_pairs
            peer = Peer(TRL, "trl_side.py", args.trl_python, Path(folder), settings)
            stack.callback(peer.close)
            ask = peer.ask
            sides["TRL"] = lambda: ask({"steps": STEPS})
        first = {name: run() for name, run in sides.items()}
        for run in sides.values():
            run()
        timed: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
        for _ in range(args.rounds):
            for name, run in sides.items():
                timed[name].append(run())
    rates = {name: [STEPS * PAIRS / one["seconds"] for one in found] for name, found in timed.items()}
    row = beside.ratios(rates["posttrain"], rates["TRL"]) if peer else {}
    peer_name = f"TRL {peer.versions['trl']} (torch {peer.versions['torch']})" if peer else "TRL"
    medians = {name: f"{statistics.median(values):.2f}" for name, values in rates.items()}
    cells = (f"DPO step of {PAIRS} pairs", medians["posttrain"], medians.get("TRL", "-"), *beside.spread(row))
    losses = "; ".join(f"{name} {' '.join(f'{x:.6f}' for x in one['losses'])}" for name, one in first.items())
    teacher, train = (statistics.median(x[key] for x in timed["posttrain"]) for key in ("reference", "seconds"))
    spent = {"rollout": 0.0, "verify": 0.0, "teacher": teacher, "train": train / STEPS, "sync": 0.0}
    notes = (
        f"losses of the first steps: {losses}",
        f"ours, if every pair is seen once and the reference scores it before: {beside.shares(spent)}",
    )
    heads = ("", f"posttrain (jax {jax.__version__})", peer_name, "ratio", "ratio of single rounds")
    beside.show(f"pairs per second, medians of {args.rounds} rounds taken in turns", heads, [cells], notes)
    if reason:
        print(reason, file=sys.stderr)


if __name__ == "__main__":
    main(tyro.cli(Args))
