"""The posttrain command: a recipe run, stopped, resumed and reported; its tools; its exit codes and sentences."""

import io
import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pytest
import transformers
from chat_server import serving

from posttrain.data import shards
from posttrain.launch import cli, lock
from posttrain.sharding import mesh as meshes
from posttrain.train import checkpoint, stop

STAGES = {
    "start", "eval-start", "merge-mean", "eval-mean", "merge-ties", "eval-ties", "mopd-full", "eval-mopd-full",
    *(f"{kind}-{domain}" for kind in ("specialist", "eval") for domain in ("reverse", "rotate", "double")),
}  # fmt: skip


class Finished(NamedTuple):
    """A smoke run of mopd that was stopped once: its folder, and how both processes ended."""

    out: Path
    words: list[str]
    stopped: subprocess.CompletedProcess
    finished: subprocess.CompletedProcess


@pytest.fixture(scope="session")
def run(tmp_path_factory) -> Finished:
    out = tmp_path_factory.mktemp("runs") / "smoke"
    words = ["run", "mopd", "--base", "tiny", "--smoke", "--objective", "full", "--out", str(out)]
    command = [sys.executable, "-m", "posttrain.launch.cli", *words]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        while not (out / "start" / "DONE").exists() and process.poll() is None:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=300)
    finally:
        process.kill()
    stopped = subprocess.CompletedProcess(command, process.returncode, stdout, stderr)
    return Finished(out, words, stopped, subprocess.run(command, capture_output=True, text=True, check=False))


@pytest.fixture
def posttrain(monkeypatch, capfd):
    """Run the command in this process: words and what is piped in -> (exit code, stdout, stderr)."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def call(*words: str | Path, stdin: str = "") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["posttrain", *map(str, words)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        capfd.readouterr()
        try:
            cli.main()
            code = 0
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 1
        return code, *capfd.readouterr()

    yield call
    for number, handler in before.items():
        signal.signal(number, handler)


def leaves(path: Path) -> dict[str, np.ndarray]:
    return {name: np.asarray(leaf) for name, leaf in checkpoint.leaves(path, meshes.make_mesh())}


def test_help_does_not_wait_for_jax():
    code = "import sys; from posttrain.launch import cli; sys.argv = ['posttrain', *sys.argv[1:]]\n"
    code += "try: cli.main()\nfinally: print('jax' in sys.modules, file=sys.stderr)"
    for words in (["--help"], ["run", "--help"], ["merge", "ties", "--help"]):
        done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=True)
        assert "usage: posttrain" in done.stdout
        assert done.stderr.strip() == "False"


@pytest.mark.parametrize(
    "end, code, said",
    [
        ("None", 0, ""),
        ("sys.exit(75)", 75, ""),
        ("sys.exit('no')", 1, "no\n"),
        ("1 / 0", 1, "ZeroDivisionError: division by zero\n"),
    ],
)
def test_a_process_ends_with_its_work_whatever_its_threads_do(end, code, said):
    program = f"""
import atexit, sys, threading, time
from posttrain.train import stop
atexit.register(print, "at exit")
threading.Thread(target=time.sleep, args=(600,)).start()
stop.leave_after(lambda: (print("done"), {end}))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (code, "done\nat exit\n")
    assert "".join(done.stderr.splitlines(keepends=True)[-1:]) == said


def test_help_shows_recipes_and_the_options_of_a_recipe(posttrain):
    code, top, _ = posttrain("--help")
    assert code == 0
    for command in ("run", "plan", "launch", "eval", "generate", "chat", "merge", "convert", "report", "ls", "stop"):
        assert f"• {command} " in top
    assert "• mopd" in posttrain("run", "--help")[1]
    code, options, _ = posttrain("run", "mopd", "--help")
    assert code == 0
    assert all(name in options for name in ("--out", "--smoke", "--base {smollm2,tiny,", "--objective"))


def test_an_unknown_recipe_is_one_sentence(posttrain):
    code, stdout, stderr = posttrain("run", "sorcery", "--out", "nowhere")
    assert (code, stdout) == (2, "")
    assert stderr.startswith("posttrain: there is no recipe 'sorcery': choose one of ") and stderr.count("\n") == 1
    assert {"mopd", "rl", "sft"} <= set(stderr.replace(",", "").split())


@pytest.mark.parametrize("words", [["run", "mopd"], ["run"], ["eval"], ["merge", "slerp", "a", "--out", "b"], ["what"]])
def test_words_that_make_no_sense_exit_2(posttrain, words):
    assert posttrain(*words)[0] == 2


def test_a_run_stopped_by_ctrl_c_exits_75_and_says_how_to_go_on(run):
    assert run.stopped.returncode == stop.RUN_AGAIN, run.stopped.stderr
    said = run.stopped.stderr.splitlines()[-1]  # the second where a busy machine was in the middle of a step for long
    assert said.endswith((f"run the same again: posttrain {' '.join(run.words)}", "from what was saved last"))
    assert "Traceback" not in run.stopped.stderr


def test_the_same_command_finishes_a_stopped_run(run):
    assert run.finished.returncode == 0, run.finished.stderr
    assert {file.parent.name for file in run.out.glob("*/DONE")} == STAGES
    attempts = [json.loads(line) for line in (run.out / "start" / "attempts.jsonl").read_text().splitlines()]
    assert [attempt["end"] for attempt in attempts] == ["done"]
    rows = json.loads((run.out / "report.json").read_text())["rows"]
    assert [row["name"] for row in rows] == [
        "start", "specialist-reverse", "specialist-rotate", "specialist-double",
        "merge-mean", "merge-ties", "mopd-full",
    ]  # fmt: skip
    for row in rows:
        assert set(row["scores"]) == {"reverse", "rotate", "double"}
        assert row["name"] in run.finished.stdout
    assert str(run.out / "report.html") in run.finished.stdout


def test_a_finished_run_trains_nothing_again(run, posttrain):
    before = {file: file.stat().st_mtime_ns for file in run.out.rglob("*") if file.parent != run.out and file.is_file()}
    code, stdout, _ = posttrain(*run.words)
    assert code == 0
    assert "mopd-full" in stdout
    after = {file: file.stat().st_mtime_ns for file in run.out.rglob("*") if file.parent != run.out and file.is_file()}
    assert after == before


def test_other_settings_for_the_same_run_are_refused_by_name(run, posttrain):
    code, _, stderr = posttrain(*(word for word in run.words if word != "--smoke"))
    assert code == 2
    assert stderr.count("\n") == 1
    assert f"{run.out}/start was started with other settings (steps: 2 -> " in stderr
    assert "give another --out" in stderr


def test_a_run_that_another_process_writes_is_left_alone(run, posttrain):
    with lock.held(run.out):
        code, _, stderr = posttrain(*run.words)
    assert code == 2
    assert stderr.startswith("posttrain: another process (id ")
    assert f"writes to {run.out}" in stderr


def test_a_signal_during_a_run_is_heard_at_the_next_stage(run, posttrain, monkeypatch):
    monkeypatch.setattr(stop, "_asked", type(stop._asked)())
    stop.request_stop(signal.SIGTERM, None)
    assert posttrain(*run.words)[0] == stop.RUN_AGAIN


def test_report_is_made_anew_from_the_folder_alone(run, posttrain):
    before = json.loads((run.out / "report.json").read_text())
    (run.out / "report.json").unlink()
    (run.out / "report.html").unlink()
    assert posttrain("report", run.out)[0] == 0
    assert json.loads((run.out / "report.json").read_text())["rows"] == before["rows"]
    assert "<svg" in (run.out / "report.html").read_text()


def test_a_report_of_no_run_is_one_sentence(posttrain, tmp_path):
    code, _, stderr = posttrain("report", tmp_path)
    assert code == 2
    assert "holds no run" in stderr and stderr.count("\n") == 1


def test_a_full_disk_is_one_sentence(posttrain, tmp_path):
    (tmp_path / "scores.json").symlink_to("/dev/full")
    code, _, stderr = posttrain("eval", "tiny", "--tasks", "characters:sort", "--limit", "1", "--out", tmp_path)
    assert code == 2
    assert "the disk is full" in stderr and "free some space" in stderr and stderr.count("\n") == 1


def test_eval_scores_a_model_on_files_and_on_our_tasks(run, posttrain, tmp_path):
    questions = tmp_path / "questions.jsonl"
    questions.write_text('{"prompt": "copy ab", "answer": "ab"}\n{"prompt": "copy ba", "answer": "ba"}\n')
    words = ["--tasks", questions, "--tasks", "characters:sort", "--verifier", "text", "--max-tokens", "8"]
    code, stdout, stderr = posttrain("eval", run.out / "start", *words, "--limit", "3", "--out", tmp_path / "scores")
    assert code == 0, stderr
    scores = json.loads((tmp_path / "scores" / "scores.json").read_text())
    assert {name: score["n"] for name, score in scores.items()} == {"questions": 2, "sort": 3}
    for name, score in scores.items():
        assert f"{score['mean']:.1%} [{100 * score['low']:.0f}, {100 * score['high']:.0f}]" in stdout
        assert name in stdout


@pytest.mark.parametrize(
    ("tasks", "sentence"),
    [
        ([], "no tasks to evaluate on"),
        (["--tasks", "sums"], "no tasks 'sums': give FILE.jsonl, arithmetic"),
        (["--tasks", "missing.jsonl"], "no task file missing.jsonl"),
        (["--tasks", "arithmetic", "--tasks", "arithmetic:2"], "give each domain once"),
        (["--tasks", "reasoning-gym:nonsense"], "has no generator 'nonsense'"),
    ],
)
def test_tasks_that_do_not_exist_are_one_sentence(posttrain, tasks, sentence):
    code, _, stderr = posttrain("eval", "tiny", *tasks)
    assert code == 2
    assert sentence in stderr and stderr.count("\n") == 1


def test_chat_answers_each_line_and_reset_forgets(run, posttrain):
    words = ["chat", run.out / "start", "--max-tokens", "8", "--temperature", "0"]
    long = "x" * 90
    code, stdout, stderr = posttrain(*words, stdin=f"{long}\n\n{long}\n{long}\n")
    assert code == 0
    assert "/reset begins a new conversation)" in stderr  # three turns are more than the 256 tokens of its context
    code, again, stderr = posttrain(*words, stdin=f"{long}\n/reset\n{long}\n/reset\n{long}\n")
    assert code == 0
    assert "begins a new conversation)" not in stderr
    first = stdout[: len(again) // 3]
    assert again == first * 3


def test_a_model_goes_to_hugging_face_and_back_unchanged(run, posttrain, tmp_path):
    assert posttrain("convert", run.out / "mopd-full", "--out", tmp_path / "hf")[0] == 0
    assert posttrain("convert", tmp_path / "hf", "--out", tmp_path / "ours", "--format", "posttrain")[0] == 0
    before, after = leaves(run.out / "mopd-full"), leaves(tmp_path / "ours")
    assert before.keys() == after.keys()
    for name in before:
        np.testing.assert_array_equal(before[name], after[name])
    config = checkpoint.open_config(run.out / "mopd-full")
    theirs = transformers.AutoConfig.from_pretrained(tmp_path / "hf")
    assert (theirs.hidden_size, theirs.vocab_size) == (config.embed_dim, config.vocab_size)
    ours, tokenizer = (
        checkpoint.open_tokenizer(tmp_path / "ours"),
        transformers.AutoTokenizer.from_pretrained(tmp_path / "hf"),
    )
    assert ours.fingerprint == checkpoint.open_tokenizer(run.out / "mopd-full").fingerprint
    assert tokenizer("sort bac").input_ids == ours.encode("sort bac")
    messages = [{"role": "user", "content": "sort bac"}]
    assert "<|im_start|>user\nsort bac" in tokenizer.apply_chat_template(messages, tokenize=False)


def test_converting_into_a_folder_with_something_in_it_is_refused(posttrain, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    code, _, stderr = posttrain("convert", "tiny", "--out", tmp_path)
    assert code == 2
    assert "is not empty" in stderr
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]


def test_merging_by_command_is_the_weighted_average(run, posttrain, tmp_path):
    a, b = run.out / "specialist-double", run.out / "specialist-reverse"
    code, stdout, stderr = posttrain("merge", "linear", a, b, "--weights", "3", "1", "--out", tmp_path / "merged")
    assert code == 0, stderr
    assert str(tmp_path / "merged" / "model") in stdout
    first, second, merged = leaves(a), leaves(b), leaves(tmp_path / "merged")
    for name in merged:
        np.testing.assert_allclose(merged[name], 0.75 * first[name] + 0.25 * second[name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    "words",
    [
        ["slerp", "--t", "0"],
        ["task-arithmetic", "--weights", "1", "0"],
        ["ties", "--density", "1.0", "--scale", "0"],
        ["dare", "--drop", "0.0", "--weights", "1", "0"],
    ],
)
def test_merges_at_their_ends_give_back_a_model(run, posttrain, tmp_path, words):
    method, *options = words
    models = [run.out / "specialist-double", run.out / "specialist-reverse"]
    code, _, stderr = posttrain(
        "merge", method, *models, *options, "--base", run.out / "start", "--out", tmp_path / "m"
    )
    assert code == 0, stderr
    expected, merged = leaves(run.out / "start" if method == "ties" else models[0]), leaves(tmp_path / "m")
    for name in merged:
        np.testing.assert_allclose(merged[name], expected[name], rtol=1e-5, atol=1e-6)


def test_a_torn_model_file_is_one_sentence(posttrain, tmp_path):
    assert posttrain("convert", "tiny", "--out", tmp_path / "hf")[0] == 0
    weights = tmp_path / "hf" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    code, stdout, stderr = posttrain("chat", tmp_path / "hf", stdin="hello\n")
    assert (code, stdout) == (2, "")
    assert f"{weights} (1000 bytes) is truncated" in stderr
    assert "Traceback" not in stderr


def test_debug_shows_the_traceback(posttrain):
    with pytest.raises(FileNotFoundError, match="no model at nowhere"):
        posttrain("chat", "nowhere", "--debug")
    assert posttrain("chat", "nowhere")[0] == 2


def test_an_error_that_no_input_explains_is_not_hidden(posttrain, monkeypatch):
    def broken(*_):
        raise jax.errors.JaxRuntimeError("INTERNAL: boom")

    monkeypatch.setattr(checkpoint, "open_model", broken)
    with pytest.raises(jax.errors.JaxRuntimeError, match="boom"):
        posttrain("chat", "tiny")


def test_generate_keeps_what_passes_and_the_same_command_asks_for_nothing_again(posttrain, tmp_path):
    with serving() as server:
        words = ["generate", "--teacher", f"{server.url}#big", "--tasks", "characters:reverse", "--limit", "8"]
        words += ["--samples", "4", "--out", str(tmp_path / "out")]
        code, stdout, stderr = posttrain(*words)
        assert code == 0, stderr
        kept = shards.read_rows(tmp_path / "out" / "kept")
        assert stdout.splitlines()[-1] == f"{len(kept)} rows are kept: {tmp_path / 'out' / 'kept' / 'rows'}"
        assert kept and {row.score for row in kept} == {1.0}
        assert posttrain(*words)[0] == 0 and len(server.requests) == 8 * 4
        assert posttrain(*words, "--concurrency", "2", "--timeout", "5")[0] == 0
        code, _, stderr = posttrain(*words, "--seed", "7")
        assert code == 2 and "was started with other settings (seed: 0 -> 7)" in stderr


BAD_GENERATIONS = {
    "nobody": (["--teacher", "http://127.0.0.1:9/v1#m", "--attempts", "1"], "gives no answer: .*refused"),
    "key": (
        ["--teacher", "https://host/v1#m", "--key-variable", "NOT_SET"],
        "variable 'NOT_SET', .* is not set: export",
    ),
    "name": (["--teacher", "http://127.0.0.1:9/v1"], "does not say which model answers there: give .*/v1#MODEL"),
    "domain": (["--teacher", "sums=tiny"], r"teachers are for \['sums'\]: add one"),
    "model": (["--teacher", "nowhere"], "nowhere"),
    "part": (["--teacher", "tiny", "--part", "2", "--parts", "2"], "parts are numbered from 0 to 1"),
    "tasks": (["--teacher", "tiny", "--tasks", "sorcery"], "no tasks 'sorcery'"),
    "length": (["--teacher", "tiny", "--max-tokens", "999999"], "exceeds the model's context"),
}


@pytest.mark.parametrize("case", BAD_GENERATIONS)
def test_what_cannot_be_generated_is_one_sentence(posttrain, case, tmp_path):
    words, why = BAD_GENERATIONS[case]
    given = ["generate", "--tasks", "characters:copy", "--limit", "2", "--out", str(tmp_path / "out"), *words]
    code, _, stderr = posttrain(*given)
    assert code == 2 and re.search(why, stderr) and stderr.count("\n") == 1, stderr
