"""What is copied to every host: a folder with the wheel of this very commit, its pins, scripts, the user's secrets."""

import json
import re
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

from . import commands
from .spec import Spec

ROOT = Path(__file__).parents[2]
HOST = Path(__file__).parents[1] / "templates" / "host.sh"


def commit(*, dirty: bool) -> str:
    """The commit of the checkout that this package is, with a + if files differ from it.

    Raises:
        ValueError: if there is no checkout, or it has changes and `dirty` does not say that they may go along.
    """
    if not (ROOT / "pyproject.toml").is_file() or not (ROOT / "constraints.txt").is_file():
        raise ValueError(
            f"{ROOT} is not a checkout of posttrain, so that there is no commit to launch: install with "
            "`pip install -e .` from a clone"
        )
    head = _git("rev-parse", "--short=12", "HEAD").strip()
    changed = [line[3:] for line in _git("status", "--porcelain").splitlines()]
    if changed and not dirty:
        raise ValueError(
            f"{len(changed)} files differ from commit {head} ({', '.join(changed[:3])}{', ...' * (len(changed) > 3)}): "
            "commit them, so that the run can be repeated, or launch them as they are with --dirty"
        )
    return f"{head}{'+' if changed else ''}"


def _git(*words: str) -> str:
    done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(f"git cannot tell the commit of {ROOT}: {done.stderr.strip()}")
    return done.stdout


def wheel(commit: str, target: Path) -> None:
    """Build the wheel of what git knows of the checkout; its version ends with the commit.

    Raises:
        ValueError: if it cannot be built.
    """
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder)
        for name in _git("ls-files").splitlines():
            if (ROOT / name).is_file():
                (source / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / name, source / name)
        project = source / "pyproject.toml"
        local = "g" + commit.replace("+", ".dirty")
        project.write_text(
            re.sub(r'^version = "([^"+]+)"', rf'version = "\1+{local}"', project.read_text(), flags=re.M)
        )
        words = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(target), str(source)]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode or not list(target.glob("*.whl")):
        raise ValueError(f"the wheel of {ROOT} cannot be built: {done.stderr.strip()[-500:]}")


def write(spec: Spec, folder: Path, *, wheels: Path) -> Path:
    """Write the bundle below `folder`, anew; returns what `commands.copy` sends.

    The user's environment file goes along with mode 0600: its values are in no command line, label or metadata.
    """
    target = folder / "bundle" / commands.folder(spec.name)
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True, mode=0o700)
    for file in (HOST, ROOT / "constraints.txt", *wheels.glob("*.whl")):
        shutil.copy(file, target / file.name)
    (target / "run.sh").write_text(run_script(spec))
    (target / "packages.txt").write_text("".join(f"{one}\n" for one in spec.packages))
    if any(word.startswith("gs://") for word in spec.words):
        (target / "bucket-name").write_text(f"{spec.bucket}\n")
    if spec.env_file:
        secrets = target / "secrets.env"
        secrets.touch(mode=0o600)
        secrets.write_bytes(Path(spec.env_file).read_bytes())
    return target


def run_script(spec: Spec) -> str:
    """The script that becomes the program, on every host; inputs in the bucket are in the folder `bucket` beside it."""
    only = [word for name in spec.only for word in ("--only", name)]
    prefix = f"gs://{spec.bucket}/"
    given = [f"bucket/{word.removeprefix(prefix)}" if word.startswith(prefix) else word for word in spec.words]
    return f"exec {shlex.join(['.venv/bin/posttrain', 'run', spec.recipe, '--out', spec.out, *given, *only])}\n"


def check_words(spec: Spec) -> None:
    """Refuse files of this machine among the recipe's options: the hosts would look for them in vain.

    Raises:
        ValueError: with the file, and where to put it.
    """
    for word in spec.words:
        if not word.startswith("-") and ("/" in word or "." in word) and Path(word).exists():
            if spec.bucket:
                to = f"gs://{spec.bucket}/{Path(word).name}"
                remedy = f"copy it with `gcloud storage cp --recursive {shlex.quote(word)} {to}`, and give {to}"
                raise ValueError(f"{word} is on this machine, where the hosts do not see it: {remedy}")
            if not word.startswith("/"):
                raise ValueError(f"{word} is on this machine, where the hosts do not see it: put it on their disk")


def check_env_file(name: str) -> None:
    """Refuse a file that others can read, or that systemd would not read as it is meant.

    Raises:
        ValueError: which never shows a value.
    """
    path = Path(name)
    if not path.is_file():
        raise ValueError(f"--env-file {name}: there is no such file")
    if path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise ValueError(f"--env-file {name} can be read by others: run `chmod 600 {name}`")
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if line.strip() and not re.match(r"#|[A-Za-z_][A-Za-z0-9_]*=", line):
            raise ValueError(f"--env-file {name}: line {number} is not KEY=VALUE")


def settings(spec: Spec) -> str:
    """What `launch.json` in the run folder says: which run this folder is."""
    return json.dumps({"name": spec.name, "recipe": spec.recipe, "words": list(spec.words)}, indent=2) + "\n"
