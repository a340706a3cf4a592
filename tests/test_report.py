"""The report: recovery and time by hand, a page that stands alone, and what it does with odd runs."""

import io
import json
import re
import shutil
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import rich.console

from posttrain.launch import charts, comparison, funnels, report
from posttrain.launch.comparison import Comparison, Entry
from posttrain.train import evaluate

SCORES = {  # of 10 tasks each: start, the teacher of sums, the teacher of words, a student
    "start": {"sums": 2, "words": 5},
    "adder": {"sums": 8, "words": 4},
    "writer": {"sums": 3, "words": 5},
    "student": {"sums": 5, "words": 10},
}


def add_evaluation(folder: Path, right: dict[str, int]) -> None:
    """What an Evaluate stage leaves behind when so many of 10 answers are right."""
    (folder / "rollouts").mkdir(parents=True)
    scores = {domain: evaluate.wilson([1.0] * n + [0.0] * (10 - n))._asdict() for domain, n in right.items()}
    (folder / "scores.json").write_text(json.dumps(scores))
    (folder / "stage.json").write_text(json.dumps({"kind": "Evaluate", "limit": 10}))
    for index, (domain, n) in enumerate(right.items()):
        rows = [
            {
                "id": f"{domain}-{i}", "domain": domain, "prompt": f"{domain} & task {i}?", "reward": float(i < n),
                "response": f"<script>alert({i})</script>", "reason": "", "finish": "stop", "version": 0, "tokens": 3,
            }
            for i in range(10)
        ]  # fmt: skip
        (folder / "rollouts" / f"{index:06d}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def add_training(folder: Path, lines: list[dict], attempts: list[float]) -> None:
    """What a training stage leaves behind."""
    folder.mkdir(parents=True)
    (folder / "stage.json").write_text(json.dumps({"kind": "RL", "steps": len(lines)}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    ends = ["killed"] * (len(attempts) - 1) + ["done"]
    rows = [
        {"started": 0.0, "seconds": seconds, "end": end, "phases": {"wasted": 2.0} if end == "killed" else {}}
        for seconds, end in zip(attempts, ends, strict=False)
    ]
    (folder / "attempts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    paces = [("host 0 (a)", 1.0, 5.0), ("host 1 (b)", 1.2, 5.0), ("host 2 (c)", 4.0, 5.0)]
    own = [{"host": host, "seconds": {"verify": verify, "train": train}} for host, verify, train in paces]
    (folder / "paces.jsonl").write_text(json.dumps({"step": 10, "hosts": own}) + "\n")


@pytest.fixture
def out(tmp_path) -> Path:
    """A run of two teachers and a student, stored with its comparison."""
    out = tmp_path / "run"
    for name, right in SCORES.items():
        add_evaluation(out / f"eval-{name}", right)
    lines = [
        {"step": step, "reward": step / 20, "reward/sums": 0.1, "reward/words": 0.2, "kl": 1 / step,
         "seconds": {"rollout": 2.0, "train": 1.0, "verify": 0.25}}
        for step in range(1, 11)
    ]  # fmt: skip
    add_training(out / "rl", lines, attempts=[20.0, 30.0])
    add_training(out / "merge", [{"step": 1, "seconds": {"merge": 3.0, "compile": 1.0}}], attempts=[])
    stages = {"student": (str(out / "rl"), str(out / "merge")), "adder": (str(out / "merge"),)}
    entries = tuple(Entry(name, str(out / f"eval-{name}"), stages.get(name, ())) for name in SCORES)
    compared = Comparison(title="A <b>run</b>", entries=entries, teachers={"sums": "adder", "words": "writer"})
    comparison.write(compared, out)
    return out


def test_a_funnel_shows_what_each_filter_left_of_each_domain(out):
    steps = [
        {"filter": name, "domain": domain, "rows": rows, "dropped": dropped}
        for name, of in {"Finished": (10, 1, 8, 0), "Verified": (9, 4, 8, 8)}.items()
        for domain, rows, dropped in (("sums", *of[:2]), ("words", *of[2:]))
    ]
    (out / "rl" / "rows").mkdir()
    (out / "rl" / "rows" / "manifest.json").write_text(json.dumps({"steps": steps}))
    summary = report.write(out, report.stored_comparison(out))
    assert summary["funnels"] == {"rl": {"sums": (10, 9, 5), "words": (8, 8, 0)}}
    page = (out / "report.html").read_text()
    for line in ("<td>generated</td><td>10</td><td>8</td>", "<td>Verified</td><td>5</td><td>0</td>"):
        assert line in page
    assert 'aria-label="rows left after each filter of rl"' in page
    [one] = funnels.read(out, ["rl"])
    console = rich.console.Console(file=io.StringIO(), width=100)
    console.print(report.funnel_table(one))
    assert "Verified       5       0" in console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]


def test_recovery_is_the_share_of_the_teachers_gain(out):
    rows = {row["name"]: row for row in report.write(out, report.stored_comparison(out))["rows"]}
    assert rows["student"]["recovery_by_domain"]["sums"] == pytest.approx((5 - 2) / (8 - 2))
    assert rows["adder"]["recovery_by_domain"]["sums"] == pytest.approx(1.0)
    assert rows["writer"]["recovery_by_domain"]["sums"] == pytest.approx(1 / 6)
    assert rows["start"]["recovery"] is None and rows["start"]["recovery_by_domain"] == {}


def test_a_teacher_that_gained_nothing_makes_recovery_undefined_and_says_so(out):
    summary = report.write(out, report.stored_comparison(out))
    student = summary["rows"][-1]
    assert student["recovery_by_domain"]["words"] is None
    assert student["recovery"] == pytest.approx(0.5)  # of sums alone
    [note] = summary["notes"]
    assert note.startswith("words: its teacher writer gained nothing over start (50.0%, was 50.0%)")
    assert note in (out / "report.html").read_text()


def test_report_json_holds_what_it_promises(out):
    assert report.write(out, report.stored_comparison(out)) == json.loads((out / "report.json").read_text())
    summary = json.loads((out / "report.json").read_text())
    row = summary["rows"][0]
    assert row.keys() >= {"name", "scores", "recovery", "seconds"}
    assert row["scores"]["sums"] == evaluate.wilson([1.0] * 2 + [0.0] * 8)._asdict()
    assert summary.keys() >= {"rows", "shares"}


def test_time_outside_the_phases_is_other_and_restarts_add_up(out):
    summary = report.write(out, report.stored_comparison(out))
    spent = {"compile": 1.0, "rollout": 20.0, "verify": 2.5, "train": 10.0, "merge": 3.0, "wasted": 2.0}
    assert summary["seconds"] == pytest.approx(dict.fromkeys(report.PHASES, 0.0) | spent | {"other": 50.0 - 34.5})
    assert sum(summary["shares"].values()) == pytest.approx(1.0)
    assert summary["shares"]["rollout"] == pytest.approx(20 / 54)
    assert summary["goodput"] == pytest.approx((20 + 2.5 + 10 + 3) / 54)
    assert summary["restarts"] == {"interrupted": 0, "killed": 1, "failed": 0}
    assert {row["name"]: row["seconds"] for row in summary["rows"]} == pytest.approx(
        {"start": 0.0, "adder": 4.0, "writer": 0.0, "student": 54.0}
    )


def test_a_host_that_works_longer_where_none_waits_for_another_is_named(out):
    found = report.write(out, report.stored_comparison(out))["stragglers"]
    assert {(one["stage"], one["host"], one["phase"]) for one in found} == {
        ("rl", "host 2 (c)", "verify"),
        ("merge", "host 2 (c)", "verify"),
    }
    assert found[0]["times"] == pytest.approx(4.0 / 1.2)
    assert "host 2 (c) took 3.3 times as long as the median host to verify in rl" in (out / "report.html").read_text()


def test_the_page_stands_alone_and_shows_text_as_text(out):
    report.write(out, report.stored_comparison(out))
    text = (out / "report.html").read_text()
    assert not re.search(r"<script|<link|<img|@import|url\((?!#)|src=", text)
    assert "&lt;script&gt;alert(0)&lt;/script&gt;" in text
    assert "<h1>A &lt;b&gt;run&lt;/b&gt;</h1>" in text
    charts_found = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert len(charts_found) == 2  # the scores, and the curves of the one stage that has some
    for chart in charts_found:
        ElementTree.fromstring(chart)


def test_the_page_shows_the_same_tasks_before_and_after(out):
    shown = report.samples(report.stored_comparison(out))
    assert list(shown) == ["sums", "words"]
    assert [list(task["answers"]) for task in shown["sums"]] == [["start", "adder", "student"]] * report.SAMPLES
    rewards = [[answer["reward"] for answer in task["answers"].values()] for task in shown["sums"]]
    assert rewards == [[1.0, 1.0, 1.0], [1.0, 1.0, 1.0], [0.0, 1.0, 1.0], [0.0, 1.0, 1.0]]


def test_the_terminal_table_has_scores_with_intervals(out):
    console = rich.console.Console(width=120, file=io.StringIO(), record=True, markup=False)
    console.print(report.table(report.summarise(out, report.stored_comparison(out))))
    lines = console.export_text().splitlines()
    [student] = [line for line in lines if line.lstrip().startswith("student")]
    assert re.sub(" +", " ", student).strip() == "student 50.0% [24, 76] 100.0% [72, 100] 50% 54 s"


def test_a_moved_run_reports_the_same(out, tmp_path):
    before = report.write(out, report.stored_comparison(out))
    shutil.move(out, tmp_path / "elsewhere")
    assert report.write(tmp_path / "elsewhere", report.stored_comparison(tmp_path / "elsewhere")) == before


def test_a_run_folder_may_be_given_relative_to_where_one_is(out, monkeypatch):
    before = report.write(out, report.stored_comparison(out))
    monkeypatch.chdir(out.parent)
    assert report.write(Path(out.name), report.stored_comparison(Path(out.name))) == before


def test_an_unfinished_run_reports_its_curves_and_times(out):
    (out / "comparison.json").unlink()
    summary = report.write(out, report.stored_comparison(out))
    assert summary["rows"] == []
    assert summary["title"] == "run (not finished)"
    assert (out / "report.html").read_text().count("<svg") == 1


def test_a_stage_without_a_line_yet_takes_part_with_no_time(tmp_path):
    (tmp_path / "rl").mkdir()
    (tmp_path / "rl" / "stage.json").write_text('{"kind": "RL"}')
    summary = report.write(tmp_path, report.stored_comparison(tmp_path))
    assert set(summary["shares"].values()) == {0.0}


def test_smoothing_keeps_constants_and_the_length():
    assert charts.smoothed(np.full(50, 2.5)) == pytest.approx(np.full(50, 2.5))
    assert charts.smoothed(np.asarray([0.0, 3.0, 6.0])) == pytest.approx([1.5, 3.0, 4.5])


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0 s"), (1.25, "1.2 s"), (59.4, "59 s"), (250, "4 min 10 s"), (7500, "2 h 5 min")]
)
def test_durations_read_well(seconds, text):
    assert report.duration(seconds) == text
