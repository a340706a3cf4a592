"""`posttrain convert`: a model into a Hugging Face folder, or into a model folder of ours."""

from pathlib import Path
from typing import Literal

import rich.console

from ...model import hf
from ...sharding import hosts
from ...sharding import mesh as meshes
from ...train import checkpoint
from .. import cluster

Format = Literal["hf", "posttrain"]
Dtype = Literal["float32", "bfloat16"]


def main(source: str, out: Path, *, format: Format, dtype: Dtype) -> None:
    """Load and save.

    Raises:
        ValueError: if `out` holds something, or for a dtype that the format does not have.
    """
    if format == "posttrain" and dtype != "float32":
        raise ValueError(f"--dtype {dtype} is for --format hf: models of ours are always float32")
    if out.is_dir() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty: give another --out, or delete it first")
    with cluster.joined():
        model = checkpoint.open_model(source, meshes.make_mesh())
        if format == "posttrain":
            checkpoint.save_model(out, model)
        else:
            hf.save_hf(out, model.config, model.params, dtype=dtype)
            if hosts.is_first():
                model.tokenizer.save(out)
        if hosts.is_first():
            rich.console.Console(markup=False).print(f"converted: {out}", soft_wrap=True, highlight=False)
