"""`posttrain chat`: talk to a model in the terminal."""

import sys
from collections.abc import Iterator

import jax
import rich.console

from ...data import chat
from ...model import sample
from ...model.processing import Sampling
from ...sharding import mesh as meshes
from ...train import checkpoint, rollout
from ...train.checkpoint import Model
from ...train.compute import Compute


def main(path: str, *, system: str | None, sampling: Sampling, seed: int) -> None:
    """Read a message per line, answer it, keep the conversation. `/reset` begins anew, end of input leaves."""
    console = rich.console.Console(highlight=False, markup=False, stderr=True)
    mesh = meshes.make_mesh()
    with console.status(f"loading {path}"):
        model = checkpoint.open_model(path, mesh)
        model = model._replace(config=Compute().configure(model.config))
    console.print("/reset begins a new conversation, Ctrl-D leaves", style="dim")
    opening = [] if system is None else [{"role": "system", "content": system}]
    messages = list(opening)
    for turn, line in enumerate(_lines()):
        if line.strip() == "/reset":
            messages = list(opening)
            console.print("a new conversation", style="dim")
            continue
        asked = [*messages, {"role": "user", "content": line}]
        try:
            with console.status("thinking"):
                text = answer(model, asked, sampling, sample.Noise(seed=seed, step=turn), mesh)
        except ValueError as error:  # too long for the model's context, or a message that its template refuses
            console.print(f"{error} (/reset begins a new conversation)", style="red")
            continue
        print(text, flush=True)
        messages = [*asked, {"role": "assistant", "content": text}]


def answer(
    model: Model, messages: list[dict[str, str]], sampling: Sampling, noise: sample.Noise, mesh: jax.sharding.Mesh
) -> str:
    """The model's answer to a conversation."""
    prompt = chat.render(model.tokenizer, messages, add_generation_prompt=True)
    with_stops = rollout.with_stops(sampling, model)
    [[found]] = sample.generate(
        model.config, model.params, [prompt], sampling=with_stops, noise=noise, slots=1, mesh=mesh
    )
    return model.tokenizer.decode(found.tokens.tolist(), skip_special=True).strip()


def _lines() -> Iterator[str]:
    """What the user types, or what is piped in, without blank lines."""
    if sys.stdin.isatty():
        import readline  # noqa: F401  # editing and history for input()
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        if line.strip():
            yield line
