"""Preferences: each objective's loss from the model is the one that log-probs of single answers give; the reference's
identity is held; the stage learns."""

# pyright: reportArgumentType=false

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest
from rows import make_row
from toy import Likes

from posttrain.data import chat, pairs, preferences, shards, source
from posttrain.data.pack import pack_groups
from posttrain.data.preferences import Paired, Ranking, Rankings
from posttrain.model import config as configs
from posttrain.model import transformer
from posttrain.model.processing import Sampling
from posttrain.sharding import mesh as meshes
from posttrain.train import checkpoint, fingerprint, metrics, prefer, reference, score
from posttrain.train.compute import Compute
from posttrain.train.optimizer import AdamW
from posttrain.train.prefer import DPO, IPO, KTO, ORPO, LengthNormalizedDPO, Prefer, SimPO
from posttrain.train.validation import Validation

TOKENIZER = checkpoint.open_tokenizer("tiny")
CONFIG = configs.ModelConfig(
    vocab_size=TOKENIZER.vocab_size, embed_dim=32, num_layers=1, num_heads=4, num_kv_heads=4, head_dim=8, mlp_dim=64,
    context=64, tie_embeddings=True, init_std=0.1,
)  # fmt: skip
COMPUTE = Compute(row_tokens=64, micro_rows=4)


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def pair(question: str, chosen: str, rejected: str) -> Ranking:
    return preferences.ranking({"prompt": question, "chosen": chosen, "rejected": rejected})


PAIRS = [pair("2+2?", "4", "fish"), pair("no?", "yes, yes", "o"), pair("a", "bcd", "ef"), pair("who", "I", "you")]


def one_device():
    return meshes.make_mesh(devices=jax.devices()[:1])


@pytest.fixture(scope="module")
def models():
    """Policy and reference."""
    make = jax.jit(lambda key: transformer.init(CONFIG, key))
    return make(jax.random.key(0)), make(jax.random.key(1))


def single(params, ranking: Ranking, which: int) -> tuple[float, int]:
    """Log-prob and length of one answer, from a row with nothing else."""
    tokens, mask = chat.render_with_mask(TOKENIZER, (*ranking.prompt, *ranking.answers[which]))
    row = {
        "tokens": np.zeros((1, 64), np.int32),
        "targets": np.zeros((1, 64), np.int32),
        "segments": np.zeros((1, 64), np.int32),
        "positions": np.arange(64, dtype=np.int32)[None],
    }
    n = len(tokens) - 1
    row["tokens"][0, :n], row["targets"][0, :n], row["segments"][0, :n] = tokens[:-1], tokens[1:], 1024
    logp = np.asarray(score.token_logp(CONFIG, params, row))[0, :n]
    return float(np.sum(logp * mask[1:])), int(np.sum(mask[1:]))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def by_hand(objective, h, logp, length):
    """The mean loss of pairs, [P, 2] each: log ratios, log-probs, lengths; the chosen answer first."""
    means, gap = logp / length, h[:, 0] - h[:, 1]
    nll = -means[:, 0]
    if isinstance(objective, DPO):
        return np.mean(-np.log(sigmoid(objective.beta * gap)) + objective.nll * nll)
    if isinstance(objective, LengthNormalizedDPO):
        return np.mean(-np.log(sigmoid(objective.beta * (h / length) @ [1, -1])))
    if isinstance(objective, IPO):
        return np.mean((gap - 1 / (2 * objective.tau)) ** 2)
    if isinstance(objective, SimPO):
        return np.mean(-np.log(sigmoid(objective.beta * means @ [1, -1] - objective.gamma)))
    odds = np.log(np.exp(means) / (1 - np.exp(means)))
    return np.mean(nll - objective.weight * np.log(sigmoid(odds @ [1, -1])))


@pytest.mark.parametrize(
    "objective", [DPO(nll=0.3), LengthNormalizedDPO(), IPO(tau=0.5), SimPO(), ORPO(weight=0.5)], ids=type
)
def test_a_packed_pair_costs_what_its_answers_cost_alone(objective, models):
    policy, base = models
    batch = prefer.batch(TOKENIZER, PAIRS, length=64)
    assert batch["tokens"].shape[0] < 4 and set(np.unique(batch["segments"] % 1024)) == {0, 1, 2}
    if objective.reference:
        batch = {**batch, "reference_logp": np.asarray(score.token_logp(CONFIG, base, batch))}
    found = np.array([[single(policy, one, which) for which in (0, 1)] for one in PAIRS])
    known = np.array([[single(base, one, which)[0] for which in (0, 1)] for one in PAIRS])
    logp, length = found[..., 0], found[..., 1]
    total, weight, sums = jax.jit(objective.loss(CONFIG))(policy, batch)
    assert weight == 4
    np.testing.assert_allclose(total / weight, by_hand(objective, logp - known, logp, length), rtol=1e-4)
    np.testing.assert_allclose(sums["logp_rejected"] / 4, logp[:, 1].mean(), rtol=1e-4)
    np.testing.assert_allclose(sums["nll"] / 4, -(logp / length)[:, 0].mean(), rtol=1e-4)


def test_kto_measures_answers_against_those_to_the_next_other_prompt(models):
    policy, base = models
    labels = [Ranking(one.prompt, one.answers[:1], (label,)) for one, label in zip(PAIRS, (1.0, 0, 1, 0), strict=True)]
    labels.insert(1, labels[0]._replace(answers=PAIRS[1].answers[1:], scores=(0.0,)))  # the same prompt once more
    examples = KTO().examples(labels)
    assert [one.answers[1] for one in map(examples.__getitem__, range(5))] == [
        labels[i].answers[0] for i in (2, 2, 3, 4, 0)
    ]
    objective = KTO(beta=0.5, desirable_weight=1.0, undesirable_weight=2.0)
    groups = [prefer._group(TOKENIZER, examples[i]) for i in range(5)]
    ratios = np.array([[single(p, examples[i], k)[0] for k in (0, 1)] for p in (policy, base) for i in range(5)])
    h = ratios[:5] - ratios[5:]
    known = [prefer._with_reference(group, scores(base, [group])) for group in groups]
    (z0,) = objective.constants(functools.partial(scores, policy), known)
    np.testing.assert_allclose(z0, max(0.0, h[:, 1].mean()), rtol=1e-3)
    z0 = np.float32(0.7)
    packed = prefer._packed(objective.trained(known), 64, ("good", "reference_logp")).batch
    total, weight, _ = jax.jit(objective.loss(CONFIG))(policy, packed, z0)
    gain = 0.5 * (h[:, 0] - z0)
    good = np.array([one.scores[0] for one in labels]) > 0
    np.testing.assert_allclose(total, np.sum(np.where(good, sigmoid(-gain), 2 * sigmoid(gain))), rtol=1e-4)
    assert weight == 5


def scores(params, groups):
    packed = pack_groups(groups, length=64)
    return score.examples(lambda micro: score.token_logp(CONFIG, params, micro), packed, COMPUTE, one_device())


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"q{i}?", "chosen": f"yes {i}", "rejected": f"no no {i}"} for i in range(12)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def stage(file, **settings) -> Prefer:
    adam = AdamW(learning_rate=1e-3)
    given = {"start": "tiny", "steps": 3, "batch_size": 6, "optimizer": adam, "compute": COMPUTE}
    return Prefer(**{"data": Rankings(paths=(str(file),)), **given, **settings})


def test_the_first_step_costs_log_two_and_the_next_ones_less(file, tmp_path):
    asked = Validation(tasks=Likes(domain="north"), sampling=Sampling(max_tokens=4), every=2, limit=4)
    stage(file, validation=asked).train(tmp_path / "dpo", one_device())
    lines = metrics.read(tmp_path / "dpo" / "metrics.jsonl")
    np.testing.assert_allclose(lines[0]["loss"], np.log(2), rtol=1e-6)
    assert lines[0]["margin"] == 0 and lines[-1]["accuracy"] == 1 and lines[-1]["loss"] < 0.6
    assert [one["step"] for one in json.loads((tmp_path / "dpo" / "validation.json").read_text())] == [0, 2, 3]
    assert checkpoint.open_config(tmp_path / "dpo" / "best").output == "logits"


def test_reference_log_probs_are_computed_once_and_refused_for_another_reference(file, tmp_path, monkeypatch):
    mesh, groups = one_device(), [preferences.group(TOKENIZER, one) for one in PAIRS]
    settings = {"groups": groups.__getitem__, "wanted": range(4), "compute": COMPUTE, "mesh": mesh}
    model = checkpoint.open_model("tiny", mesh)
    checkpoint.save_model(tmp_path / "base" / "model", model)
    monkeypatch.setattr(reference, "SHARD", 3)
    first = reference.Reference(tmp_path / "kept", str(tmp_path / "base"), **settings)
    assert sorted(path.name for path in (tmp_path / "kept").glob("*.npz")) == ["000000.npz", "000001.npz"]
    (tmp_path / "kept" / "000001.npz").unlink()  # as if interrupted
    with monkeypatch.context() as patch:
        scored = []
        compute = reference._score
        patch.setattr(reference, "_score", lambda m, g, *rest: scored.append(len(g)) or compute(m, g, *rest))
        second = reference.Reference(tmp_path / "kept", str(tmp_path / "base"), **settings)
    assert scored == [1]
    for i, group in enumerate(groups):
        for ours, theirs, answer in zip(first.logp(i, group), second.logp(i, group), group.answers, strict=True):
            assert np.array_equal(ours, theirs) and ours.shape == (len(answer.tokens),)
    with pytest.raises(ValueError, match="the data has changed; delete that folder"):
        second.logp(0, groups[1])
    with pytest.raises(ValueError, match="holds the log-probs of other prompts"):
        reference.Reference(tmp_path / "kept", str(tmp_path / "base"), **{**settings, "wanted": [3, 2, 1, 0]})
    moved = dict(model.params)
    moved["final_norm"] = moved["final_norm"].at[3].add(1e-6)
    checkpoint.save_model(tmp_path / "base" / "model", model._replace(params=moved))
    with pytest.raises(ValueError, match="holds log-probs of another reference .*differs in weights.*delete that"):
        reference.Reference(tmp_path / "kept", str(tmp_path / "base"), **settings)


def test_a_fingerprint_is_the_same_on_every_mesh_and_sees_one_bit_and_swapped_elements():
    model = checkpoint.open_model("tiny", one_device())
    sharded = checkpoint.open_model("tiny", meshes.make_mesh(data=2, fsdp=2, tensor=2))
    expected = fingerprint.of(model.params)
    moved = jax.device_put(model.params, jax.tree.map(lambda x: x.sharding, sharded.params))
    assert fingerprint.of(moved) == expected
    table = np.array(model.params["embedding"])
    for change in ("bit", "swap"):
        changed = table.copy()
        if change == "bit":
            changed.view(np.uint32)[5, 7] ^= 1
        else:
            changed[[0, 1]] = changed[[1, 0]]
        assert fingerprint.of({**model.params, "embedding": jax.numpy.asarray(changed)}) != expected


def test_a_pair_that_does_not_fit_in_a_row_is_an_error_that_says_so(file, tmp_path):
    short = dataclasses.replace(COMPUTE, row_tokens=16)
    with pytest.raises(ValueError, match="take \\d+ tokens and a row has 16: raise row_tokens"):
        stage(file, compute=short).train(tmp_path / "dpo", one_device())


USER, GOOD, BAD = turn("user", "hi"), turn("assistant", "hello"), turn("assistant", "go away")


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "hi", "chosen": "hello", "rejected": "go away"},
        {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": "hi", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
    ],
)
def test_pairs_are_read_in_the_formats_of_the_field(record):
    found = preferences.ranking(record)
    assert found == Ranking((USER,), ((GOOD,), (BAD,)), (1.0, 0.0))
    assert source.preference(record) == ((USER,), (GOOD,), (BAD,))


def test_an_earlier_answer_that_both_share_stays_in_the_prompt_and_is_not_trained():
    history = [USER, GOOD, turn("user", "and now?")]
    found = preferences.ranking({"chosen": [*history, GOOD], "rejected": [*history, BAD]})
    assert found.prompt == tuple(history)
    group = preferences.group(TOKENIZER, found)
    assert list(group.prompt) == chat.render(TOKENIZER, history, add_generation_prompt=True)
    said = TOKENIZER.decode(list(group.answers[1].tokens))
    assert said.startswith("go away") and group.answers[1].tokens[-1] in TOKENIZER.eos_ids


def test_pairs_of_generated_rows_are_read_from_their_folders(tmp_path):
    rows = [make_row(text, id=text) for text in ("4", "5")]
    shards.write_pairs(tmp_path / "pairs", [pairs.Pair(chosen=rows[0], rejected=rows[1])], title="Sums")
    found = Paired(folders=(str(tmp_path),)).open()
    assert len(found) == 1 and found[0] == Ranking(rows[0].prompt, (rows[0].response, rows[1].response), (1.0, 0.0))


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": "x", "chosen": "same", "rejected": "same"}, "are the same"),
        ({"prompt": "x", "chosen": "a", "rejected": "b", "rating": "best"}, "'best' and none of significantly better"),
        ({"prompt": "x", "chosen": "a", "rejected": "b", "chosen_is_safe": True}, "for one of its answers"),
        ({"prompt": "x", "responses": ["a", "b"], "scores": [1]}, "one number for each"),
        ({"prompt": "x", "completion": "a", "label": "good"}, "'good' as label; give a number"),
        ({"chosen": "a", "rejected": "b"}, r"lacks \['prompt'\]"),
        ({"prompt": "x"}, "needs prompt with chosen and rejected"),
    ],
)
def test_what_cannot_be_read_is_an_error_that_says_why(record, message):
    with pytest.raises(ValueError, match=message):
        preferences.ranking(record)


def test_a_pair_of_equals_is_refused_and_a_ranking_gives_its_best_and_worst():
    answers = tuple((turn("assistant", text),) for text in "abc")
    ranked = [Ranking((USER,), answers, (0.2, 0.9, 0.1)), Ranking((USER,), answers, (1.0, 1.0, 1.0))]
    found = DPO().examples(ranked)
    assert found[0].answers == (answers[1], answers[2]) and found[0].scores == (1.0, 0.0)
    with pytest.raises(ValueError, match="record 1 has 3 answers .* none is better"):
        found[1]
