"""Sources: an index says which record, in every process, before and after a resume, for any number of hosts."""

import json
import pickle
import random
from collections import Counter
from itertools import islice

import pyarrow
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from pyarrow import parquet

from posttrain.data import mixture, shuffle, source

RECORDS = [
    {"messages": [{"role": "user", "content": f"question {i} é"}, {"role": "assistant", "content": f"answer {i}"}]}
    for i in range(23)
]
WANTED = [tuple(record["messages"]) for record in RECORDS]


def write_lines(path, lines):
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def write_array_record(path, records):
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for record in records:
        writer.write(json.dumps(record).encode())
    writer.close()
    return path


@pytest.fixture(params=["jsonl", "parquet", "array_record"])
def stored(request, tmp_path):
    """The records in two files of each format."""
    paths = [tmp_path / f"{half}.{request.param}" for half in "ab"]
    for path, records in zip(paths, (RECORDS[:10], RECORDS[10:]), strict=True):
        if request.param == "jsonl":
            write_lines(path, map(json.dumps, records))
        elif request.param == "parquet":
            parquet.write_table(pyarrow.Table.from_pylist(records), path)
        else:
            write_array_record(path, records)
    return paths


def test_every_format_gives_the_records_in_their_order(stored):
    records = source.read(*stored)
    assert len(records) == 23
    assert [records[i] for i in range(23)] == WANTED


def test_records_travel_to_other_processes(stored):
    again = pickle.loads(pickle.dumps(source.read(*stored)))
    assert [again[i] for i in range(23)] == WANTED


def test_every_epoch_is_a_permutation_and_no_two_are_alike(stored):
    endless = shuffle.Shuffled(source.read(*stored), seed=7)
    epochs = [[endless[epoch * 23 + i] for i in range(23)] for epoch in range(4)]
    for epoch in epochs:
        assert Counter(map(str, epoch)) == Counter(map(str, WANTED))
    assert len({str(epoch) for epoch in [*epochs, WANTED]}) == 5


def test_the_order_depends_on_seed_and_index_alone():
    one, two = (shuffle.Shuffled(range(50), seed=3) for _ in range(2))
    forwards = [one[i] for i in range(170)]
    assert [two[i] for i in reversed(range(170))] == forwards[::-1]
    seeded = [shuffle.Shuffled(range(50), seed=seed) for seed in range(20)]
    orders = {tuple(endless[i] for i in range(200)) for endless in seeded}
    assert len(orders) == 20
    epochs = {order[start : start + 50] for order in orders for start in range(0, 200, 50)}
    assert len(epochs) == 80


def test_the_order_stays_the_same_in_later_versions():
    endless = shuffle.Shuffled(range(8), seed=0)
    assert [endless[i] for i in range(16)] == [5, 1, 4, 2, 0, 6, 7, 3, 1, 3, 6, 2, 4, 7, 0, 5]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_few_records_are_shuffled_too(count):
    endless = shuffle.Shuffled(range(count), seed=0)
    assert sorted(endless[i] for i in range(count)) == list(range(count))


def test_resuming_from_the_cursor_is_going_on():
    endless = shuffle.Shuffled(range(31), seed=1)
    whole = list(islice(shuffle.batches(endless, size=8), 12))
    cursor = whole[4][0]
    assert cursor == 40
    assert list(islice(shuffle.batches(endless, size=8, start=cursor), 7)) == whole[5:]


@pytest.mark.parametrize("hosts", [2, 4, 8])
def test_hosts_together_see_what_one_host_sees(hosts):
    endless = shuffle.Shuffled(range(31), seed=1)
    alone = list(islice(shuffle.batches(endless, size=8), 6))
    shares = [
        list(islice(shuffle.batches(endless, size=8, process_index=host, process_count=hosts), 6))
        for host in range(hosts)
    ]
    for step, (cursor, items) in enumerate(alone):
        assert [share[step][0] for share in shares] == [cursor] * hosts
        assert [item for share in shares for item in share[step][1]] == items


def test_an_uneven_split_over_hosts_is_an_error():
    with pytest.raises(ValueError, match="8 items cannot be split evenly over 3 hosts"):
        next(shuffle.batches(range(100), size=8, process_count=3))


def test_batches_of_finite_items_end_with_the_last_whole_batch():
    assert list(shuffle.batches(range(7), size=3)) == [(3, [0, 1, 2]), (6, [3, 4, 5])]


def test_malformed_lines_are_named_counted_and_left_out(tmp_path, caplog):
    good = [json.dumps(record) for record in RECORDS]
    bad = ["{broken", "[1, 2]", '{"text": "x"}', '{"messages": []}', "[" * 100_000, '{"messages": [{"role": "user"}]}']
    lines = [*good[:5], bad[0], "", *good[5:9], *bad[1:], *good[9:]]
    path = write_lines(tmp_path / "data.jsonl", lines)
    records = source.read(path, max_malformed=0.5)
    assert [records[i] for i in range(len(records))] == WANTED
    assert [line.split(": ")[0] for line in records.malformed] == [f"{path}:{row}" for row in (6, 12, 13, 14, 15, 16)]
    assert "and not an object" in records.malformed[1]
    assert "needs messages" in records.malformed[2]
    assert f"{path}:6" in caplog.text
    with pytest.raises(ValueError, match=r"6 of 29 lines are malformed and at most 20.00% .*data.jsonl:6"):
        source.read(path, max_malformed=0.2)


def test_bytes_that_are_not_text_are_a_malformed_line(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'{"prompt": "a", "response": "b"}\n{"prompt": "\xff", "response": "b"}\n')
    records = source.read(path, max_malformed=0.5)
    assert len(records) == len(records.malformed) == 1


def test_a_last_line_without_a_newline_counts(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"prompt": "a", "response": "b"}\r\n{"prompt": "c", "response": "d"}')
    assert source.read(path)[1][0]["content"] == "c"


@pytest.mark.parametrize("key", ["response", "completion"])
@pytest.mark.parametrize("listed", [False, True])
def test_prompt_and_answer_are_a_conversation(key, listed):
    turns = [{"role": "user", "content": "2 + 2?"}], [{"role": "assistant", "content": "4"}]
    record = {"prompt": turns[0], key: turns[1]} if listed else {"prompt": "2 + 2?", key: "4"}
    assert source.conversation(record) == (*turns[0], *turns[1])


def test_preferences_hold_a_prompt_and_two_answers(tmp_path):
    path = write_lines(tmp_path / "p.jsonl", ['{"prompt": "2 + 2?", "chosen": "4", "rejected": "5"}'])
    pair = source.read(path, parse=source.preference)[0]
    assert pair.prompt == ({"role": "user", "content": "2 + 2?"},)
    assert (pair.chosen[0]["content"], pair.rejected[0]["content"]) == ("4", "5")
    with pytest.raises(ValueError, match=r"lacks \['rejected'\]"):
        source.preference({"prompt": "x", "chosen": "y"})


def test_a_tool_call_may_stand_without_content():
    calls = [{"function": {"name": "add", "arguments": {"x": 1}}}]
    record = {
        "messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": None, "tool_calls": calls}]
    }
    assert source.conversation(record)[1] == {"role": "assistant", "tool_calls": calls}


def test_unusable_records_of_binary_formats_are_named(tmp_path):
    parquet.write_table(pyarrow.table({"text": ["x"]}), tmp_path / "x.parquet")
    write_array_record(tmp_path / "x.array_record", [{"text": "x"}])
    for name, item in (("x.parquet", "row 0"), ("x.array_record", "record 0")):
        records = source.read(tmp_path / name)
        with pytest.raises(ValueError, match=rf"{item} of .*{name} cannot be used: it has the keys \['text'\]"):
            records[0]


def test_nothing_to_read_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="there is no record in"):
        source.read(write_lines(tmp_path / "empty.jsonl", ["", ""]))
    with pytest.raises(FileNotFoundError, match=r"no file .*absent\.jsonl"):
        source.read(tmp_path / "absent.jsonl")
    with pytest.raises(ValueError, match=r"end in \['\.txt'\]"):
        source.read(write_lines(tmp_path / "data.txt", ["x"]))
    with pytest.raises(ValueError, match="nothing to shuffle"):
        shuffle.Shuffled([], seed=0)


@pytest.mark.parametrize(
    "weights",
    [{"a": 0.7, "b": 0.3}, {"a": 1, "b": 1, "c": 1}, {"a": 1 / 3, "b": 5, "c": 0.01, "d": 2, "e": 0.4, "f": 5}],
)
def test_every_prefix_of_a_mixture_holds_the_proportions(weights):
    mixed = mixture.Mixture({name: range(10) for name in weights}, weights=weights, seed=0)
    counts = Counter()
    for index in range(3000):
        name, place = mixed.locate(index)
        assert place == counts[name]
        counts[name] += 1
        for name, weight in weights.items():
            assert abs(counts[name] - (index + 1) * weight / sum(weights.values())) < 3
    far = 10**12
    assert {mixed.locate(far + i)[0] for i in range(2000)} == set(weights)


def test_a_mixture_resumes_anywhere_and_shuffles_each_source_its_own_way():
    sources = {"math": [f"m{i}" for i in range(20)], "code": [f"c{i}" for i in range(20)]}
    one, two = (mixture.Mixture(sources, weights={"math": 1, "code": 1}, seed=5) for _ in range(2))
    assert [one[i] for i in range(100)] == [two[i] for i in reversed(range(100))][::-1]
    drawn = [one[i] for i in range(40)]
    orders = {name: [item[1:] for source, item in drawn if source == name] for name in sources}
    assert sorted(orders["math"]) == sorted(orders["code"])
    assert orders["math"] != orders["code"]
    _, items = next(shuffle.batches(one, size=4, start=96))
    assert items == [one[i] for i in range(96, 100)]


def test_a_mixture_names_wrong_weights():
    with pytest.raises(ValueError, match="name the same ones"):
        mixture.Mixture({"a": [1]}, weights={"b": 1}, seed=0)
    with pytest.raises(ValueError, match="weight of 'a' is 0"):
        mixture.Mixture({"a": [1]}, weights={"a": 0}, seed=0)


def test_a_cap_holds_small_sources_at_what_they_have_and_the_others_make_up_for_it():
    weights, lengths = {"a": 0.5, "b": 0.3, "c": 0.2}, {"a": 10, "b": 1000, "c": 1000}
    assert mixture.capped(weights, lengths, size=100, max_epochs=2) == {"a": 20, "b": 48, "c": 32}
    assert mixture.capped(weights, lengths, size=20, max_epochs=2) == {"a": 10, "b": 6, "c": 4}
    # Holding `a` sends more to `b`, which then is over its cap as well.
    assert mixture.capped(weights, {"a": 10, "b": 25, "c": 99}, size=60, max_epochs=1) == {"a": 10, "b": 25, "c": 25}
    with pytest.raises(ValueError, match="40 items are wanted, and 1.5 epochs of .* are 30: take fewer"):
        mixture.capped({"a": 1}, {"a": 20}, size=40, max_epochs=1.5)


def test_no_item_of_a_capped_mixture_comes_more_often_than_the_cap():
    draw = random.Random(3)
    for _ in range(60):
        lengths = {name: draw.randint(1, 30) for name in "abcd"}
        cap = draw.choice([1, 2, 3])
        size = draw.randint(1, cap * sum(lengths.values()))
        sources = {name: [f"{name}{i}" for i in range(length)] for name, length in lengths.items()}
        weights = {name: draw.choice([0.1, 0.7, 1.0, 3.3]) for name in lengths}
        found = mixture.Bounded(sources, weights=weights, size=size, max_epochs=cap)
        counts = Counter(found[i] for i in range(len(found)))
        assert max(counts.values()) <= cap and counts.total() == size
        drawn = Counter(found[i][0] for i in range(size))
        assert {name: drawn[name] / lengths[name] for name in lengths} == found.epochs
        with pytest.raises(IndexError):
            found[size]
