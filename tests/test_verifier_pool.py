"""The verifier pool: whatever a verifier does, there is a verdict for every response, in order, in bounded time."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import bad_verifiers as bad
import pytest

from posttrain.data.task import Verdict
from posttrain.data.verify.maths import FinalNumber
from posttrain.data.verify.pool import VerifierPool

SECONDS = 1.0  # the pool's time limit here; a killed item costs this much


@pytest.fixture(scope="module")
def pool():
    with VerifierPool(timeout=SECONDS) as opened:
        yield opened


@pytest.fixture(autouse=True)
def _reset_counts(request):
    if "pool" in request.fixturenames:
        request.getfixturevalue("pool").counts.clear()


def test_verdicts_come_back_in_order(pool):
    tasks = [bad.task_of(bad.good, str(number)) for number in range(150)]
    responses = [str(number if number % 3 else -1) for number in range(150)]
    verdicts = pool.judge(tasks, responses)
    assert [verdict.score for verdict in verdicts] == [1.0 if number % 3 else 0.25 for number in range(150)]
    assert pool.counts == {"judged": 150}


@pytest.mark.parametrize(
    "verifier, kind, reason",
    [
        (bad.exits, "error", "SystemExit"),
        (bad.raises, "error", "KeyError: 'missing'"),
        (bad.recurses, "error", "RecursionError"),
        (bad.bare_number, "error", "returned float, not a Verdict"),
        (bad.score_of_two, "error", "score 2.0 is not a number in [0, 1]"),
        (bad.score_of_nan, "error", "score nan is not"),
        (bad.score_of_text, "error", "score '1' is not"),
        (bad.exits_at_once, "died", "exit code 0"),
        (bad.kills_itself, "died", "exit code -9"),
        (bad.fills_memory, "memory", "MemoryError"),
        (bad.endless, "timeout", "no verdict within 1 s"),
        (bad.endless_in_c, "timeout", "no verdict within 1 s"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_a_bad_verifier_costs_its_own_item_only(pool, verifier, kind, reason):
    tasks = [bad.task_of(bad.good), bad.task_of(verifier), bad.task_of(bad.good), bad.task_of(bad.good)]
    verdicts = pool.judge(tasks, ["5", "5", "5", "6"])
    assert [verdict.score for verdict in verdicts] == [1.0, 0.0, 1.0, 0.25]
    assert reason in verdicts[1].reason
    assert pool.counts == {"judged": 4, kind: 1}


def test_several_workers_share_the_work_and_survive_each_others_deaths():
    faulty = [bad.endless, bad.exits_at_once, bad.raises]
    verifiers = [faulty[number // 10] if number in (9, 19, 29) else bad.good for number in range(60)]
    with VerifierPool(workers=3, timeout=SECONDS) as pool:
        assert len(set(pool.pids)) == 3
        verdicts = pool.judge([bad.task_of(verifier) for verifier in verifiers], ["5"] * 60)
        assert [number for number in range(60) if verdicts[number].score != 1.0] == [9, 19, 29]
        assert pool.counts == {"judged": 60, "timeout": 1, "died": 1, "error": 1}
        hashes = {verdict.reason for verdict in pool.judge([bad.task_of(bad.reports_hash)] * 30, ["5"] * 30)}
        assert len(hashes) == 1


def test_a_worker_killed_between_two_calls_is_replaced_without_costing_a_verdict(pool):
    before = pool.pids[0]
    os.kill(before, signal.SIGKILL)
    assert pool.judge([bad.task_of(bad.good)], ["5"])[0].score == 1.0
    assert pool.counts == {"judged": 1}
    assert pool.pids[0] != before


def test_a_stopped_worker_is_a_timeout_and_not_a_hang(pool):
    pool.judge([bad.task_of(bad.good)], ["5"])
    pid = pool.pids[0]

    def sleeper():
        time.sleep(0.3)
        os.kill(pid, signal.SIGSTOP)

    thread = threading.Thread(target=sleeper)
    thread.start()
    verdicts = pool.judge([bad.task_of(bad.endless), bad.task_of(bad.good)], ["5", "5"])
    thread.join()
    assert [verdict.score for verdict in verdicts] == [0.0, 1.0]
    assert pool.counts["timeout"] == 1


def test_what_a_verifier_prints_or_reads_cannot_forge_a_verdict(pool):
    verdicts = pool.judge([bad.task_of(bad.prints), bad.task_of(bad.good)], ["5", "5"])
    assert [(verdict.score, verdict.reason) for verdict in verdicts] == [(0.5, "read ''"), (1.0, "compared")]


def test_workers_import_no_heavy_library_that_the_task_does_not_need(monkeypatch):
    monkeypatch.setenv("SOME_API_KEY", "secret")
    with VerifierPool(timeout=SECONDS) as pool:
        imports, environment = pool.judge(
            [bad.task_of(bad.reports_imports), bad.task_of(bad.reports_environment)], ["5", "5"]
        )
    assert imports == Verdict(1.0, "")
    assert "SOME_API_KEY" not in environment.reason and "PATH" in environment.reason


def test_neither_tasks_nor_verifiers_import_what_takes_a_worker_seconds():
    root = Path(__file__).parent.parent / "data"
    modules = ["tasks", "jsonl_tasks", *(f"verify.{file.stem}" for file in (root / "verify").glob("*.py"))]
    program = (
        f"import importlib, sys\nfor name in {modules}: importlib.import_module(f'posttrain.data.{{name}}')\n"
        "print(*{'jax', 'flax', 'grain', 'pyarrow', 'torch', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == []


def test_a_tower_of_powers_is_a_timeout():
    from posttrain.data.verify.symbolic import MathVerify  # heavy: not for the workers of the other tests

    tasks = [bad.task_of(MathVerify(), "9")] * 3
    with VerifierPool(timeout=3.0) as pool:
        verdicts = pool.judge(tasks, ["\\boxed{3^2}", "\\boxed{9^{9^{9^{9^{9}}}}}", "The answer is $\\frac{18}{2}$."])
        assert [verdict.score for verdict in verdicts] == [1.0, 0.0, 1.0]
        assert pool.counts == {"judged": 3, "timeout": 1}


def test_long_and_odd_responses_go_through(pool):
    responses = ["9" * 3_000_000, "\ud800", "\x00", "line\nline\r\u2028", "5"]
    verdicts = pool.judge([bad.task_of(FinalNumber())] * 5, responses)
    assert [verdict.score for verdict in verdicts] == [0.0, 0.0, 0.0, 0.0, 1.0]
    assert pool.counts == {"judged": 5}


def test_unpicklable_and_mismatched_input_is_refused_before_any_work(pool):
    with pytest.raises(TypeError, match="at the top of a module"):
        pool.judge([bad.task_of(lambda task, response: Verdict(1.0, ""))], ["5"])
    with pytest.raises(ValueError, match="1 tasks, 2 responses"):
        pool.judge([bad.task_of(bad.good)], ["5", "5"])
    with pytest.raises(RuntimeError, match="with VerifierPool"):
        VerifierPool().judge([bad.task_of(bad.good)], ["5"])
    with pytest.raises(ValueError, match="workers=0"):
        VerifierPool(workers=0)
    assert pool.judge([], []) == []


def test_workers_end_with_the_pool():
    with VerifierPool(workers=2) as pool:
        pids = pool.pids
    assert not any(alive(pid) for pid in pids)


def test_a_busy_worker_dies_when_its_parent_is_killed():
    program = (
        "import bad_verifiers as bad\nfrom posttrain.data.verify.pool import VerifierPool\n"
        "with VerifierPool(timeout=600) as pool:\n"
        "    print(*pool.pids, flush=True)\n"
        "    pool.judge([bad.task_of(bad.endless_in_c)], ['5'])\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], cwd=Path(__file__).parent, stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        worker = int(parent.stdout.readline())
        deadline = time.monotonic() + 30
        while processor_seconds(worker) < 0.5 and time.monotonic() < deadline:  # until it computes
            time.sleep(0.05)
        assert alive(worker)
        parent.kill()
    deadline = time.monotonic() + 10
    while alive(worker) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(worker)


def test_a_script_without_a_main_guard_is_not_run_again_by_the_workers(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "print('start')\n"
        "from posttrain.data.arithmetic import Arithmetic\n"
        "from posttrain.data.verify.pool import VerifierPool\n"
        "from posttrain.data.task import Verdict\n"
        "tasks = list(Arithmetic())\n"
        "with VerifierPool(workers=2) as pool:\n"
        "    print(sum(verdict.score for verdict in pool.judge(tasks, [task.answer for task in tasks])))\n"
        "    def mine(task, response): return Verdict(1.0, '')\n"
        "    import dataclasses\n"
        "    try: pool.judge([dataclasses.replace(tasks[0], verifier=mine)], ['5'])\n"
        "    except TypeError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=60, check=True)
    first, second, third = done.stdout.splitlines()
    assert (first, second) == ("start", "81.0")
    assert "defined in the script that is running" in third


def processor_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def alive(pid: int) -> bool:
    """Whether the process runs; a zombie that nobody has waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except FileNotFoundError:
        return False
