"""Recipes of human feedback hand the right folders on; `Planning` runs them without training."""

import jax
import pytest

from posttrain.launch.plan import Planning
from posttrain.launch.recipes import instructgpt, prefer, reward
from posttrain.sharding import mesh as meshes
from posttrain.train import checkpoint
from posttrain.train.ppo import PPO
from posttrain.train.prefer import KTO, Prefer
from posttrain.train.reward import Ranked, Reward


@pytest.mark.parametrize("base", ["tiny", "llama3.1-8b"])
def test_instructgpt_goes_from_demonstrations_to_a_reward_model_to_ppo_with_and_without_pretraining(base, tmp_path):
    run = Planning(tmp_path, {})
    comparison = instructgpt.recipe(run, base=base)
    stages = dict(run.stages)
    assert list(stages) == ["sft", "eval-sft", "comparisons", "reward", "ppo", "eval-ppo", "ppo-ptx", "eval-ppo-ptx"]
    judge, sft = str(tmp_path / "reward"), str(tmp_path / "sft")
    judging = stages["reward"]
    assert isinstance(judging, Reward) and judging.start == sft and judging.objective == Ranked(answers=9)
    assert judging.data.paths == (f"{tmp_path}/comparisons/rankings.jsonl",)
    for name in ("ppo", "ppo-ptx"):
        stage = stages[name]
        assert isinstance(stage, PPO) and stage.start == sft and stage.critic_start == judge
        assert bool(stage.ptx) == (name == "ppo-ptx")
    assert (
        checkpoint.open_config(judge).output == "score" and checkpoint.open_config(tmp_path / "ppo").output == "logits"
    )
    assert [entry.name for entry in comparison.entries] == ["sft", "ppo", "ppo-ptx"]
    if base == "tiny":
        mesh = meshes.make_mesh(devices=jax.devices()[:1])
        assert all(len(stage.programs(mesh)) >= 2 for stage in stages.values())


def test_files_of_preferences_and_comparisons_train_in_one_stage_each(tmp_path):
    run = Planning(tmp_path, {})
    prefer.recipe(run, model="tiny", data=("labels.jsonl",), objective="kto")
    reward.recipe(run, model="tiny", data=("pairs.parquet",), answers=4, margins="large")
    (_, preferring), (_, judging) = run.stages
    assert isinstance(preferring, Prefer) and isinstance(preferring.objective, KTO)
    assert isinstance(judging, Reward) and judging.objective == Ranked(answers=4, margins=reward.LARGE_MARGINS)
