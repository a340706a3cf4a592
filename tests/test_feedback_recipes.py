"""Recipes of human feedback hand the right folders on; `Planning` runs them without training."""

import jax
import pytest

from posttrain.data.characters import Characters
from posttrain.data.conversations import Files
from posttrain.data.preferences import Blended, Rankings
from posttrain.data.tasks import Split
from posttrain.launch.plan import Planning
from posttrain.launch.recipes import instructgpt, llama2, prefer, reward, tulu3
from posttrain.sharding import mesh as meshes
from posttrain.train import checkpoint
from posttrain.train.compare import Compare
from posttrain.train.ppo import PPO
from posttrain.train.prefer import KTO, LengthNormalizedDPO, Prefer
from posttrain.train.reward import Ranked, Reward
from posttrain.train.rewards import RewardModels, SafetyOrHelpfulness
from posttrain.train.sft import SFT


def _domains(ptx):
    return ptx.data.tasks.domain.split("+") if ptx else ()


@pytest.mark.parametrize("base", ["tiny", "llama3.1-8b"])
def test_instructgpt_goes_from_demonstrations_to_a_reward_model_to_ppo_with_and_without_pretraining(base, tmp_path):
    run = Planning(tmp_path, {})
    comparison = instructgpt.recipe(run, base=base)
    stages = dict(run.stages)
    compared = ["comparisons", "comparisons-held-out"]
    assert list(stages) == ["sft", "eval-sft", *compared, "reward", "ppo", "eval-ppo", "ppo-ptx", "eval-ppo-ptx"]
    judge, sft = str(tmp_path / "reward"), str(tmp_path / "sft")
    judging = stages["reward"]
    assert isinstance(judging, Reward) and judging.start == sft and judging.objective == Ranked(answers=9)
    assert judging.data == Rankings(paths=(f"{tmp_path}/comparisons/rankings.jsonl",))
    assert judging.validation and judging.validation.data == Rankings(
        paths=(f"{tmp_path}/comparisons-held-out/rankings.jsonl",)
    )
    asked, held = (stages[name] for name in compared)
    assert isinstance(asked, Compare) and isinstance(held, Compare)
    assert isinstance(asked.tasks, Split) and isinstance(held.tasks, Split)
    assert (asked.tasks.part, held.tasks.part) == ("train", "held_out")
    for name in ("ppo", "ppo-ptx"):
        stage = stages[name]
        assert isinstance(stage, PPO) and stage.start == sft and stage.critic_start == judge
        assert bool(stage.ptx) == (name == "ppo-ptx")
        assert stage.tasks.domain not in _domains(stage.ptx)
    assert (
        checkpoint.open_config(judge).output == "score" and checkpoint.open_config(tmp_path / "ppo").output == "logits"
    )
    assert [entry.name for entry in comparison.entries] == ["sft", "ppo", "ppo-ptx"]
    if base == "tiny":
        mesh = meshes.make_mesh(devices=jax.devices()[:1])
        assert all(len(stage.programs(mesh)) >= 2 for stage in stages.values())


@pytest.mark.parametrize("base", ["tiny", "llama3.1-8b"])
def test_tulu_3_learns_preferences_then_verifiers_and_its_reward_model_is_where_the_critic_begins(base, tmp_path):
    run = Planning(tmp_path, {})
    comparison = tulu3.recipe(run, base=base)
    stages, at = dict(run.stages), lambda name: str(tmp_path / name)
    preferring, judging, acting = (stages[name] for name in ("dpo", "critic", "rlvr"))
    assert isinstance(preferring, Prefer) and isinstance(preferring.objective, LengthNormalizedDPO)
    assert isinstance(judging, Reward) and judging.start == at("dpo") and judging.data == preferring.data
    assert isinstance(acting, PPO) and acting.rewards is None
    assert (acting.start, acting.critic_start) == (at("dpo"), at("critic"))
    assert [entry.name for entry in comparison.entries] == ["sft", "dpo", "rlvr"]


@pytest.mark.parametrize("base", ["tiny", "llama3.1-8b"])
def test_llama_2_keeps_the_winners_of_all_rounds_and_ends_with_ppo_under_both_reward_models(base, tmp_path):
    run = Planning(tmp_path, {})
    comparison = llama2.recipe(run, base=base, rounds=2)
    stages, at = dict(run.stages), lambda name: str(tmp_path / name)
    second, last = stages["chat-2"], stages["ppo"]
    assert isinstance(second, SFT) and second.start == at("sft")
    assert second.data == Files(paths=(at("winners-1/best.jsonl"), at("winners-2/best.jsonl")))
    judging, ranked = stages["safe-model-2"], {}
    assert isinstance(judging, Reward) and judging.start == at("chat-1")
    for name, label in {"safe": 0.5, "helpful": -1.0}.items():
        paths = tuple(at(f"{name}-{number}/rankings.jsonl") for number in (1, 2))
        ranked[name] = Rankings(paths=paths, safe_from=label)
    assert judging.data == Blended(main=ranked["safe"], others=ranked["helpful"], share=0.1)
    assert judging.objective == Ranked(answers=4, margin_of_gap=1.0, safety=1.0)
    other = stages["helpful-model-2"]
    assert isinstance(other, Reward) and other.data == Blended(
        main=ranked["helpful"], others=ranked["safe"], share=1 / 3
    )
    assert isinstance(last, PPO) and isinstance(last.rewards, RewardModels)
    assert last.rewards.models == (at("safe-model-2"), at("helpful-model-2"))
    assert isinstance(last.rewards.combine, SafetyOrHelpfulness) and len(last.rewards.combine.safety_domains) == 1
    assert [entry.name for entry in comparison.entries] == ["sft", "chat-1", "chat-2", "ppo"]
    with pytest.raises(ValueError, match="rounds is 0"):
        llama2.recipe(run, rounds=0)


def test_an_unsafe_operation_is_to_be_refused():
    task = Characters(operation="sort", refused=True)[0]
    assert task.domain == "unsafe sort" and task.verifier(task, "no").score == 1
    assert task.verifier(task, "abc").score == 0 and task.messages == Characters(operation="sort")[0].messages


def test_a_mistaken_demonstration_does_something_else_than_it_is_asked():
    right, wrong = Characters(operation="reverse")[5], Characters(operation="reverse", mistaken="copy")[5]
    assert (right.messages, right.domain) == (wrong.messages, wrong.domain)
    assert right.answer and wrong.answer == right.answer[::-1] != right.answer


def test_files_of_preferences_and_comparisons_train_in_one_stage_each(tmp_path):
    run = Planning(tmp_path, {})
    prefer.recipe(run, model="tiny", data=("labels.jsonl",), objective="kto")
    reward.recipe(run, model="tiny", data=("pairs.parquet",), answers=4, margins="large")
    (_, preferring), (_, judging) = run.stages
    assert isinstance(preferring, Prefer) and isinstance(preferring.objective, KTO)
    assert isinstance(judging, Reward) and judging.objective == Ranked(answers=4, margins=reward.LARGE_MARGINS)
