"""`posttrain launch` and its companions: what is told before anything is created, what is printed, what is sent."""

import json
import runpy
import shlex
import signal
import sys
from pathlib import Path

import fake_cloud
import pytest
import yaml

from posttrain.launch import cli
from posttrain.launch.commands import launch
from posttrain.launch.recipes import mopd, sft
from posttrain.launch.tpu import bundle, commands, driver, record, sequence, session
from posttrain.launch.tpu import spec as specs
from posttrain.launch.tpu.lifecycle import Action

GOLDEN = Path(__file__).parent / "golden"
DENIED = "[me@example.com] does not have permission to access b instance [bucket] (or it may not exist)"
WORDS = [
    "launch",
    "sft",
    "--model",
    "tiny",
    "--tpu",
    "v6e-16",
    "--zone",
    "us-east5-b",
    "--out",
    "gs://bucket/runs/first",
]


@pytest.fixture
def cloud(tmp_path, monkeypatch):
    monkeypatch.setattr(bundle, "commit", lambda dirty: "0123456789ab")
    monkeypatch.setattr(bundle, "wheel", lambda commit, target: target.mkdir())
    monkeypatch.chdir(tmp_path)
    return fake_cloud.FakeCloud(tmp_path, monkeypatch)


@pytest.fixture
def posttrain(monkeypatch, capsys):
    """Run the command in this process: words -> (exit code, stdout, stderr)."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["posttrain", *words])
        capsys.readouterr()
        try:
            cli.main()
            code = 0
        except SystemExit as error:
            code = error.code
        return code, *capsys.readouterr()

    yield call
    assert before == {number: signal.getsignal(number) for number in before}


def test_the_commands_of_a_launch_are_those_of_the_golden_file():
    made = runpy.run_path(str(GOLDEN / "launch_commands.py"))["text"]()
    assert made == (GOLDEN / "launch_commands.txt").read_text()


def test_what_is_printed_is_what_is_called(cloud):
    """A dry run shows the very calls of a launch that meets no trouble, in their order."""
    cloud.plays(lives=[{"states": ["ACTIVE"], "looks": ["ended 0"]}])
    one = fake_cloud.spec()
    session.launch(one, "runs/first", cloud.world, dirty=False)
    kept = record.load("first")
    parts = sequence.parts(one, launch=kept.launch, folder=str(kept.folder), fetch="runs/first")
    shown = [["gcloud", *words] for words in ([*command.argv[1:]] for part in parts for command in part.commands)]
    called = [["gcloud", *words] for words in cloud.calls()]
    position = -1
    for command in shown:
        assert command in called[position + 1 :], shlex.join(command)
        position = called.index(command, position + 1)


def test_a_dry_run_needs_no_gcloud_and_leaves_nothing(posttrain, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    code, stdout, _ = posttrain(*WORDS, "--project", "my-project", "--spot", "--dry-run")
    assert (code, list(tmp_path.iterdir())) == (0, [])
    assert "gcloud compute tpus queued-resources create first --node-id first --accelerator-type=v6e-16" in stdout
    assert "exec .venv/bin/posttrain run sft --out gs://bucket/runs/first --model tiny" in stdout


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"name": "First_Run"}, "the name 'First_Run' would be refused by Google Cloud: give --name with lower-case"),
        ({"name": "a" * 64}, "has 64 characters, at most 63"),
        ({"name": "a" * 62, "slices": 4}, "has 62 characters, at most 61"),
        ({"tpu": "v5e-16"}, "the Cloud TPU API spells v5e as v5litepod: give --tpu v5litepod-16"),
        ({"tpu": "v5litepod-24"}, "there is no accelerator 'v5litepod-24': choose one of v5litepod-1"),
        ({"tpu": "v2-8", "slices": 2}, "v2 slices cannot be joined to --slices 2"),
        ({"tpu": "tpu7x-128"}, "tpu7x \\(Ironwood\\) is not in the Cloud TPU API, only in Google Kubernetes Engine"),
        ({"tpu": "v6e-16", "slices": 0}, "--slices 0"),
        ({"zones": ()}, "--zone is missing"),
        ({"zones": ("us-east5",)}, "--zone 'us-east5' is not the name of a zone: .* \\(not a region\\)"),
        ({"project": "My Project"}, "--project 'My Project' is not the id of a project"),
        ({"out": "runs/first"}, "--out 'runs/first' is a folder of this machine"),
        ({"out": "gs://bucket"}, "give a folder in a bucket"),
        (
            {"words": ("--model", "gs://other/m")},
            "'gs://other/m' is not in the bucket of --out 'gs://bucket/runs/first'",
        ),
        ({"reservation": "ours"}, "--reservation 'ours' goes with --reserved, not with spot capacity"),
        ({"capacity": "flex", "hours": 200.0}, "flex-start capacity lasts from 1 to 168 hours"),
    ],
)
def test_what_google_cloud_would_refuse_is_one_sentence(fields, sentence):
    with pytest.raises(ValueError, match=sentence):
        specs.check(fake_cloud.spec(**fields))


@pytest.mark.parametrize(
    ("scenario", "sentence"),
    [
        ({"accounts": []}, "account: gcloud is not logged in: run `gcloud auth login`"),
        ({"enabled": False}, "it is off in project my-project: run `gcloud services enable tpu.googleapis.com"),
        ({"types": {"us-east5-b": ["v5p-8"]}}, "there is no v6e-16 in us-east5-b: see what it has with `gcloud"),
        (
            {"quotas": [{"quotaId": "TPUV6EPreemptiblePerProjectPerZoneForTPUAPI", "dimensionsInfos": [
                {"dimensions": {"zone": "us-east5-b"}, "details": {"value": "0"}}]}]},
            "TPUV6EPreemptiblePerProjectPerZoneForTPUAPI is 0 in us-east5-b, 16 chips are asked for",
        ),
        ({"bucket": {"refused": DENIED}}, "gs://bucket cannot be read: create it with `gcloud storage buckets create"),
        ({"bucket": {"read_only": True}}, "gs://bucket/runs/first cannot be written"),
    ],
)  # fmt: skip
def test_what_is_missing_in_the_project_is_told_before_anything_is_created(cloud, scenario, sentence):
    with pytest.raises(ValueError, match=sentence):
        session.launch(fake_cloud.spec(), "runs/first", cloud.plays(**scenario).world, dirty=False)
    assert (cloud.calls("create"), record.every()) == ([], [])


def test_a_machine_without_gcloud_is_told_to_install_it(posttrain, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    code, _, stderr = posttrain(*WORDS)
    assert (code, stderr.startswith("posttrain: gcloud is not on the PATH: install the Google Cloud CLI")) == (2, True)


def test_a_name_in_use_with_other_settings_is_told(cloud):
    cloud.plays()
    driver.drive(cloud.launch(), cloud.world_with("interrupt", after=Action.FOLLOW))
    calls = len(cloud.calls())
    with pytest.raises(ValueError, match="name: first is launched with other settings \\(tpu: 'v6e-16' -> 'v6e-32'\\)"):
        session.launch(fake_cloud.spec(tpu="v6e-32"), "runs/first", cloud.world, dirty=False)
    assert len(cloud.calls()) == calls


def test_a_run_folder_with_another_run_is_told(cloud):
    file = cloud.plays().folder / "bucket/bucket/runs/first/launch.json"
    file.parent.mkdir(parents=True)
    file.write_text(bundle.settings(fake_cloud.spec(words=("--model", "smollm2"))))
    with pytest.raises(ValueError, match="holds a run with other settings .*'smollm2'.*: give another --out"):
        session.launch(fake_cloud.spec(), "runs/first", cloud.world, dirty=False)
    assert cloud.calls("create") == []


def test_no_command_label_or_record_shows_a_secret(cloud, tmp_path):
    secret = tmp_path / "secrets"
    secret.write_text("HF_TOKEN=hf_canary\n")
    with pytest.raises(ValueError, match="can be read by others: run `chmod 600") as raised:
        bundle.check_env_file(str(secret))
    assert "canary" not in str(raised.value)
    secret.chmod(0o600)
    bundle.check_env_file(str(secret))
    cloud.plays(lives=[{"looks": ["ended 0"]}])
    session.launch(fake_cloud.spec(env_file=str(secret)), "runs/first", cloud.world, dirty=False)
    holding = [
        file for file in tmp_path.rglob("*") if file.is_file() and file != secret and b"canary" in file.read_bytes()
    ]
    assert [(file.name, oct(file.stat().st_mode)[-3:]) for file in holding] == [("secrets.env", "600")]


def test_a_file_of_this_machine_is_told_where_to_go(posttrain, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("chats.jsonl").write_text("{}\n")
    code, _, stderr = posttrain(*WORDS, "--data", "chats.jsonl", "--project", "my-project", "--dry-run")
    assert (code, "`gcloud storage cp --recursive chats.jsonl gs://bucket/chats.jsonl`" in stderr) == (2, True)


def test_options_reach_the_hosts_as_they_were_given():
    options = {"base": "tiny", "objective": "both", "outcome": 0.5}
    assert launch.words(mopd.recipe, options) == ("--base", "tiny", "--objective", "both", "--outcome", "0.5")
    given = {"model": "a b; rm -rf /", "data": ("gs://b/x.jsonl", "y"), "steps": 1000}
    given |= {"batch_size": 128, "learning_rate": 1e-5, "row_tokens": 4096, "micro_rows": 4}
    words = launch.words(sft.recipe, given)
    assert words == ("--model", "a b; rm -rf /", "--data", "gs://b/x.jsonl", "y")  # defaults stay away
    script = bundle.run_script(fake_cloud.spec(words=words))
    assert shlex.split(script)[-5:] == [words[0], words[1], "--data", "gs://b/x.jsonl", "y"]  # quoted once, for bash
    in_bucket = fake_cloud.spec(words=("--model", "gs://bucket/models/a b"))
    assert bundle.run_script(in_bucket).endswith("--out gs://bucket/runs/first --model 'bucket/models/a b'\n")


def test_the_companions_work_from_the_record(cloud, posttrain):
    cloud.plays(lives=[{"looks": ["running 0"]}])
    assert posttrain("ls")[1].startswith("no launches were made from this machine")
    driver.drive(cloud.launch(), cloud.world_with("interrupt", after=Action.FOLLOW))
    assert posttrain("ls")[1].splitlines()[1].split() == [
        "first", "sft", "v6e-16", "us-east5-b", "quit", "yes", "0", "gs://bucket/runs/first"
    ]  # fmt: skip
    _, shown, _ = posttrain("status", "first")
    assert "cloud: ACTIVE" in shown
    assert shown.count("running") == 4
    assert "step 0" in posttrain("logs", "first")[1]
    code, doctor, _ = posttrain("doctor", "first")
    assert (code, "✓ hosts: 4 of 4 answer" in doctor) == (0, True)
    code, said, _ = posttrain("stop", "first")
    assert (code, cloud.resources) == (0, {})
    assert "first: stopped; nothing is left of it in the cloud" in said
    assert posttrain("ls")[1].splitlines()[1].split()[4:6] == ["stopped", "no"]
    assert posttrain("status", "second")[2].startswith("posttrain: no launch 'second' was made from this machine")


def test_a_launch_that_is_followed_elsewhere_is_not_driven_twice(cloud, posttrain):
    from posttrain.launch import lock

    one = cloud.plays().launch()
    with lock.held(one.folder):
        code, _, stderr = posttrain("attach", "first")
    assert (code, "see what it does with `posttrain status first`" in stderr) == (2, True)
    assert cloud.calls() == []


def test_the_wheel_is_that_of_the_commit(tmp_path, monkeypatch):
    monkeypatch.undo()
    commit = bundle.commit(dirty=True)
    bundle.wheel(commit, tmp_path)
    [wheel] = tmp_path.glob("*.whl")
    assert wheel.name.startswith(f"posttrain-0.1.0+g{commit.replace('+', '.dirty')}-py3")
    target = bundle.write(fake_cloud.spec(), tmp_path, wheels=tmp_path)
    names = {"host.sh", "run.sh", "constraints.txt", "packages.txt", wheel.name}
    assert (target.name, {file.name for file in target.iterdir()}) == (commands.folder("first"), names)
    assert json.loads(bundle.settings(fake_cloud.spec()))["words"] == ["--model", "tiny"]


def emitted(posttrain, *words):
    project = ("--project", "my-project", "--out", "gs://my-bucket/runs/first")
    return posttrain("launch", "sft", "--model", "gs://my-bucket/a b", *project, *words)


def test_tpu7x_runs_as_a_jobset(posttrain):
    code, text, _ = emitted(posttrain, "--tpu", "tpu7x:4x4x4", "--slices", "2", "--emit", "jobset", "--image", "i:1")
    found = yaml.safe_load(text)
    [job] = found["spec"]["replicatedJobs"]
    pod = job["template"]["spec"]["template"]["spec"]
    assert (code, job["replicas"], job["template"]["spec"]["completions"]) == (0, 2, 16)
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu7x", "cloud.google.com/gke-tpu-topology": "4x4x4",
    }  # fmt: skip
    [program] = pod["containers"]
    assert program["command"] == [
        "posttrain",
        "run",
        "sft",
        "--out",
        "gs://my-bucket/runs/first",
        "--model",
        "/bucket/a b",
    ]
    assert program["resources"]["limits"] == {"google.com/tpu": 4}
    assert pod["volumes"][0]["csi"]["volumeAttributes"]["bucketName"] == "my-bucket"


def test_xpk_and_skypilot_get_the_same_program(posttrain):
    _, line, _ = emitted(posttrain, "--tpu", "tpu7x:4x4x4", "--emit", "xpk", "--image", "i:1", "--cluster", "c")
    words = shlex.split(line)
    assert words[:5] == ["xpk", "workload", "create", "--cluster", "c"]
    assert "--tpu-type=tpu7x-128" in words  # JAX devices, two a chip
    program = "posttrain run sft --out gs://my-bucket/runs/first --model '/bucket/a b'"
    assert words[-1] == program
    _, text, _ = emitted(posttrain, "--tpu", "v6e-16", "--zone", "us-east5-b", "--spot", "--emit", "skypilot")
    found = yaml.safe_load(text)
    assert found["run"] == f"exec ~/posttrain/bin/{program}\n"
    assert (found["resources"]["accelerators"], found["resources"]["use_spot"]) == ("tpu-v6e-16", True)
    assert emitted(posttrain, "--tpu", "tpu7x:4x4x4", "--emit", "skypilot")[0] == 2
    assert "needs --image" in emitted(posttrain, "--tpu", "v6e-16", "--emit", "jobset")[2]


def test_a_project_is_examined_before_there_is_a_launch(cloud, posttrain):
    quota = {"quotaId": "TPUV6EPreemptiblePerProjectPerZoneForTPUAPI"}
    cloud.plays(
        quotas=[{**quota, "dimensionsInfos": [{"dimensions": {"zone": "us-east5-b"}, "details": {"value": "64"}}]}]
    )
    code, said, _ = posttrain("doctor", "--tpu", "v6e-16", "--zone", "us-east5-b", "--spot")
    assert (code, "✓ quota in us-east5-b: TPUV6EPreemptiblePerProjectPerZoneForTPUAPI is 64" in said) == (0, True)
    code, said, _ = posttrain("doctor", "--tpu", "v6e-16", "--zone", "us-central1-b", "--spot")
    assert (code, "✗ hardware in us-central1-b: there is no v6e-16" in said) == (1, True)
