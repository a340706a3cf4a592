"""Stages: the programs they plan are programs that compile, and small ones run from a file to a model."""

# pyright: reportArgumentType=false

import dataclasses
import importlib
import inspect
import json
import pkgutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy import Likes

from posttrain import train
from posttrain.data.conversations import Demonstrations, Files
from posttrain.data.preferences import Rankings
from posttrain.model.processing import Sampling
from posttrain.sharding import mesh as meshes
from posttrain.train import checkpoint, distill, evaluate, metrics, rl, sft, state
from posttrain.train.answers import Local
from posttrain.train.compare import Compare
from posttrain.train.compute import Compute
from posttrain.train.convert import Convert
from posttrain.train.curate import BestAndWorst, Curate, Pair
from posttrain.train.distill import Distill
from posttrain.train.evaluate import Evaluate, OverSeeds, Score, over_seeds, wilson
from posttrain.train.generate import Generate
from posttrain.train.merge import Dare, Linear, Slerp, TaskArithmetic, Ties
from posttrain.train.objective import Objective, UnbiasedKL
from posttrain.train.optimizer import AdamW
from posttrain.train.ppo import PPO, Ptx
from posttrain.train.prefer import KTO, Prefer
from posttrain.train.reward import Reward
from posttrain.train.rl import RL
from posttrain.train.sft import SFT
from posttrain.train.teaching import FullVocabulary, SampledToken, TopK

COMPUTE = Compute(row_tokens=48, micro_rows=8, slots=8)
SAMPLING = Sampling(max_tokens=4)
TASKS = Likes(domain="north")
SHARED = {"start": "tiny", "steps": 2, "compute": COMPUTE}
RANKINGS = Rankings(paths=("absent.jsonl",))
PAIR = {"models": ("tiny", "tiny")}
STAGES = [
    SFT(data=Demonstrations(tasks=TASKS), batch_size=8, **SHARED),
    RL(
        tasks=TASKS,
        sampling=SAMPLING,
        prompts=2,
        group=4,
        updates=2,
        objective=Objective(kl=UnbiasedKL(weight=0.1)),
        **SHARED,
    ),
    Distill(teachers={"north": "tiny"}, tasks=TASKS, sampling=SAMPLING, objective=FullVocabulary(), **SHARED),
    Distill(teachers={"north": "tiny"}, tasks=TASKS, sampling=SAMPLING, objective=SampledToken(), **SHARED),
    Distill(
        teachers={"north": "tiny"},
        tasks=TASKS,
        sampling=SAMPLING,
        objective=TopK(k=4),
        weights={"north": 2.0},
        on_policy=0.5,
        **SHARED,
    ),
    Evaluate(model="tiny", tasks=(TASKS,), sampling=SAMPLING, compute=COMPUTE),
    Prefer(data=RANKINGS, batch_size=8, **SHARED),
    Prefer(data=RANKINGS, objective=KTO(), **SHARED),
    Reward(data=RANKINGS, demonstrations=Demonstrations(tasks=TASKS), **SHARED),
    PPO(tasks=TASKS, sampling=SAMPLING, prompts=4, minibatches=2, ptx=Ptx(data=Demonstrations(tasks=TASKS)), **SHARED),
    Compare(models=("tiny",), tasks=TASKS, sampling=SAMPLING, compute=COMPUTE),
    Convert(source="tiny"),
    Linear(**PAIR),
    Slerp(**PAIR, base="tiny"),
    TaskArithmetic(**PAIR, base="tiny"),
    Ties(**PAIR, base="tiny"),
    Dare(**PAIR, base="tiny"),
    Generate(prompts=(TASKS,), teachers={"*": Local(model="tiny")}, sampling=SAMPLING, compute=COMPUTE),
    Curate(rows=("generated",), filters=()),
    Pair(rows=("generated",), pairing=BestAndWorst()),
    OverSeeds(evaluations=("eval",)),
]
HOST_ONLY = (Convert, Curate, Pair, OverSeeds)
MAKE_NO_MODEL = (Compare, Evaluate, Generate, Curate, Pair, OverSeeds)


def one_device():
    return meshes.make_mesh(devices=jax.devices()[:1])


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: type(stage).__name__)
def test_planned_programs_lower_on_eight_devices(stage):
    mesh = meshes.make_mesh(data=2, fsdp=2, tensor=2)
    planned = stage.programs(mesh)
    assert bool(planned) != isinstance(stage, HOST_ONLY)
    with jax.set_mesh(mesh):
        for name, program in planned.items():
            assert all(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(program.arguments)), name
            assert program.calls > 0 and "module" in program.trace().lower().as_text(), name


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: type(stage).__name__)
def test_a_stage_says_which_model_it_makes(stage):
    made = checkpoint.open_config("tiny").replace(output="score" if isinstance(stage, Reward) else "logits")
    assert stage.result() == (None if isinstance(stage, MAKE_NO_MODEL) else made)


def test_the_calls_of_a_stage_follow_from_its_settings():
    rl, mesh = STAGES[1], one_device()
    assert {name: one.calls for name, one in rl.programs(mesh).items()} == {
        "gradients": 2 * 2 * 1,  # steps, updates; four answers of a prompt and at most 48 tokens in micro-batches of 8
        "update": 2 * 2,
        "score": 2 * 2 * 2,  # by the policy before its updates and by the reference
        "decoder": 2,
        "prefill": 2,
        "decode": 2,  # 2 prompts x 4 answers fill the 8 slots once a step
    }
    assert rl.programs(mesh)["decode"].trips == SAMPLING.max_tokens


def test_every_stage_plans_its_programs():
    found = set()
    for module in pkgutil.iter_modules(train.__path__):
        for _, kind in inspect.getmembers(importlib.import_module(f"posttrain.train.{module.name}"), inspect.isclass):
            if dataclasses.is_dataclass(kind) and hasattr(kind, "train"):
                found.add(kind)
    assert found == {type(stage) for stage in STAGES}
    assert all(callable(kind.programs) and callable(kind.result) for kind in found)


def test_a_planned_step_is_the_step_that_trains(tmp_path):
    """The compiled plan, run on real arrays, takes the same step as the stage."""
    stage, mesh = dataclasses.replace(STAGES[0], steps=1), one_device()
    planned = stage.programs(mesh)
    gradients, update = planned["gradients"], planned["update"]
    model = checkpoint.open_model("tiny", mesh)
    stage.train(tmp_path / "sft", mesh)
    now = state.create(model.params, stage.optimizer.build(1), mesh)
    conversations = sft.Shuffled(stage.data.open(), seed=stage.seed)
    rows = sft.batch(model.tokenizer, [conversations[i] for i in range(8)], length=48)
    (micro,) = sft.micro_batches(rows, COMPUTE.rows(mesh), mesh)
    abstract_sums, _, abstract_batch = gradients.arguments
    assert jax.tree.map(jnp.shape, micro) == jax.tree.map(jnp.shape, abstract_batch)
    assert jax.tree.map(jnp.shape, now) == jax.tree.map(jnp.shape, update.arguments[0])
    zeros = jax.tree.map(lambda x: jax.device_put(jnp.zeros(x.shape, x.dtype), x.sharding), abstract_sums)
    with jax.set_mesh(mesh):
        sums = gradients.trace().lower().compile()(zeros, now.params, micro)
        after, _ = update.trace().lower().compile()(now, sums)
    for name, leaf in checkpoint.leaves(tmp_path / "sft", mesh):
        expected = after.params
        for key in name.split("."):
            expected = expected[key]
        np.testing.assert_allclose(leaf, expected, atol=1e-6)


def test_a_step_works_in_ten_lines_of_somebody_elses_program():
    model = checkpoint.open_model("tiny", one_device())
    optimizer = AdamW(learning_rate=1e-3).build(10)
    step = jax.jit(sft.train_step(model.config, optimizer))
    now = state.create(model.params, optimizer, one_device())
    chat = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]
    batch = sft.batch(model.tokenizer, [chat], length=32)
    now, first = step(now, batch)
    now, second = step(now, batch)
    assert second["loss"] < first["loss"] and first["weight"] == 2
    assert callable(rl.train_step(model.config, optimizer))
    assert callable(distill.train_step(model.config, optimizer, SampledToken()))


@pytest.fixture
def conversations(tmp_path):
    """A file with 24 good lines and a malformed one."""
    chats = [
        {"messages": [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": f"{i}."}]}
        for i in range(24)
    ]
    lines = [json.dumps(chat) for chat in chats]
    path = tmp_path / "chats.jsonl"
    path.write_text("\n".join([*lines[:7], '{"messages": [', *lines[7:]]) + "\n")
    return str(path)


def test_sft_learns_a_file_with_a_malformed_line(conversations, tmp_path, caplog):
    adam = AdamW(learning_rate=3e-3, warmup_steps=2)
    settings = {"start": "tiny", "steps": 12, "batch_size": 8, "optimizer": adam, "compute": COMPUTE}
    with pytest.raises(ValueError, match="1 of 25 lines are malformed and at most 1.00% may be; .*chats.jsonl:8"):
        SFT(data=Files(paths=(conversations,)), **settings).train(tmp_path / "strict", one_device())
    SFT(data=Files(paths=(conversations,), max_malformed=0.05), **settings).train(tmp_path / "sft", one_device())
    assert "left out a malformed line" in caplog.text and "chats.jsonl:8" in caplog.text
    lines = metrics.read(tmp_path / "sft" / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert lines[-1]["loss"] < 0.8 * lines[0]["loss"] and all(line["weight"] >= 8 * 3 for line in lines)
    model = checkpoint.open_model(tmp_path / "sft", one_device())
    assert model.tokenizer.fingerprint == checkpoint.open_tokenizer("tiny").fingerprint
    assert model.config == checkpoint.open_config("tiny")


def test_a_conversation_longer_than_a_row_is_an_error_that_says_so(conversations, tmp_path):
    short = dataclasses.replace(COMPUTE, row_tokens=8)
    stage = SFT(start="tiny", data=Files(paths=(conversations,), max_malformed=0.05), steps=1, compute=short)
    with pytest.raises(ValueError, match="^a conversation has \\d+ tokens and a row 8: raise row_tokens") as raised:
        stage.train(tmp_path / "sft", one_device())
    assert "\n" not in str(raised.value) and "?" in str(raised.value)


def test_converting_stores_the_very_weights(tmp_path):
    Convert(source="tiny").train(tmp_path / "ours", one_device())
    model = checkpoint.open_model("tiny", one_device())
    stored = checkpoint.open_model(str(tmp_path / "ours"), one_device())
    assert stored.config == model.config
    assert jax.tree.all(jax.tree.map(lambda a, b: bool(jnp.all(a == b)), stored.params, model.params))


def test_evaluation_judges_the_first_tasks_and_keeps_every_answer(tmp_path):
    stage = Evaluate(model="tiny", tasks=(TASKS, Likes(domain="south")), sampling=SAMPLING, limit=3, compute=COMPUTE)
    stage.train(tmp_path / "eval", one_device())
    scores = evaluate.read(tmp_path / "eval")
    assert list(scores) == ["north", "south"]
    for index, (domain, score) in enumerate(scores.items()):
        text = (tmp_path / "eval" / "rollouts" / f"{index:06d}.jsonl").read_text()
        rows = [json.loads(line) for line in text.splitlines()]
        assert [row["prompt"] for row in rows] == [f"{domain} {i}" for i in range(3)]
        np.testing.assert_allclose(score.mean, np.mean([row["reward"] for row in rows]))
        assert score.n == 3 and 0 <= score.low <= score.mean <= score.high <= 1


def test_sources_of_one_domain_share_its_score_and_an_evaluation_of_nothing_is_refused(tmp_path):
    tasks = (Likes(domain="north"), Likes(domain="north"), Likes(domain="south"))
    settings = {"model": "tiny", "sampling": SAMPLING, "compute": COMPUTE}
    Evaluate(tasks=tasks, limit=2, **settings).train(tmp_path, one_device())
    assert {domain: score.n for domain, score in evaluate.read(tmp_path).items()} == {"north": 4, "south": 2}
    for nothing in ({"tasks": tasks, "limit": 0}, {"tasks": (), "limit": 2}):
        with pytest.raises(ValueError, match="asks nothing"):
            Evaluate(**nothing, **settings)


def test_wilsons_interval_has_the_numbers_worked_out_by_hand():
    # p = 0.8, n = 10, z = 1.96: (0.8 + 3.8416/20 -+ 1.96 sqrt(0.016 + 3.8416/400)) / 1.38416
    score = wilson([1.0] * 8 + [0.0] * 2)
    np.testing.assert_allclose(score[:3], (0.8, 0.4902, 0.9433), atol=1e-4)
    assert score.n == 10
    # All right: low = n / (n + z^2), high = 1.
    np.testing.assert_allclose(wilson([1.0] * 4)[:3], (1.0, 4 / (4 + 1.959964**2), 1.0), atol=1e-12)
    np.testing.assert_allclose(wilson([0.0] * 4)[:3], (0.0, 0.0, 1.959964**2 / (4 + 1.959964**2)), atol=1e-12)
    wide, narrow = wilson([1.0, 0.0]), wilson([1.0, 0.0] * 500)
    assert wide.high - wide.low > 0.8 and narrow.high - narrow.low < 0.07


def test_the_interval_over_seeds_is_students_worked_out_by_hand(tmp_path):
    # Means 0.5, 0.6, 0.7: standard deviation 0.1, half = 4.3027 x 0.1 / sqrt(3).
    found = over_seeds([Score(mean, 0.0, 1.0, 10) for mean in (0.5, 0.6, 0.7)])
    np.testing.assert_allclose(found, (0.6, 0.6 - 0.24842, 0.6 + 0.24842, 30), atol=1e-4)
    assert over_seeds([Score(1.0, 0.9, 1.0, 5)] * 2) == (1.0, 1.0, 1.0, 10)
    assert over_seeds([Score(0.4, 0.3, 0.5, 5)]) == Score(0.4, 0.3, 0.5, 5)
    with pytest.raises(ValueError, match="over 1 to 10 seeds, not 11"):
        over_seeds([Score(0.4, 0.3, 0.5, 5)] * 11)
    for name, mean in (("a", 0.5), ("b", 0.7)):
        (tmp_path / name).mkdir()
        scores = {"sums": {"mean": mean, "low": 0, "high": 1, "n": 4}}
        (tmp_path / name / "scores.json").write_text(json.dumps(scores))
    OverSeeds(evaluations=(str(tmp_path / "a"), str(tmp_path / "b"))).train(tmp_path)
    assert evaluate.read(tmp_path)["sums"].mean == pytest.approx(0.6)
