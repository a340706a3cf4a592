"""What is installed: every package and template, and only pinned requirements."""

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PINS = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]


def package_folders(folder: Path) -> set[Path]:
    """The folder and the package folders below it, by their __init__.py."""
    children = [child.parent for child in folder.glob("*/__init__.py")]
    return {folder}.union(*(package_folders(child) for child in children))


def required(names: set[str]) -> set[str]:
    """Canonical names of all distributions that posttrain with these extras installs here, itself left out."""
    wanted, seen = [("posttrain", frozenset(names))], set()
    while wanted:
        name, extras = wanted.pop()
        for line in metadata.distribution(name).requires or []:
            requirement = Requirement(line)
            applies = not requirement.marker or any(
                requirement.marker.evaluate({"extra": extra}) for extra in {"", *extras}
            )
            item = (canonicalize_name(requirement.name), frozenset(requirement.extras))
            if applies and item not in seen:
                seen.add(item)
                wanted.append(item)
    return {name for name, _ in seen}


def test_every_folder_with_an_init_is_a_listed_package():
    folders = {".".join(["posttrain", *folder.relative_to(ROOT).parts]) for folder in package_folders(ROOT)}
    assert folders == set(PROJECT["tool"]["setuptools"]["packages"])


def test_the_wheel_holds_every_module_and_template(tmp_path: Path):
    source = tmp_path / "source"
    sources = {
        file.relative_to(ROOT)
        for folder in package_folders(ROOT)
        for file in [*folder.glob("*.py"), *folder.glob("templates/*")]
    }
    for name in [*sources, "pyproject.toml", "LICENSE", PROJECT["project"].get("readme", "LICENSE")]:
        target = source / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, target)
    build = "import sys, setuptools.build_meta as b; b.build_wheel(sys.argv[1])"
    subprocess.run([sys.executable, "-c", build, str(tmp_path)], cwd=source, check=True, capture_output=True)

    [wheel] = tmp_path.glob("*.whl")
    files = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert files == {f"posttrain/{name}" for name in sources}


def test_every_pin_is_a_name_and_a_version():
    assert [
        pin for pin in PINS if not re.fullmatch(r"[a-z0-9-]+==[0-9][A-Za-z0-9.+]*( ; python_version .*)?", pin)
    ] == []


def test_everything_that_gets_installed_is_pinned():
    pinned = {pin.split("==")[0] for pin in PINS}
    assert required({"tasks", "dev"}) - pinned == set()


def test_direct_requirements_stay_few_and_without_torch():
    names = {Requirement(line).name for line in PROJECT["project"]["dependencies"]}
    assert len(names) <= 15
    assert "torch" not in names
