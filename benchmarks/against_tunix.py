"""SFT and generation beside google-tunix: the same model, weights and batch, timed in turns on one CPU.

    python benchmarks/against_tunix.py --tunix-python ENVIRONMENT/bin/python

See README.md for how to make that environment and what each side does.
"""

import contextlib
import json
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
from beside import TUNIX, Peer

from posttrain.data.batch import BRANCHES
from posttrain.model import sample, transformer
from posttrain.model.config import ModelConfig
from posttrain.model.processing import Sampling
from posttrain.train import sft
from posttrain.train.step import State

# google-tunix 0.1.7 computes rotary angles with base 1,000,000 whatever its config says, so the model here has that.
CONFIG = ModelConfig(
    vocab_size=512, embed_dim=256, num_layers=4, num_heads=8, num_kv_heads=4, head_dim=32, mlp_dim=704,
    rope_theta=1_000_000.0, context=512,
)  # fmt: skip
ROWS, LENGTH, STEPS = 8, 256, 4
LEARNING_RATE = 1e-4
BATCH, WIDTH, NEW = 32, 32, 64
STOPS = list(range(1, 9))  # 8 of 512 ids: a model that has learnt nothing says one every 64 tokens
NAMES = {
    "train": f"SFT step, {ROWS} x {LENGTH} tokens",
    "fixed": f"generation, {BATCH} prompts, {NEW} new tokens each",
    "ragged": f"generation, {4 * BATCH} prompts, {BATCH} at a time, 1 to {NEW} new tokens",
}
Run = Callable[[int], dict[str, Any]]


@dataclass(frozen=True)
class Args:
    """Compare the SFT train step and the sampler with google-tunix's."""

    tunix_python: Path | None = None
    """Interpreter of an environment with google-tunix; without it only this project is timed."""
    rounds: Annotated[int, tyro.conf.arg(metavar="N")] = 9
    """How often each side is timed, in turns."""
    json: bool = False
    """Print JSON instead of a table."""


def make_prompts(count: int) -> list[list[int]]:
    """Random prompts of 16 to WIDTH tokens, the longest of them WIDTH."""
    rng = np.random.default_rng(0)
    lengths = [WIDTH, *rng.integers(16, WIDTH, count - 1, endpoint=True)]
    return [rng.integers(STOPS[-1] + 1, CONFIG.vocab_size, n).tolist() for n in lengths]


def training(params: transformer.Params, tokens: np.ndarray) -> Run:
    """Times our compiled SFT step; each position predicts the next, the last of a row nothing."""
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(LEARNING_RATE, weight_decay=0.0))
    step = jax.jit(sft.train_step(CONFIG, optimizer), donate_argnums=0)
    mask = np.ones(tokens.shape, np.float32)
    mask[:, -1] = 0
    arrays = {
        "tokens": tokens,
        "targets": np.roll(tokens, -1, axis=1),
        "mask": mask,
        "segments": np.full(tokens.shape, BRANCHES, np.int32),
        "positions": np.broadcast_to(np.arange(LENGTH, dtype=np.int32), tokens.shape),
    }
    batch = {name: jnp.asarray(value) for name, value in arrays.items()}
    params = jax.tree.map(jnp.copy, params)  # the step donates its state
    state = State(params, optimizer.init(params), jnp.zeros((), jnp.int32))

    def run(_: int) -> dict[str, Any]:
        nonlocal state
        start, losses = time.perf_counter(), []
        for _ in range(STEPS):
            state, metrics = step(state, batch)
            losses.append(metrics["loss"])
        jax.block_until_ready((state, losses))
        return {"seconds": time.perf_counter() - start, "tokens": STEPS * tokens.size, "loss": float(losses[0])}

    return run


def generation(params: transformer.Params, prompts: list[list[int]], stops: list[int]) -> Run:
    """Times our engine over all prompts, BATCH of them at a time, at temperature 1."""
    sampling = Sampling(max_tokens=NEW, temperature=1.0, stop_ids=tuple(stops))

    def run(seed: int) -> dict[str, Any]:
        start = time.perf_counter()
        noise = sample.Noise(seed=seed)
        answers = sample.generate(CONFIG, params, prompts, sampling=sampling, noise=noise, slots=BATCH)
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "tokens": sum(len(answer.tokens) for [answer] in answers)}

    return run


def peer_settings(workloads: dict[str, tuple[list[list[int]], list[int]]]) -> dict[str, Any]:
    """The model and the workloads in the peer's words."""
    c = CONFIG
    model = {
        "num_layers": c.num_layers, "vocab_size": c.vocab_size, "embed_dim": c.embed_dim, "hidden_dim": c.mlp_dim,
        "num_heads": c.num_heads, "head_dim": c.head_dim, "num_kv_heads": c.num_kv_heads,
        "rope_theta": int(c.rope_theta), "norm_eps": c.norm_eps,
    }  # fmt: skip
    shape = {"batch": BATCH, "width": WIDTH, "new": NEW}
    generate = {name: {"prompts": prompts, "stops": stops, **shape} for name, (prompts, stops) in workloads.items()}
    return {"model": model, "train": {"learning_rate": LEARNING_RATE, "steps": STEPS}, "generate": generate}


def measure(sides: dict[str, Callable[[str, int], dict[str, Any]]], rounds: int) -> dict[str, Any]:
    """Per workload and side: the first call's seconds and loss, then tokens per second of every round, in turns."""
    results: dict[str, Any] = {}
    for name in NAMES:
        first = {side: run(name, 0) for side, run in sides.items()}
        for run in sides.values():
            run(name, 1)
        rates: dict[str, list[float]] = {side: [] for side in sides}
        for seed in range(2, rounds + 2):
            for side, run in sides.items():
                timed = run(name, seed)
                rates[side].append(timed["tokens"] / timed["seconds"])
        results[name] = {side: {"first": first[side], "tokens_per_second": rates[side]} for side in sides}
    return results


def summarise(results: dict[str, Any]) -> dict[str, Any]:
    """Medians, and ours over theirs: of the medians, and the extremes over single rounds."""
    summary = {}
    for name, sides in results.items():
        row = {}
        for side, got in sides.items():
            row[side] = statistics.median(got["tokens_per_second"])
            row[f"{side}_first_call_seconds"] = got["first"]["seconds"]
            if "loss" in got["first"]:
                row[f"{side}_first_loss"] = got["first"]["loss"]
        if "theirs" in sides:
            row |= beside.ratios(*(sides[side]["tokens_per_second"] for side in ("ours", "theirs")))
        summary[name] = row
    return summary


def show(summary: dict[str, Any], versions: dict[str, str] | None, rounds: int) -> None:
    """The table that people read."""
    peer = f"google-tunix {versions['tunix']} (jax {versions['jax']})" if versions else "google-tunix"
    heads = ("workload", f"posttrain (jax {jax.__version__})", peer, "ratio", "ratio of single rounds")
    rows, notes = [], []
    for name, row in summary.items():
        theirs = f"{row['theirs']:,.0f}" if versions else "-"
        rows.append((NAMES[name], f"{row['ours']:,.0f}", theirs, *beside.spread(row)))
    for side in ("ours", "theirs") if versions else ("ours",):
        loss = summary["train"][f"{side}_first_loss"]
        calls = ", ".join(f"{name} {row[f'{side}_first_call_seconds']:.1f} s" for name, row in summary.items())
        notes.append(f"{side}: loss of the first step {loss:.6f}; first calls, with compiling: {calls}")
    beside.show(f"tokens per second, medians of {rounds} rounds taken in turns", heads, rows, notes)


def main(args: Args) -> None:
    jax.config.update("jax_platforms", "cpu")
    params = transformer.init(CONFIG, jax.random.key(0))
    tokens = np.random.default_rng(1).integers(1, CONFIG.vocab_size, (ROWS, LENGTH)).astype(np.int32)
    workloads = {"fixed": (make_prompts(BATCH), []), "ragged": (make_prompts(4 * BATCH), STOPS)}
    runs = {"train": training(params, tokens)}
    runs |= {name: generation(params, *workload) for name, workload in workloads.items()}
    sides: dict[str, Callable[[str, int], dict[str, Any]]] = {"ours": lambda name, seed: runs[name](seed)}
    reason, versions = TUNIX.missing(args.tunix_python), None
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        if reason is None and args.tunix_python is not None:
            flat = jax.tree_util.tree_leaves_with_path(params)
            weights = {jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(x) for path, x in flat}
            np.savez(Path(folder, "weights.npz"), **weights)  # pyright: ignore[reportArgumentType]
            np.savez(Path(folder, "batch.npz"), tokens=tokens)
            peer = Peer(TUNIX, "tunix_side.py", args.tunix_python, Path(folder), peer_settings(workloads))
            stack.callback(peer.close)
            versions, sides["theirs"] = peer.versions, lambda name, seed: peer.ask({"run": name, "seed": seed})
        results = measure(sides, args.rounds)
    summary = summarise(results)
    if args.json:
        note = {"skipped": reason} if reason else {"versions": versions}
        print(json.dumps({**note, "rounds": args.rounds, "summary": summary, "results": results}, indent=2))
    else:
        show(summary, versions, args.rounds)
    if reason:
        print(reason, file=sys.stderr)


if __name__ == "__main__":
    main(tyro.cli(Args))
