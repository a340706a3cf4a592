"""One of several processes that run a small recipe of every kind of stage: `pod.py OUT [ACTION@EVENT]`.

The environment says which process it is (see `launch.cluster`). Events are those of `resumable`; `check:N`, the Nth
time that this process might stop; and `compile:N`, its Nth compilation begins. Another action is `hang`.
"""

import functools
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import compiled_once
import jax
from resumable import MIXED, Watch, act
from toy import Likes

from posttrain.data.conversations import Demonstrations
from posttrain.launch import cli
from posttrain.launch.commands import run as command
from posttrain.launch.recipe import Run
from posttrain.model.processing import Sampling
from posttrain.train import loop, rollout, stop
from posttrain.train.compute import Compute
from posttrain.train.convert import Convert
from posttrain.train.distill import Distill
from posttrain.train.evaluate import Evaluate
from posttrain.train.merge import Linear
from posttrain.train.optimizer import AdamW
from posttrain.train.rl import RL
from posttrain.train.sft import SFT

COMPILE = "/jax/compilation_cache/compile_requests_use_cache"
"""What JAX notes before it looks for a program among those that it has compiled, or compiles it."""
SAMPLING = Sampling(max_tokens=4)
SHARED = {
    "steps": 4,
    "optimizer": AdamW(learning_rate=1e-3),
    "compute": Compute(row_tokens=64, micro_rows=4, slots=8, save_every=1),
    "seed": 3,
}


def recipe(run: Run) -> str:
    """Every kind of stage once."""
    first = run("sft", SFT(start="tiny", data=Demonstrations(tasks=MIXED), batch_size=5, **SHARED))
    second = run("rl", RL(start=first, tasks=MIXED, sampling=SAMPLING, prompts=2, group=4, **SHARED))
    merged = run("merge", Linear(models=(first, second)))
    tasks = (Likes(domain="north"), Likes(domain="south"))
    run("eval", Evaluate(model=merged, tasks=tasks, sampling=SAMPLING, limit=5, compute=SHARED["compute"]))
    teachers = {"north": second, "south": merged}
    student = run(
        "distill", Distill(start=first, teachers=teachers, tasks=MIXED, sampling=SAMPLING, prompts=4, **SHARED)
    )
    return run("convert", Convert(source=student))


def at(number: int, action: str) -> Callable[[], bool]:
    """What does something the Nth time that it is called, and says whether it has."""
    passed = iter(range(1, sys.maxsize))

    def call() -> bool:
        if next(passed) != number:
            return False
        if action == "hang":
            threading.Event().wait()
        act(action)
        return True

    return call


def act_at_check(number: int, action: str) -> None:
    """Have this process do something in the middle of its work, where it looks whether it has to stop."""
    is_time = at(number, action)

    def check() -> None:
        is_time()
        stop.check_stop()

    loop.check_stop = rollout.check_stop = check


def act_at_compile(number: int, action: str) -> None:
    """Have it do something in the middle of a compilation that takes twice as long as a stop waits for it."""
    is_time = at(number, action)

    def compiles(event: str, **_: Any) -> None:
        if event == COMPILE and is_time():
            time.sleep(2 * stop.LOSSLESS_SECONDS)

    jax.monitoring.register_event_listener(compiles)


def main(recipe: Callable[[Run], str]) -> None:
    """Run the recipe as the command line does."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    compiled_once.share()
    loop.PACE_STEPS = 2  # the stages are short
    out, *events = sys.argv[1:]
    for each in events:
        action, _, event = each.partition("@")
        kind, _, number = event.partition(":")
        if kind in ("check", "compile"):
            (act_at_check if kind == "check" else act_at_compile)(int(number), action)
        else:
            sys.addaudithook(Watch(action, event))
    watch = command.Watch(profile=range(0), grace=60.0, stuck_after=float(os.environ.get("STUCK_AFTER", "600")))
    work = functools.partial(command.train, recipe, out, smoke=False, options={}, watch=watch)
    stop.leave_after(lambda: cli.guarded(work, ["run", "pod"]))


if __name__ == "__main__":
    main(recipe)
