"""The walls between the layers, held by reading the source: who may import what, and which file has which power."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYERS = {  # folder -> the folders below it; data never imports jax, so it does not reach into sharding either
    "sharding": set(),
    "model": {"sharding"},
    "data": set(),
    "train": {"model", "data", "sharding"},
    "launch": {"train", "model", "data", "sharding"},
}
LIBRARIES = {"flax": "model/", "orbax": "train/checkpoint.py", "argparse": "launch/", "tyro": "launch/"}
POWERS = {  # last part of a dotted name -> the one place that may use it; a process has a command line of its own
    "PartitionSpec": "sharding/rules.py",
    "value_and_grad": "train/step.py",
    "argv": ("launch/", "data/verify/worker.py", "data/sandbox/inside.py"),
    # A key's value must not travel through settings; how many threads XLA starts is told in no other way.
    "environ": ("launch/", "data/endpoint.py", "sharding/mesh.py"),
    "getenv": "launch/",
}
ALIASES = {"jax.P": "jax.sharding.PartitionSpec", "jax.grad": "jax.value_and_grad"}


def imports(tree: ast.AST, package: list[str]) -> set[str]:
    """Full dotted names of what a module of the package imports, relative imports resolved."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            base = [*base, node.module] if node.module else base
            names |= {".".join([*base, alias.name]) for alias in node.names}
    return names


def offences(path: str, source: str) -> list[str]:
    """What a file of the package (path relative to the root) imports or uses although it must not."""
    tree, package = ast.parse(source), ["posttrain", *path.split("/")[:-1]]
    imported = imports(tree, package)
    used = imported | {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    used = {ALIASES.get(name, name) for name in used}
    ours = {name.removeprefix("posttrain.") for name in imported if name.startswith("posttrain.")}
    libraries = {name.split(".")[0] for name in imported} - {"posttrain"}
    layer = package[1] if len(package) > 1 else ""

    wrong = {name for name in ours if layer and name.split(".")[0] not in LAYERS[layer] | {layer}}
    wrong |= {name for name in libraries if name in LIBRARIES and not path.startswith(LIBRARIES[name])}
    wrong |= {
        name
        for name in used
        if (last := name.split(".")[-1]) in POWERS and "." in name and not path.startswith(POWERS[last])
    }
    if layer == "data":
        wrong |= libraries & {"jax", "jaxlib"}
    if path.startswith("train/losses/"):
        wrong |= {name for name in ours if not name.startswith("train.losses")}
        wrong |= libraries - {"jax", "jaxtyping"} - sys.stdlib_module_names
    return sorted(f"{path}: {name}" for name in wrong)


def test_every_file_keeps_to_its_layer():
    files = [ROOT / "__init__.py", *(file for layer in LAYERS for file in (ROOT / layer).rglob("*.py"))]
    assert len(files) > len(LAYERS)
    assert [offence for file in files for offence in offences(str(file.relative_to(ROOT)), file.read_text())] == []


@pytest.mark.parametrize(
    ("path", "source", "offence"),
    [
        ("sharding/mesh.py", "from ..model import config", "model.config"),
        ("model/layers.py", "from ..data.batch import Batch", "data.batch.Batch"),
        ("model/layers.py", "import posttrain.train.step", "train.step"),
        ("data/pack.py", "from .. import train", "train"),
        ("data/verify/maths.py", "from ...sharding import rules", "sharding.rules"),
        ("train/sft.py", "def f():\n    from ..launch import recipe", "launch.recipe"),
        ("data/source.py", "import jax.numpy as jnp", "jax"),
        ("train/losses/policy.py", "from ..step import State", "train.step.State"),
        ("train/losses/policy.py", "import optax", "optax"),
        ("train/losses/policy.py", "import numpy as np", "numpy"),
        ("train/sft.py", "from flax import linen as nn", "flax"),
        ("train/loop.py", "import orbax.checkpoint as ocp", "orbax"),
        ("train/step.py", "import argparse", "argparse"),
        ("data/chat.py", "import tyro", "tyro"),
        ("sharding/mesh.py", "from jax.sharding import PartitionSpec as P", "jax.sharding.PartitionSpec"),
        ("model/moe.py", "import jax\nx = jax.sharding.PartitionSpec('data')", "jax.sharding.PartitionSpec"),
        ("model/moe.py", "import jax\nx = jax.P('data')", "jax.sharding.PartitionSpec"),
        ("train/rl.py", "import jax\ng = jax.value_and_grad(f)", "jax.value_and_grad"),
        ("train/rl.py", "from jax import grad", "jax.value_and_grad"),
        ("train/loop.py", "import os\nx = os.environ['HOME']", "os.environ"),
        ("data/sandbox.py", "from os import getenv", "os.getenv"),
        ("model/hf.py", "import sys\nx = sys.argv[1]", "sys.argv"),
    ],
)
def test_an_import_or_a_power_out_of_place_is_reported(path: str, source: str, offence: str):
    assert offences(path, source) == [f"{path}: {offence}"]


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("__init__.py", "import jax"),
        ("sharding/rules.py", "from jax.sharding import PartitionSpec"),
        (
            "model/layers.py",
            "from flax import linen as nn\nfrom ..sharding import mesh\nfrom .config import ModelConfig",
        ),
        (
            "train/losses/policy.py",
            "import math\nimport jax.numpy as jnp\nfrom jaxtyping import Array\nfrom . import kl",
        ),
        ("train/step.py", "import jax\ng = jax.value_and_grad(f)"),
        ("train/checkpoint.py", "import orbax.checkpoint as ocp"),
        ("launch/recipes/mopd.py", "import os\nfrom ...train import sft\nfrom ..recipe import Run\nx = os.environ"),
    ],
)
def test_what_the_design_allows_is_not_reported(path: str, source: str):
    assert offences(path, source) == []
