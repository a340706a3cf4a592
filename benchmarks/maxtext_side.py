"""The peer's half of against_maxtext.py: MaxText's `train_compile`, and what the compiler says of its step.

Run by against_maxtext.py with the interpreter of an environment that has MaxText; takes what `train_compile`
takes, which prints neither the peak nor any version. This prints them as one line of JSON, the last.
"""
# pyright: reportMissingImports=none

import json
import sys
from importlib import metadata
from typing import Any

import jax
from maxtext.trainers.pre_train import train_compile

seen: list[Any] = []
original = jax.stages.Compiled.memory_analysis


def memory_analysis(self: Any) -> Any:
    """The compiler's answer, kept on its way."""
    seen.append(original(self))
    return seen[-1]


if __name__ == "__main__":
    jax.stages.Compiled.memory_analysis = memory_analysis
    train_compile.main(sys.argv)
    versions = {name: metadata.version(name) for name in ("maxtext", "jax", "libtpu")}
    names = ("argument_size_in_bytes", "temp_size_in_bytes", "peak_memory_in_bytes")
    print(json.dumps({"versions": versions} | {name: getattr(seen[-1], name) for name in names}))
