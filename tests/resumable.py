"""Runs a small stage in a process of its own: `resumable.py STAGE OUT TEACHER [ACTION@EVENT]`.

Actions: kill (SIGKILL), SIGTERM, SIGINT (both as the command line handles them), full (no file may grow any more).
Events, each just before it happens: line:N, the process's Nth line of the log; rollouts:N, those of step N (from 0) are
written; saving:N, a checkpoint of step N is begun; saved:N, it becomes complete; model, the finished model is begun;
done, the stage is marked as done; cleaning, its checkpoints are deleted. STAGE/EVENT is that of one stage alone.
"""

import os
import resource
import signal
import sys
from pathlib import Path

import jax
from toy import Likes

from posttrain.data.conversations import Demonstrations
from posttrain.data.tasks import Mixture
from posttrain.launch.recipe import Training
from posttrain.model.processing import Sampling
from posttrain.sharding import mesh as meshes
from posttrain.train import metrics, stop
from posttrain.train.checkpoint import CheckpointError
from posttrain.train.compute import Compute
from posttrain.train.distill import Distill
from posttrain.train.objective import olmo
from posttrain.train.optimizer import AdamW
from posttrain.train.rl import RL
from posttrain.train.sft import SFT

STEPS = 5
COMPUTE = Compute(row_tokens=64, micro_rows=4, slots=8, save_every=1)
MIXED = Mixture(sources=(Likes(domain="north"), Likes(domain="south")), weights=(1.0, 1.0), size=16)
SHARED = {
    "start": "tiny",
    "steps": STEPS,
    "optimizer": AdamW(learning_rate=1e-3, schedule="cosine", warmup_steps=2),
    "compute": COMPUTE,
    "seed": 3,
}


def logged(out: Path) -> list[dict]:
    """The log of a stage without what the clock says."""
    return [{k: v for k, v in line.items() if k != "seconds"} for line in metrics.read(out / "metrics.jsonl")]


def stage(name: str, teacher: str) -> SFT | RL | Distill:
    """The stage of that name; `teacher` is a model other than the start."""
    if name == "sft":
        return SFT(data=Demonstrations(tasks=MIXED), batch_size=4, **SHARED)
    sampling = Sampling(max_tokens=4)
    if name == "rl":
        return RL(tasks=MIXED, sampling=sampling, prompts=2, group=4, objective=olmo(rounds=2), updates=2, **SHARED)
    return Distill(teachers={"north": teacher, "south": "tiny"}, tasks=MIXED, sampling=sampling, prompts=4, **SHARED)


class Watch:
    """An audit hook that acts, once, when the process is about to do what the event names."""

    def __init__(self, action: str, event: str) -> None:
        *stage, event = event.split("/")
        self.action, (self.event, _, number) = action, event.partition(":")
        self.folder = f"/{stage[0]}/" if stage else "/"
        self.number, self.lines, self.acted = int(number or 0), 0, False

    def __call__(self, name: str, args: tuple) -> None:
        """See `sys.addaudithook`."""
        if name in ("open", "os.mkdir", "os.rename", "shutil.rmtree") and not self.acted and self._matches(name, args):
            self.acted = True
            act(self.action)

    def _matches(self, name: str, args: tuple) -> bool:
        path, writes = str(args[1 if name == "os.rename" else 0]), name != "open" or args[1] in ("w", "a", None)
        if name == "open" and writes and path.endswith("/metrics.jsonl"):
            self.lines += 1
        here = {
            "line": ("open", "/metrics.jsonl") if self.lines == self.number else None,
            "rollouts": ("open", f"/rollouts/{self.number:06d}.jsonl"),
            "saving": ("os.mkdir", f"/checkpoints/{self.number}.orbax-checkpoint-tmp"),
            "saved": ("os.rename", f"/checkpoints/{self.number}"),
            "model": ("os.mkdir", "/model.partial"),
            "done": ("open", "/DONE"),
            "cleaning": ("shutil.rmtree", "/checkpoints"),
        }[self.event]
        found = here is not None and writes and name == here[0] and path.endswith(here[1])
        return found and self.folder in path


def act(action: str) -> None:
    """Do it to this process."""
    if action == "full":
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
    else:
        os.kill(os.getpid(), signal.SIGKILL if action == "kill" else signal.Signals[action])


def main() -> None:
    """Run the stage; the exit code is the command line's."""
    name, out, teacher, *actions = sys.argv[1:]
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    for each in actions:
        action, _, event = each.partition("@")
        sys.addaudithook(Watch(action, event))
    mesh = meshes.make_mesh(devices=jax.devices()[:1])
    try:
        with stop.listening(grace=60.0):
            Training(Path(out).parent, mesh=mesh)(Path(out).name, stage(name, teacher))
    except stop.Interrupted:
        print("Interrupted")
        sys.exit(75)
    except CheckpointError as error:
        print(f"CheckpointError: {error}")
        sys.exit(1)


if __name__ == "__main__":
    stop.leave_after(main)
