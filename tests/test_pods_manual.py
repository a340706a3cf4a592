"""docs/pods.md: its commands are those that the launcher takes, and prints."""

import re
import shlex
import sys
from pathlib import Path

import pytest

from posttrain.launch import cli
from posttrain.launch.tpu import preflight

MANUAL = (Path(__file__).parent.parent / "docs/pods.md").read_text()
LINES = [line for block in re.findall(r"```sh\n(.*?)```", MANUAL, re.DOTALL) for line in block.splitlines()]
LAUNCHES = [line for line in LINES if line.startswith("posttrain launch ")]


def printed(line, monkeypatch, capsys):
    words = [*shlex.split(line), "--project", "my-project"]
    monkeypatch.setenv("XDG_STATE_HOME", "STATE")
    monkeypatch.setattr(sys, "argv", words if {"--dry-run", "--emit"} & set(words) else [*words, "--dry-run"])
    cli.main()
    return capsys.readouterr().out


@pytest.mark.parametrize("line", LAUNCHES)
def test_a_launch_of_the_manual_is_one_that_the_launcher_takes(line, monkeypatch, capsys):
    assert "gs://my-bucket/runs/" in printed(line, monkeypatch, capsys) or "--emit" in line


def test_the_printed_commands_are_those_of_the_launcher(monkeypatch, capsys):
    whole, fanned_out = (line for line in LAUNCHES if "--dry-run" in line)
    commands, lanes = re.findall(r"```text\n(.*?)```", MANUAL, re.DOTALL)
    assert printed(whole, monkeypatch, capsys) == commands
    said = printed(fanned_out, monkeypatch, capsys).splitlines()
    assert [line for line in said if line.startswith("# round")] == lanes.splitlines()


def test_the_bucket_is_made_as_the_checks_say():
    [line] = [line for line in LINES if "buckets create" in line]
    assert line.endswith(preflight.ACCESS)


def test_every_command_of_the_manual_exists(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["posttrain", "--help"])
    with pytest.raises(SystemExit):
        cli.main()
    known = set(re.findall(r"• (\w+)", capsys.readouterr().out))
    assert set(re.findall(r"posttrain ([a-z]+)", MANUAL)) <= known
