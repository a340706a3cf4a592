"""Reward models: packed comparisons cost what single answers' scores cost; rules that combine models."""

# pyright: reportArgumentType=false

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rows import make_row
from toy import Likes

from posttrain.data import chat, preferences
from posttrain.data.conversations import Demonstrations
from posttrain.data.preferences import Ranking, Rankings
from posttrain.model import config as configs
from posttrain.model import hf, transformer
from posttrain.sharding import mesh as meshes
from posttrain.train import checkpoint, metrics, reward, rollout
from posttrain.train.compute import Compute
from posttrain.train.losses import reward as losses
from posttrain.train.merge import Linear
from posttrain.train.optimizer import AdamW
from posttrain.train.reward import Pointwise, Ranked, Reward
from posttrain.train.rewards import NormalizedSum, RewardModels, SafetyOrHelpfulness, ScoreRows, WeightedSum
from posttrain.train.rollout import Rollout
from posttrain.train.validation import Agreement, agreement

TOKENIZER = checkpoint.open_tokenizer("tiny")
CONFIG = configs.ModelConfig(
    vocab_size=TOKENIZER.vocab_size, embed_dim=32, num_layers=1, num_heads=4, num_kv_heads=4, head_dim=8, mlp_dim=64,
    context=64, tie_embeddings=True, init_std=0.1, output="score",
)  # fmt: skip
COMPUTE = Compute(row_tokens=96, micro_rows=4)


def one_device():
    return meshes.make_mesh(devices=jax.devices()[:1])


@pytest.fixture(scope="module")
def params():
    return jax.jit(lambda key: transformer.init(CONFIG, key))(jax.random.key(0))


def ranking(question, scores, *answers, **changes) -> Ranking:
    prompt = ({"role": "user", "content": question},)
    said = tuple(({"role": "assistant", "content": text},) for text in answers)
    return Ranking(prompt, said, scores, **changes)


RANKED = [
    ranking("2+2?", (3.0, 1.0, 2.0), "4", "fish", "four or so"),
    ranking("no?", (1.0, 0.0), "yes, yes", "o"),
    ranking("a", (0.0, 0.5, 0.5), "bcd", "ef", "g"),
]


def alone(params, one: Ranking) -> list[float]:
    """The score of each answer, from a row of its own, at the position of its last token."""
    found = []
    for answer in one.answers:
        tokens, mask = chat.render_with_mask(TOKENIZER, (*one.prompt, *answer))
        tokens = tokens[: int(np.flatnonzero(mask)[-1]) + 1]
        assert tokens[-1] in TOKENIZER.eos_ids
        row = np.zeros((1, 64), np.int32)
        row[0, : len(tokens)] = tokens
        inside = np.where(np.arange(64) < len(tokens), 1024, 0)[None].astype(np.int32)
        found.append(float(_values(params, row, inside)[0, len(tokens) - 1]))
    return found


@jax.jit
def _values(params, row, inside):
    positions = jnp.arange(64, dtype=jnp.int32)[None]
    return transformer.score(
        CONFIG, params, transformer.apply(CONFIG, params, row, positions=positions, segments=inside)[0]
    )


def test_all_pairs_of_a_prompt_in_one_row_cost_what_the_matrix_of_their_scores_does(params):
    objective = Ranked(answers=3)
    batch = reward.batch(TOKENIZER, RANKED, objective, length=96)
    found = [alone(params, one) for one in RANKED]
    np.testing.assert_allclose(
        reward.scores((CONFIG, params), [preferences.group(TOKENIZER, one) for one in RANKED], COMPUTE, one_device()),
        np.concatenate(found), atol=1e-4,
    )  # fmt: skip
    scores, ranks, mask = (np.zeros((3, 3), np.float32) for _ in range(3))
    for i, (one, values) in enumerate(zip(RANKED, found, strict=True)):
        n = len(values)
        scores[i, :n], ranks[i, :n], mask[i, :n] = values, one.scores, 1
    expected = losses.k_wise(jnp.asarray(scores), losses.ranked_pairs(jnp.asarray(ranks), jnp.asarray(mask)))
    total, weight, sums = jax.jit(objective.loss(CONFIG))(params, batch)
    np.testing.assert_allclose(total, np.sum(expected), rtol=1e-4)
    np.testing.assert_allclose(weight, 3, rtol=1e-6)
    assert 0 <= sums["accuracy"] <= 3


def test_margins_and_safety_labels_count_as_in_llama_2(params):
    pairs = [
        ranking("2+2?", (1.0, 0.0), "4", "fish", rating="better", safe=(1.0, 0.0)),
        ranking("no?", (1.0, 0.0), "yes, yes", "o", rating="negligibly better"),
    ]
    objective = Ranked(margins=losses.LARGE_MARGINS, safety=0.5)
    total, weight, _ = jax.jit(objective.loss(CONFIG))(params, reward.batch(TOKENIZER, pairs, objective, length=96))
    (c, r), (c2, r2) = (alone(params, one) for one in pairs)
    log_sigmoid = lambda x: -np.log1p(np.exp(-x))  # noqa: E731
    ranked = -log_sigmoid(c - r - 2.0) - log_sigmoid(c2 - r2)
    np.testing.assert_allclose(total, ranked - 0.5 * 0.5 * (log_sigmoid(c) + log_sigmoid(-r)), rtol=1e-4)
    assert weight == 2


def test_a_margin_of_the_gap_grows_with_the_difference_of_two_scores(params):
    one, objective = ranking("no?", (0.75, 0.25), "yes, yes", "o"), Ranked(margin_of_gap=3.0)
    total, _, _ = jax.jit(objective.loss(CONFIG))(params, reward.batch(TOKENIZER, [one], objective, length=96))
    better, worse = alone(params, one)
    np.testing.assert_allclose(total, np.log1p(np.exp(-(better - worse - 1.5))), rtol=1e-4)


def test_others_are_the_share_of_a_blend_that_they_should_be_and_main_is_in_it_whole(tmp_path):
    for name in ("safe", "helpful"):
        lines = [{"prompt": f"{name} {i}", "responses": ["a", "b"], "scores": [1.0, 0.25]} for i in range(18)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    safe = Rankings(paths=(str(tmp_path / "safe.jsonl"),), safe_from=0.5)
    helpful = Rankings(paths=(str(tmp_path / "helpful.jsonl"),), safe_from=-1.0)
    blend = preferences.Blended(main=safe, others=helpful, share=0.1).open()
    found = [(one.prompt[0]["content"], one.safe) for one in (blend[i] for i in range(len(blend)))]
    assert {text for text, _ in found if "safe" in text} == {f"safe {i}" for i in range(18)}
    assert {labels for text, labels in found if "safe" in text} == {(1.0, 0.0)}
    assert [labels for text, labels in found if "helpful" in text] == [(1.0, 1.0)] * 2
    with pytest.raises(ValueError, match="share is 1"):
        preferences.Blended(main=safe, others=helpful, share=1.0)


def test_labels_in_between_pull_the_score_to_their_logit(params):
    labelled = [ranking("2+2?", (0.25,), "4"), ranking("no?", (1.0, 0.0), "yes", "o")]
    total, weight, _ = jax.jit(Pointwise().loss(CONFIG))(
        params, reward.batch(TOKENIZER, labelled, Pointwise(), length=96)
    )
    scores, labels = np.concatenate([alone(params, one) for one in labelled]), np.array([0.25, 1, 0])
    np.testing.assert_allclose(total, np.sum(np.log1p(np.exp(scores)) - labels * scores), rtol=1e-4)
    assert weight == 3


@pytest.mark.parametrize(
    ("objective", "one", "message"),
    [
        (Ranked(), RANKED[0], "has 3 answers and answers is 2: raise it"),
        (Ranked(), ranking("x", (1.0, 1.0), "a", "b"), "rank no answer above another"),
        (Pointwise(), RANKED[0], r"not all in \[0, 1\]"),
    ],
)
def test_what_an_objective_cannot_learn_from_is_an_error(objective, one, message):
    with pytest.raises(ValueError, match=message):
        reward.batch(TOKENIZER, [one], objective, length=96)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Two reward models that learned to prefer answers with a y, from different heads; the first is normalised."""
    folder = tmp_path_factory.mktemp("reward")
    rows = [{"prompt": f"q{i}?", "chosen": f"yy {i}", "rejected": f"n{i}"} for i in range(24)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        "start": "tiny", "data": Rankings(paths=(str(folder / "pairs.jsonl"),)), "steps": 6, "batch_size": 8,
        "compute": COMPUTE, "optimizer": AdamW(learning_rate=1e-3),
    }  # fmt: skip
    shown = Demonstrations(tasks=Likes(domain="north"))
    Reward(**settings, demonstrations=shown).train(folder / "one", one_device())
    judged = Agreement(data=settings["data"], every=2, limit=8)
    Reward(**settings, seed=1, validation=judged).train(folder / "two", one_device())
    return folder


def test_a_reward_model_learns_and_gives_demonstrations_the_mean_zero(trained):
    lines = metrics.read(trained / "one" / "metrics.jsonl")
    assert lines[-1]["accuracy"] == 1 and lines[-1]["loss"] < 0.5 * lines[0]["loss"]
    model = checkpoint.open_model(trained / "one", one_device())
    assert model.config.output == "score" and "score" in model.params
    shown = Demonstrations(tasks=Likes(domain="north")).open()
    groups = [
        preferences.group(TOKENIZER, Ranking(s[:-1], (s[-1:],), (1.0,))) for s in map(shown.__getitem__, range(16))
    ]
    found = reward.scores((model.config, model.params), groups, COMPUTE, one_device())
    np.testing.assert_allclose(np.mean(found), 0, atol=1e-5)
    assert np.std(found) > 1e-3


def test_the_reward_model_that_agrees_most_with_held_out_rankings_is_kept(trained):
    scored = json.loads((trained / "two" / "validation.json").read_text())
    assert [one["step"] for one in scored] == [0, 2, 4, 6]
    assert scored[0]["score"] < 1 and scored[-1]["score"] == 1
    best = checkpoint.open_model(trained / "two" / "best", one_device())
    pairs = Rankings(paths=(str(trained / "pairs.jsonl"),)).open()
    groups = [preferences.group(TOKENIZER, pairs[i]) for i in range(8)]
    found = reward.scores((best.config, best.params), groups, COMPUTE, one_device()).reshape(8, 2)
    assert np.all(found[:, 0] > found[:, 1])
    assert agreement((2.0, 1.0, 1.0, 3.0), (0.5, 0.7, 0.1, 0.9)) == 4 / 5  # of six pairs one is a tie
    assert agreement((0.8,), (-0.1,)) == 0 and agreement((0.2,), (-0.1,)) == 1
    with pytest.raises(ValueError, match="rank no answer above another"):
        agreement((1.0, 1.0), (0.1, 0.2))


def rollouts(*texts: str, domain: str = "north") -> list[Rollout]:
    task = Likes(domain=domain)[0]
    prompt = chat.render(TOKENIZER, task.messages, add_generation_prompt=True)
    shared = {"task": task, "prompt": prompt, "reward": 0.5, "reason": "fine", "finish": "stop", "version": 0}
    tokens = [np.asarray([*TOKENIZER.encode(text), TOKENIZER.eos_ids[0]]) for text in texts]
    return [Rollout(tokens=one, logp=np.zeros(len(one), np.float32), **shared) for one in tokens]


def test_reward_models_score_the_sampled_tokens_alone_together_and_averaged(trained):
    groups, mesh = [rollouts("yy 1", "n1"), rollouts("yy 77")], one_device()
    paths = tuple(str(trained / name) for name in ("one", "two"))
    policy = checkpoint.open_model("tiny", mesh)
    single = [RewardModels(models=(path,)).open(TOKENIZER, COMPUTE, mesh)(policy, groups) for path in paths]
    assert single[0].shape == (3,) and single[0][1] < min(single[0][0], single[0][2])
    both = RewardModels(models=paths, combine=WeightedSum(weights=(0.25, 2.0))).open(TOKENIZER, COMPUTE, mesh)
    np.testing.assert_allclose(both(policy, groups), 0.25 * single[0] + 2 * single[1], rtol=1e-4)
    said = rollout.rewarded(groups, single[0])
    assert said[1][0].reward == single[0][2] and said[1][0].verdict == 0.5
    assert rollout.statistics(said)["verdict"] == 0.5 and "verdict" not in rollout.statistics(groups)
    written = [make_row(text, question=groups[0][0].task.messages[0]["content"], id=text) for text in ("yy 1", "n1")]
    np.testing.assert_allclose(
        ScoreRows(models=paths[:1], compute=COMPUTE).open(mesh)(written), single[0][:2], rtol=1e-4
    )
    Linear(models=paths).train(trained / "average", mesh)
    average = checkpoint.open_model(trained / "average", mesh)
    parents = [checkpoint.open_model(path, mesh).params for path in paths]
    for name in ("score", "score_bias", "embedding"):
        np.testing.assert_allclose(
            average.params[name], (parents[0][name] + parents[1][name]) / 2, rtol=1e-5, atol=1e-7
        )
    assert RewardModels(models=(str(trained / "average"),)).open(TOKENIZER, COMPUTE, mesh)(policy, groups).shape == (3,)


def test_llama_2s_rule_takes_the_safety_score_where_it_must_and_whitens():
    scores = jnp.array([[-3.0, 5.0], [2.0, 1.0], [2.0, -1.0], [4.0, 9.0]])
    answers = [*rollouts("a", "b", "c"), *rollouts("d", domain="danger")]
    chosen = np.array([-3.0, 1.0, -1.0, 4.0])  # unsafe, helpful, helpful, marked
    found = SafetyOrHelpfulness(safety_domains=("danger",))(scores, answers)
    np.testing.assert_allclose(found, (chosen - chosen.mean()) / chosen.std(), rtol=1e-5)


def test_normalised_scores_weigh_the_same_whatever_their_scale():
    scores = jnp.array([[1.0, 900.0], [2.0, 100.0], [3.0, 500.0]])
    found = NormalizedSum()(scores, rollouts("a", "b", "c"))
    np.testing.assert_allclose(
        found, NormalizedSum()(scores / jnp.array([[1.0, 1000.0]]), rollouts("a", "b", "c")), rtol=1e-4
    )
    np.testing.assert_allclose(np.sum(found), 0, atol=1e-5)
    with pytest.raises(ValueError, match="3 weights .* and 2 reward models"):
        WeightedSum(weights=(1.0, 2.0, 3.0))(scores, rollouts("a", "b", "c"))


def test_each_kind_of_model_is_refused_where_the_other_belongs(trained, params):
    with pytest.raises(ValueError, match="tiny is a language model and no reward model"):
        RewardModels(models=("tiny",)).open(TOKENIZER, COMPUTE, one_device())
    with pytest.raises(ValueError, match="gives scores, not logits"):
        transformer.logits(CONFIG, params, jnp.zeros((1, 1, 32)))
    with pytest.raises(ValueError, match="without a scalar head"):
        transformer.score(CONFIG.replace(output="logits"), params, jnp.zeros((1, 1, 32)))
    with pytest.raises(ValueError, match="no place in a causal language model"):
        hf.save_hf(trained / "hf", CONFIG, params)
