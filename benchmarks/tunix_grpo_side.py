"""The peer's half of against_tunix_grpo.py: google-tunix's GRPO learner, timed step by step.

Run by against_tunix_grpo.py with the interpreter of an environment that has google-tunix. Reads one JSON object and
prints one.
"""
# pyright: reportMissingImports=none

import json
import os
import sys
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import optax
from tunix.rl import rl_cluster
from tunix.rl.grpo.grpo_learner import GRPOConfig, GRPOLearner
from tunix.rl.rollout.base_rollout import RolloutConfig
from tunix_side import Numbers, build


class Padded(Numbers):
    """Text is token ids with spaces between; an id that the model cannot have learned pads."""

    def __init__(self, eos: int, pad: int) -> None:
        super().__init__(eos)
        self.pad = pad

    def pad_id(self) -> int:
        return self.pad


def main() -> None:
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever the libraries print must not land in the reply
    given: dict[str, Any] = json.loads(sys.stdin.read())
    weights = dict(np.load(given["weights"]))
    lengths: list[int] = []
    began: list[float] = []
    total = given["warmup"] + given["steps"] + 1
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("fsdp", "tp"))
    roles = rl_cluster.Role
    adamw = optax.adamw(given["learning_rate"], weight_decay=0.0)
    training = rl_cluster.RLTrainingConfig(
        actor_optimizer=optax.chain(optax.clip_by_global_norm(1.0), adamw),
        eval_every_n_steps=1_000_000,
        max_steps=total,
        mini_batch_size=given["batch"],
        train_micro_batch_size=given["batch"],
    )
    rollout = RolloutConfig(
        max_tokens_to_generate=given["new"],
        max_prompt_length=given["width"],
        kv_cache_size=given["width"] + given["new"],
        temperature=1.0,
        top_p=1.0,
        eos_tokens=given["stops"],
    )
    cluster = rl_cluster.RLCluster(
        actor=build(given["model"], weights),
        reference=build(given["model"], weights),
        tokenizer=Padded(given["stops"][0], given["pad"]),
        cluster_config=rl_cluster.ClusterConfig(
            role_to_mesh={roles.ACTOR: mesh, roles.REFERENCE: mesh, roles.ROLLOUT: mesh},
            rollout_engine="vanilla",
            offload_to_cpu=False,
            training_config=training,
            rollout_config=rollout,
        ),
    )

    def reward(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        ids = [[int(word) for word in text.split()] for text in completions]
        # Its sampler cuts the stop token off; the model said it all the same.
        lengths.extend(min(len(one) + 1, given["new"]) for one in ids)
        return [sum(i < 128 for i in one) / max(len(one), 1) for one in ids]

    def batches() -> Iterator[dict[str, np.ndarray]]:
        texts = [" ".join(map(str, prompt)) for prompt in given["prompts"]]
        for step in range(total):
            began.append(time.perf_counter())
            first = step * given["batch"] % len(texts)
            yield {"prompts": np.array(texts[first : first + given["batch"]])}

    config = GRPOConfig(num_generations=given["group"], num_iterations=1, beta=given["kl"], epsilon=0.2)
    GRPOLearner(rl_cluster=cluster, reward_fns=reward, algo_config=config).train(batches())
    seconds = np.diff(began)[given["warmup"] :].tolist()
    print(json.dumps({"seconds": seconds, "tokens": float(np.mean(lengths))}), file=replies, flush=True)


if __name__ == "__main__":
    main()
