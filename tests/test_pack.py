"""Packing: nothing lost, nothing mixed, nothing moved to another token."""

import numpy as np
import pytest

from posttrain.data import pack
from posttrain.data.batch import BRANCHES, FIELDS


def ragged(seed, count, *, least=2, most=40):
    """Random examples whose fields say which token they belong to."""
    random = np.random.default_rng(seed)
    examples = []
    for size in random.integers(least, most + 1, count):
        tokens = random.integers(1, 500, size)
        fields = {"logp": -tokens / 7.0, "top": np.stack([tokens, tokens + 1000], axis=-1), "advantage": float(size)}
        mask = random.integers(0, 2, size).astype(np.float32)
        examples.append(pack.Example(tokens=tokens.tolist(), mask=mask, fields=fields))
    return examples


def groups_of(seed, count):
    random = np.random.default_rng(seed)
    return [
        pack.Group(
            prompt=random.integers(1, 500, random.integers(1, 12)).tolist(),
            answers=ragged([seed, number], int(random.integers(1, 9)), least=1, most=20),
        )
        for number in range(count)
    ]


def test_three_tokens_by_hand():
    first = pack.Example(tokens=[5, 6, 7], mask=[0, 1, 1], fields={"logp": [0.0, -0.5, -0.25]})
    second = pack.Example(tokens=[8, 9], mask=[0, 1], fields={"logp": [0.0, -2.0]})
    batch, spans = pack.pack([second, first], length=6, fields=["logp"])
    np.testing.assert_array_equal(batch["tokens"], [[5, 6, 7, 8, 9, 0]])
    np.testing.assert_array_equal(batch["targets"], [[6, 7, 0, 9, 0, 0]])
    np.testing.assert_array_equal(batch["mask"], [[1, 1, 0, 1, 0, 0]])
    np.testing.assert_array_equal(batch["segments"], np.array([[1, 1, 1, 2, 2, 0]]) * BRANCHES)
    np.testing.assert_array_equal(batch["positions"], [[0, 1, 2, 0, 1, 0]])
    np.testing.assert_array_equal(batch["logp"], [[-0.5, -0.25, 0, -2, 0, 0]])
    np.testing.assert_array_equal(spans, [[0, 3, 4], [0, 0, 2]])


def test_a_group_by_hand():
    answers = [
        pack.Example(tokens=[20, 21, 2], mask=[1, 1, 1], fields={"logp": [-1.0, -2.0, -3.0]}),
        pack.Example(tokens=[30, 2], mask=[0, 1], fields={"logp": [-4.0, -5.0]}),
    ]
    batch, spans = pack.pack_groups([pack.Group(prompt=[7, 8, 9], answers=answers)], length=8, fields=["logp"])
    np.testing.assert_array_equal(batch["tokens"], [[7, 8, 9, 20, 21, 9, 30, 0]])
    np.testing.assert_array_equal(batch["targets"], [[0, 0, 20, 21, 2, 30, 2, 0]])
    np.testing.assert_array_equal(batch["mask"], [[0, 0, 1, 1, 1, 0, 1, 0]])
    prompt, one, two = BRANCHES, BRANCHES + 1, BRANCHES + 2
    np.testing.assert_array_equal(batch["segments"], [[prompt, prompt, one, one, one, two, two, 0]])
    np.testing.assert_array_equal(batch["positions"], [[0, 1, 2, 3, 4, 2, 3, 0]])
    np.testing.assert_array_equal(batch["logp"], [[0, 0, -1, -2, -3, -4, -5, 0]])
    np.testing.assert_array_equal(spans, [[0, 2, 5], [0, 5, 7]])


@pytest.mark.parametrize("seed", range(20))
def test_unpacking_gives_back_every_token_with_its_own_values(seed):
    examples = ragged(seed, 30)
    batch, spans = pack.pack(examples, length=48, fields=["logp", "top", "advantage"])
    unpacked = {name: pack.unpack(array, spans) for name, array in batch.items()}
    for index, example in enumerate(examples):
        tokens = np.asarray(example.tokens)
        np.testing.assert_array_equal(unpacked["tokens"][index], tokens[:-1])
        np.testing.assert_array_equal(unpacked["targets"][index], tokens[1:])
        np.testing.assert_array_equal(unpacked["mask"][index], np.asarray(example.mask)[1:])
        np.testing.assert_allclose(unpacked["logp"][index], -tokens[1:] / 7.0, rtol=1e-6)
        np.testing.assert_array_equal(unpacked["top"][index], np.stack([tokens, tokens + 1000], axis=-1)[1:])
        assert (unpacked["advantage"][index] == len(tokens)).all()
        row, start, stop = spans[index]
        assert batch["tokens"][row, stop] == tokens[-1]
        assert batch["mask"][row, stop] == 0
        assert len(set(batch["segments"][row, start : stop + 1])) == 1
        np.testing.assert_array_equal(batch["positions"][row, start : stop + 1], np.arange(len(tokens)))
    used = sum(len(example.tokens) for example in examples)
    assert (batch["segments"] > 0).sum() == used
    assert batch["mask"].sum() == sum(np.asarray(example.mask)[1:].sum() for example in examples)


@pytest.mark.parametrize("seed", range(20))
def test_each_answer_sees_its_whole_prompt_and_itself_and_nothing_else(seed):
    groups = groups_of(seed, 12)
    batch, spans = pack.pack_groups(groups, length=40, fields=["logp"])
    expected = [(group.prompt, answer) for group in groups for answer in group.answers]
    assert len(spans) == len(expected)
    for (prompt, answer), (row, start, stop) in zip(expected, spans, strict=True):
        segments = batch["segments"][row]
        query = segments[stop - 1]
        seen = np.arange(40) < stop
        seen &= (segments // BRANCHES == query // BRANCHES) & ((segments % BRANCHES == 0) | (segments == query))
        sequence = [*prompt, *answer.tokens]
        np.testing.assert_array_equal(batch["tokens"][row][seen], sequence[:-1])
        np.testing.assert_array_equal(batch["positions"][row][seen], np.arange(len(sequence) - 1))
        np.testing.assert_array_equal(batch["targets"][row, start:stop], answer.tokens)
        np.testing.assert_array_equal(batch["mask"][row, start:stop], answer.mask)
        np.testing.assert_allclose(batch["logp"][row, start:stop], answer.fields["logp"], rtol=1e-6)
    assert batch["mask"].sum() == sum(np.sum(answer.mask) for _, answer in expected)


def test_a_group_longer_than_a_row_repeats_its_prompt():
    answers = [pack.Example(tokens=[10 + i] * 4, mask=[1] * 4) for i in range(5)]
    batch, spans = pack.pack_groups([pack.Group(prompt=[1, 2, 3], answers=answers)], length=10)
    assert len(set(spans[:, 0])) == 3
    for row in set(spans[:, 0]):
        np.testing.assert_array_equal(batch["tokens"][row, :3], [1, 2, 3])


def test_more_answers_than_branches_are_split():
    answers = [pack.Example(tokens=[5], mask=[1])] * BRANCHES
    batch, _ = pack.pack_groups([pack.Group(prompt=[1, 2], answers=answers)], length=4 * BRANCHES)
    group, branch = np.divmod(batch["segments"][batch["segments"] > 0], BRANCHES)
    assert sorted(group[branch == 0]) == [1, 2]
    assert len(set(zip(group[branch > 0], branch[branch > 0], strict=True))) == BRANCHES
    assert batch["mask"].sum() == BRANCHES


def test_a_prompt_of_one_token_has_no_shared_part():
    answers = [pack.Example(tokens=[5, 6], mask=[1, 1]), pack.Example(tokens=[7], mask=[1])]
    batch, _ = pack.pack_groups([pack.Group(prompt=[1], answers=answers)], length=4)
    np.testing.assert_array_equal(batch["tokens"], [[1, 5, 1, 0]])
    np.testing.assert_array_equal(batch["targets"], [[5, 6, 7, 0]])
    np.testing.assert_array_equal(batch["positions"], [[0, 1, 0, 0]])


def test_packing_is_deterministic_and_follows_the_contract():
    one, two = (pack.pack(ragged(3, 50), length=64, fields=["top"]) for _ in range(2))
    assert set(FIELDS) <= set(one.batch)
    for name, array in one.batch.items():
        np.testing.assert_array_equal(array, two.batch[name])
        assert array.dtype == (np.float32 if name == "mask" else np.int32)
        assert array.shape[:2] == one.batch["tokens"].shape


def test_rows_come_in_few_sizes():
    assert [pack.bucket(n) for n in (1, 2, 3, 4, 5, 7, 9, 13, 17, 25)] == [1, 2, 3, 4, 6, 8, 12, 16, 24, 32]
    assert all(pack.bucket(n, multiple=8) % 8 == 0 and pack.bucket(n, multiple=8) >= n for n in range(1, 300))
    assert len({pack.bucket(n) for n in range(1, 1025)}) == 20
    assert pack.pack(ragged(0, 30), length=40, multiple=8).batch["tokens"].shape[0] % 8 == 0


def test_padding_rows_weigh_nothing():
    batch, _ = pack.pack(ragged(0, 3), length=64, rows=9)
    assert batch["tokens"].shape == (9, 64)
    empty = (batch["segments"] > 0).sum(axis=1) == 0
    assert empty.sum() >= 6
    assert batch["mask"][empty].sum() == 0


def test_what_does_not_fit_is_an_error_and_never_cut():
    examples = ragged(0, 10)
    longest = max(len(example.tokens) for example in examples)
    with pytest.raises(ValueError, match=f"has {longest} tokens"):
        pack.pack(examples, length=longest - 1)
    with pytest.raises(ValueError, match="rows=1"):
        pack.pack(examples, length=longest, rows=1)
    kept, dropped = pack.fitting(examples, length=longest - 1)
    assert len(kept) + dropped == 10
    assert dropped >= 1
    assert kept == [example for example in examples if len(example.tokens) < longest]
    long = pack.Group(prompt=[1, 2, 3], answers=[pack.Example(tokens=[4] * 9, mask=[1] * 9)])
    with pytest.raises(ValueError, match="9 tokens after a prompt of 3"):
        pack.pack_groups([long], length=10)


def test_missing_and_misaligned_values_are_named():
    with pytest.raises(ValueError, match="no 'reward'"):
        pack.pack(ragged(0, 2), length=64, fields=["reward"])
    with pytest.raises(ValueError, match="2 values of 'x'"):
        pack.pack([pack.Example(tokens=[1, 2, 3], mask=[0, 1, 1], fields={"x": [1.0, 2.0]})], length=4, fields=["x"])
    with pytest.raises(ValueError, match="3 tokens and 1 mask"):
        pack.pack([pack.Example(tokens=[1, 2, 3], mask=[1])], length=4)
    with pytest.raises(ValueError, match="has no token"):
        pack.pack_groups([pack.Group(prompt=[1], answers=[pack.Example(tokens=[], mask=[])])], length=4)
