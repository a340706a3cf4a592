"""A step of GRPO beside google-tunix's: the same model, prompts, lengths and group, in turns on one CPU.

    python benchmarks/against_tunix_grpo.py --tunix-python ENVIRONMENT/bin/python

Prints seconds a step and, of ours, how they are shared among rollouts, verdicts, scoring and training. README.md says
what each side does.
"""

import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import beside
import jax
import numpy as np
import tyro
from beside import TUNIX

from posttrain.data import chat
from posttrain.data import tokenizer as tokenizers
from posttrain.data.arithmetic import Arithmetic
from posttrain.model import transformer
from posttrain.model.config import ModelConfig
from posttrain.model.processing import Sampling
from posttrain.sharding import mesh as meshes
from posttrain.train import checkpoint, metrics, objective
from posttrain.train.compute import Compute
from posttrain.train.optimizer import AdamW
from posttrain.train.rl import RL

TOKENIZER = tokenizers.tiny()
# google-tunix 0.1.7 computes rotary angles with base 1,000,000 whatever its config says, so the model here has that.
CONFIG = ModelConfig(
    vocab_size=TOKENIZER.vocab_size + 1, embed_dim=256, num_layers=4, num_heads=8, num_kv_heads=4, head_dim=32,
    mlp_dim=704, rope_theta=1_000_000.0, context=512, eos_ids=TOKENIZER.eos_ids, pad_id=TOKENIZER.vocab_size,
)  # fmt: skip
TASKS = Arithmetic(digits=2, operations=("+",))
PROMPTS, GROUP, NEW, LEARNING_RATE, KL = 8, 8, 64, 1e-5, 0.04
WARMUP = 3
ROW = 312  # the longest prompt with four of the longest answers; attention in longer rows shows on a CPU


@dataclass(frozen=True)
class Args:
    """Compare a GRPO step, from prompts to updated weights, with google-tunix's."""

    tunix_python: Path | None = None
    """Interpreter of an environment with google-tunix; without it only this project is timed."""
    steps: Annotated[int, tyro.conf.arg(metavar="N")] = 10
    """Steps that are timed in each run, after three that are not."""
    rounds: Annotated[int, tyro.conf.arg(metavar="N")] = 2
    """How often each side is run, in turns."""
    json: bool = False
    """Print JSON instead of a table."""


@dataclass(frozen=True, kw_only=True)
class Timed(RL):
    """RL that notes when each step begins."""

    def behavior(self, params: Any, step: int) -> Any:
        """The policy's weights, once they are there."""
        jax.block_until_ready(params)
        BEGAN.append(time.perf_counter())
        return params


BEGAN: list[float] = []


def ours(folder: Path, steps: int) -> dict[str, Any]:
    """Seconds of each step, and by phase, of the RL stage."""
    BEGAN.clear()
    stage = Timed(
        start=str(folder / "start"), tasks=TASKS, steps=steps + WARMUP + 1, prompts=PROMPTS, group=GROUP,
        sampling=Sampling(max_tokens=NEW), objective=objective.grpo(kl_weight=KL),
        optimizer=AdamW(learning_rate=LEARNING_RATE),
        compute=Compute(row_tokens=ROW, micro_rows=8, slots=PROMPTS * GROUP, save_every=10_000),
    )  # fmt: skip
    out = folder / f"ours-{time.monotonic_ns()}"
    stage.train(out, meshes.make_mesh(devices=jax.devices()[:1]))
    lines = metrics.read(out / "metrics.jsonl")[WARMUP:-1]
    phases: dict[str, float] = defaultdict(float)
    for line in lines:
        for name, seconds in line["seconds"].items():
            phases[name] += seconds / len(lines)
    tokens = [line["response_tokens"] for line in lines]
    return {"seconds": np.diff(BEGAN)[WARMUP:].tolist(), "phases": dict(phases), "tokens": float(np.mean(tokens))}


def theirs(python: Path, folder: Path, steps: int) -> dict[str, Any]:
    """The same of google-tunix's learner, in a process of its own."""
    prompts = [chat.render(TOKENIZER, TASKS[i].messages, add_generation_prompt=True) for i in range(PROMPTS * 32)]
    c = CONFIG
    request = {
        "model": {
            "num_layers": c.num_layers, "vocab_size": c.vocab_size, "embed_dim": c.embed_dim, "hidden_dim": c.mlp_dim,
            "num_heads": c.num_heads, "head_dim": c.head_dim, "num_kv_heads": c.num_kv_heads,
            "rope_theta": int(c.rope_theta), "norm_eps": c.norm_eps,
        },
        "weights": str(folder / "weights.npz"), "prompts": prompts, "batch": PROMPTS, "group": GROUP, "new": NEW,
        "width": 1 << (max(map(len, prompts)) - 1).bit_length(), "stops": list(c.eos_ids), "pad": c.pad_id,
        "learning_rate": LEARNING_RATE, "kl": KL, "steps": steps, "warmup": WARMUP,
    }  # fmt: skip
    script = Path(__file__).with_name("tunix_grpo_side.py")
    done = subprocess.run([python, script], input=json.dumps(request), capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the google-tunix side ended; its last words: {done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def show(summary: dict[str, Any], steps: int, rounds: int) -> None:
    """The table that people read."""
    what = f"{PROMPTS} prompts x {GROUP} answers of at most {NEW} tokens, KL {KL}"
    rows = [
        (side, f"{row['seconds']:.2f}", f"{row['rate']:.0f}", f"{row['tokens']:.0f}")
        for side, row in summary.items()
        if side != "ratio"
    ]
    notes = [f"ours / theirs, tokens a second: {summary['ratio']:.2f}"] if "ratio" in summary else []
    phases = summary["ours"]["phases"]
    spent = {name: phases.pop(name, 0.0) for name in ("rollout", "verify", "teacher", "train", "sync")}
    notes.append("ours: " + beside.shares({**spent, "other": sum(phases.values())}))
    heads = ("", "seconds a step", "tokens of answers a second", "answer's mean length")
    beside.show(f"GRPO step: {what}; medians of {rounds} x {steps} steps", heads, rows, notes)


def main(args: Args) -> None:
    """Run both sides in turns."""
    jax.config.update("jax_platforms", "cpu")
    params = transformer.init(CONFIG, jax.random.key(0))
    reason = TUNIX.missing(args.tunix_python)
    runs: dict[str, list[dict[str, Any]]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as temporary, contextlib.redirect_stdout(sys.stderr):
        folder = Path(temporary)
        checkpoint.save_model(folder / "start" / "model", checkpoint.Model(CONFIG, params, TOKENIZER))
        flat = jax.tree_util.tree_leaves_with_path(params)
        weights = {jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(x) for path, x in flat}
        np.savez(folder / "weights.npz", **weights)  # pyright: ignore[reportArgumentType]
        for _ in range(args.rounds):
            runs["ours"].append(ours(folder, args.steps))
            if reason is None and args.tunix_python is not None:
                runs["theirs"].append(theirs(args.tunix_python, folder, args.steps))
    summary: dict[str, Any] = {}
    for side, found in runs.items():
        seconds = statistics.median(x for one in found for x in one["seconds"])
        tokens = statistics.mean(one["tokens"] for one in found)
        rate = PROMPTS * GROUP * tokens / seconds
        summary[side] = {"seconds": seconds, "rate": rate, "tokens": tokens, "phases": found[-1].get("phases", {})}
    if "theirs" in summary:
        summary["ratio"] = summary["ours"]["rate"] / summary["theirs"]["rate"]
    if args.json:
        print(json.dumps({"summary": summary, "runs": runs}, indent=2))
    else:
        show(summary, args.steps, args.rounds)
    if reason:
        print(reason, file=sys.stderr)


if __name__ == "__main__":
    main(tyro.cli(Args))
