"""Shards give back the rows they were given; preference pairs and variants without thinking are made of such rows."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet
from rows import PROVENANCE, make_row

from posttrain.data import card, chat, columns, pairs, shards, source, variants
from posttrain.data.conversations import EmptyThinking, Rows, WithoutThinking
from posttrain.data.filters import funnel, outcome
from posttrain.data.row import thought

CALLS = [
    {"id": "c1", "type": "function", "function": {"name": "add", "arguments": {"x": 2, "y": [2, None]}}},
    {"function": {"name": "say", "arguments": '{"text": "é"}'}},
]
TOOLS = ({"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}},)
AGENT = make_row(
    id="agent",
    domain="tools",
    prompt=(
        {"role": "system", "content": "Use tools."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hello! What shall I add?"},
        {"role": "user", "content": "2 and 2 | please"},
    ),
    response=(
        {"role": "assistant", "reasoning_content": "add them", "tool_calls": CALLS},
        {"role": "tool", "tool_call_id": "c1", "name": "add", "content": "4"},
        {"role": "tool", "content": "said"},
        {"role": "assistant", "content": "It is 4."},
    ),
    tools=TOOLS,
    score=None,
    reward=0.25,
    pass_rate=0.5,
    licences=("MIT", "Apache-2.0"),
)
FILTERS = (outcome.Verified(unverified=("tools",)), outcome.Finished())


def rows(count: int = 5):
    found = [make_row(f"It is {i}.", f"{i} + 0?", id=f"{i}", score=float(i % 2 == 0), reason="é") for i in range(count)]
    return [*found, AGENT]


def write(folder: Path, items=None, **settings) -> Path:
    found = funnel.funnel(rows() if items is None else items, FILTERS)
    return shards.write_rows(folder, found, FILTERS, title="Sums", **settings)


def read(folder: Path, kind: str = "rows"):
    records = source.read(*shards.paths(folder, kind), parse=columns.row)
    return [records[i] for i in range(len(records))]


def test_rows_come_back_from_their_shards_exactly(tmp_path):
    folder = write(tmp_path / "sums", rows_per_shard=2)
    assert [Path(path).name for path in shards.paths(folder)] == [
        "rows-00000-of-00002.parquet",
        "rows-00001-of-00002.parquet",
    ]
    kept = funnel.funnel(rows(), FILTERS).kept
    assert tuple(read(folder)) == kept
    assert AGENT in kept


def test_dropped_rows_are_kept_apart_with_filter_and_reason(tmp_path):
    folder = write(tmp_path / "sums")
    assert [row.id for row in read(folder, "dropped")] == ["1", "3"]
    [file] = shards.paths(folder, "dropped")
    table = parquet.read_table(file).to_pylist()
    assert {(row["filter"], row["dropped_because"]) for row in table} == {("Verified", "scores 0, less than 1: é")}


def test_shards_are_conversations_to_train_on(tmp_path):
    paths = shards.paths(write(tmp_path / "sums"))
    plain = source.read(*paths)
    assert plain[0] == (*make_row("It is 0.", "0 + 0?").prompt, {"role": "assistant", "content": "It is 0."})
    exact = Rows(folders=(str(Path(paths[0]).parent),)).open()
    assert exact[0] == plain[0]
    assert exact[len(exact) - 1] == chat.WithTools((*AGENT.prompt, *AGENT.response), TOOLS)


def test_the_same_rows_make_the_same_bytes_in_whatever_order_they_come(tmp_path):
    first = write(tmp_path / "first", rows_per_shard=2)
    again = write(tmp_path / "again", rows()[::-1], rows_per_shard=2)
    files = sorted(file.name for file in first.iterdir())
    assert files == sorted(file.name for file in again.iterdir())
    assert all((first / name).read_bytes() == (again / name).read_bytes() for name in files)


def test_a_changed_shard_is_an_error(tmp_path):
    folder = write(tmp_path / "sums")
    [file] = shards.paths(folder)
    content = bytearray(Path(file).read_bytes())
    content[len(content) // 2] ^= 1
    Path(file).write_bytes(content)
    with pytest.raises(ValueError, match=r"rows-00000-of-00001.parquet is missing or not what was written"):
        shards.paths(folder)
    Path(file).unlink()
    with pytest.raises(ValueError, match="is missing or not what was written"):
        shards.paths(folder)


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    broken = replace(AGENT, response=({"role": "assistant", "content": "4", "logits": [1]},))
    with pytest.raises(ValueError, match=r"has the keys \['logits'\]; a row can hold"):
        write(tmp_path / "sums", [*rows()[:-1], broken], rows_per_shard=1)
    assert not (tmp_path / "sums").exists()
    write(tmp_path / "sums")
    assert [path.name for path in tmp_path.iterdir()] == ["sums"]
    with pytest.raises(FileExistsError, match="sums exists; remove it or write elsewhere"):
        write(tmp_path / "sums")


@pytest.mark.parametrize(
    ("message", "why"),
    [
        ({"content": [{"type": "text", "text": "4"}]}, "as its content; give one text"),
        ({"content": None, "tool_calls": [{"name": "add", "arguments": {}}]}, "it has the tool call"),
    ],
)
def test_what_a_shard_cannot_hold_is_refused(tmp_path, message, why):
    row = replace(AGENT, response=({"role": "assistant", **message},))
    found = funnel.Funnel(kept=(row,), dropped=(), steps=())
    with pytest.raises(ValueError, match=why):
        shards.write_rows(tmp_path / "sums", found, (), title="Sums")


def test_no_rows_make_empty_shards_and_a_card(tmp_path):
    folder = write(tmp_path / "none", [])
    [file] = shards.paths(folder)
    assert parquet.read_table(file).schema.equals(columns.ROWS)
    assert "0 rows were kept and 0 dropped" in (folder / "README.md").read_text()
    with pytest.raises(ValueError, match="there is no record in"):
        source.read(file)


def test_the_manifest_holds_settings_counts_and_checksums(tmp_path):
    manifest = json.loads((write(tmp_path / "sums", rows_per_shard=2) / "manifest.json").read_text())
    assert manifest["filters"] == funnel.describe(FILTERS)
    assert manifest["steps"][0] == {"filter": "Verified", "domain": "maths", "rows": 5, "dropped": 2}
    assert {name: item["rows"] for name, item in manifest["files"].items()} == {
        "rows-00000-of-00002.parquet": 2,
        "rows-00001-of-00002.parquet": 2,
        "dropped-00000-of-00001.parquet": 2,
    }


def test_the_card_shows_the_funnel_and_every_origin(tmp_path):
    text = (write(tmp_path / "sums") / "README.md").read_text()
    assert text.startswith('---\npretty_name: "Sums"\nlicense: ["Apache-2.0", "MIT"]\nconfigs:')
    for line in (
        "4 rows were kept and 2 dropped.",
        "| maths | 3 | 15 |",
        "| (generated) | 5 | 1 |",
        "| Verified | 3 | 1 |",
        "| teacher-a | 0123abcd | 4 |",
        '| {"seed": 7, "temperature": 0.6, "top_p": 0.95} | 4 |',
        "| sums v1 | 4 |",
        "| FinalNumber | 1 | 4 |",
        "| Apache-2.0 | 1 |",
        '"kind": "Verified"',
    ):
        assert line in text


def test_the_funnel_table_counts_what_is_left_by_domain():
    found = funnel.funnel(rows(), FILTERS)
    assert card.funnel_rows(found.steps) == [["(generated)", 5, 1], ["Verified", 3, 1], ["Finished", 3, 1]]
    assert card.funnel_rows(()) == []


def test_files_that_are_no_shards_are_named(tmp_path):
    parquet.write_table(pyarrow.table({"prompt": ["x"], "response": ["y"]}), tmp_path / "x.parquet")
    records = source.read(tmp_path / "x.parquet", parse=columns.row)
    with pytest.raises(ValueError, match=r"it lacks \['finish', 'id', 'num_tokens', 'teacher'\]"):
        records[0]
    with pytest.raises(FileNotFoundError, match=r"there is no .*manifest.json; give a folder"):
        shards.paths(tmp_path)
    with pytest.raises(ValueError, match="has no shards of 'pairs'"):
        shards.paths(write(tmp_path / "sums"), "pairs")


def sampled(id: str, text: str, question: str = "2 + 2?", **changes):
    return make_row(text, question, id=id, **changes)


def test_the_best_and_the_worst_answer_of_a_prompt_are_a_pair():
    items = [
        sampled("a", "five", score=0.0, reward=0.5),
        sampled("b", "four", score=1.0, reward=0.1),
        sampled("c", "4", score=1.0, reward=0.9),
        sampled("d", "alone", "another?", reward=1.0),
        sampled("e", "same", "third?", score=0.5, reward=1.0),
        sampled("f", "same too", "third?", score=0.5, reward=1.0),
    ]
    assert [pair.id for pair in pairs.best_and_worst(items, rank=pairs.by_score)] == ["b>a"]
    assert [pair.id for pair in pairs.best_and_worst(items[::-1], rank=pairs.by_score)] == ["b>a"]
    assert [pair.id for pair in pairs.best_and_worst(items, rank=pairs.by_reward)] == ["c>b"]
    assert pairs.best_and_worst(items, rank=pairs.by_reward, min_margin=0.8) == []
    assert pairs.best_and_worst([], rank=pairs.by_reward) == []
    with pytest.raises(ValueError, match="row 'x' has no score to rank by"):
        pairs.best_and_worst([sampled("x", "4", score=None)], rank=pairs.by_score)
    with pytest.raises(ValueError, match="min_margin is -1; give 0 or more"):
        pairs.best_and_worst(items, rank=pairs.by_score, min_margin=-1)


def test_delta_pairs_prefer_the_strong_model_without_a_judge():
    weak_model = replace(PROVENANCE, teacher="teacher-b", teacher_fingerprint="ffff")
    strong = [sampled("s2", "4, I think", score=0.0), sampled("s1", "4"), sampled("s3", "x", "only strong?")]
    weak = [sampled("w1", "maybe 4", provenance=weak_model), sampled("w2", "y", "only weak?", provenance=weak_model)]
    assert [pair.id for pair in pairs.delta(strong, weak)] == ["s1>w1"]
    assert pairs.delta(strong, [sampled("w", "4", provenance=weak_model)]) == []
    with pytest.raises(ValueError, match="0123abcd is both the strong and the weak model"):
        pairs.delta(strong, strong)


def test_pairs_of_different_prompts_or_equal_answers_are_errors():
    with pytest.raises(ValueError, match="rows 'a' and 'b' answer different prompts"):
        pairs.Pair(chosen=sampled("a", "4"), rejected=sampled("b", "5", "another?"))
    with pytest.raises(ValueError, match="rows 'a' and 'b' say the same"):
        pairs.Pair(chosen=sampled("a", "4"), rejected=sampled("b", "4"))


def test_pairs_far_apart_in_length_are_left_out():
    near = pairs.Pair(chosen=sampled("a", "4", num_tokens=100), rejected=sampled("b", "5", num_tokens=200))
    far = pairs.Pair(chosen=sampled("a", "4", num_tokens=99), rejected=sampled("b", "5", num_tokens=200))
    assert pairs.close_in_length([near, far]) == [near]


def test_pairs_come_back_as_preferences(tmp_path):
    agents = pairs.Pair(
        chosen=AGENT, rejected=replace(AGENT, id="b", response=({"role": "assistant", "content": "5"},))
    )
    sums = pairs.Pair(chosen=sampled("x", "4"), rejected=sampled("y", "5", score=0.0))
    folder = shards.write_pairs(tmp_path / "pairs", [agents, sums], title="Pairs")
    found = source.read(*shards.paths(folder, "pairs"), parse=source.preference)
    assert [found[i].rejected[0]["content"] for i in range(2)] == ["5", "5"]
    assert found[1].prompt == sums.chosen.prompt and found[1].chosen == sums.chosen.response
    exact = source.read(*shards.paths(folder, "pairs"), parse=columns.preference)
    assert exact[0] == (AGENT.prompt, AGENT.response, agents.rejected.response)
    [file] = shards.paths(folder, "pairs")
    stored = parquet.read_table(file).to_pylist()
    assert [row["id"] for row in stored] == ["agent>b", "x>y"]
    assert stored[1]["rejected_row"]["score"] == 0.0 and stored[1]["chosen_row"]["teacher"] == "teacher-a"
    assert "2 pairs of a chosen and a rejected answer." in (folder / "README.md").read_text()


def count(text: str) -> int:
    return len(text.split())


def test_a_row_without_its_thinking_says_the_same():
    for content in ("<think>two and two</think>\n\nIt is 4.", "It is 4."):
        found = variants.without_thinking(make_row(content), count_tokens=count)
        assert found.response == ({"role": "assistant", "content": "It is 4."},)
        assert (found.id, found.num_tokens, found.prompt_id) == ("a/answer", 3, "What is 2 + 2?")
    agent = variants.without_thinking(AGENT, count_tokens=count)
    assert agent.response[1:] == AGENT.response[1:]
    assert agent.response[0] == {"role": "assistant", "content": "", "tool_calls": CALLS}


def test_a_row_that_is_told_not_to_think_has_an_empty_thinking():
    row = make_row("<think>two and two</think>\n\nIt is 4.")
    found = variants.with_empty_thinking(row, count_tokens=count)
    assert found.prompt == ({"role": "user", "content": "What is 2 + 2? /no_think"},)
    assert found.response[0]["content"] == "<think>\n\n</think>\n\nIt is 4."
    assert thought(found.response[0]).answer.strip() == "It is 4."
    assert found.id == "a/no_think"


def test_one_set_of_rows_teaches_to_think_and_not_to(tmp_path):
    folders = (str(write(tmp_path / "sums", [make_row("<think>two and two</think>\n\nIt is 4.")])),)
    kinds: dict[type, Any] = {kind: kind(folders=folders).open()[0] for kind in (Rows, WithoutThinking, EmptyThinking)}
    assert [conversation[-1]["content"] for conversation in kinds.values()] == [
        "<think>two and two</think>\n\nIt is 4.", "It is 4.", "<think>\n\n</think>\n\nIt is 4."
    ]  # fmt: skip
    assert kinds[EmptyThinking][0]["content"] == "What is 2 + 2? /no_think"


def test_variants_of_rows_that_cannot_have_them_are_errors():
    with pytest.raises(ValueError, match="row 'a' cannot lose its thinking, its thinking never ends"):
        variants.without_thinking(make_row("<think>hm"), count_tokens=count)
    with pytest.raises(ValueError, match="row 'a' has no user message to add '/no_think' to"):
        variants.with_empty_thinking(make_row(prompt=({"role": "system", "content": "x"},)), count_tokens=count)
