"""The peer's half of against_trl.py: TRL's DPOTrainer, timed on request.

Run by against_trl.py with the interpreter of an environment that has TRL; it needs nothing of posttrain. Reads one JSON
object a line (the settings first, then how many steps to take) and answers each with one.
"""
# pyright: reportMissingImports=none

import json
import os
import sys
import time
from importlib import metadata
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer


class Numbered(DPOTrainer):
    """The trainer on pairs that are token ids already."""

    def _prepare_dataset(self, dataset: Dataset, *_: Any, **__: Any) -> Dataset:
        return dataset


def build(settings: dict[str, Any]) -> DPOTrainer:
    """A trainer with the given weights and pairs, and the reference's log-probs computed."""
    model = AutoModelForCausalLM.from_pretrained(settings["model"], dtype=torch.float32)
    words = Tokenizer(models.WordLevel({"<eos>": 0}, unk_token="<eos>"))
    trainer = Numbered(
        model=model,
        args=DPOConfig(
            output_dir=settings["folder"], per_device_train_batch_size=settings["micro_pairs"], beta=settings["beta"],
            learning_rate=settings["learning_rate"], lr_scheduler_type="constant", max_grad_norm=1.0, weight_decay=0.0,
            max_length=None, precompute_ref_log_probs=True, gradient_checkpointing=False, use_cpu=True, bf16=False,
            report_to="none",
        ),
        train_dataset=Dataset.from_list(settings["data"]),
        processing_class=PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", pad_token="<eos>"),
    )  # fmt: skip
    trainer.create_optimizer_and_scheduler(num_training_steps=1_000_000)
    return trainer


def main() -> None:
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever the libraries print must not land between the replies
    trainer = build(json.loads(sys.stdin.readline()))
    batches = list(trainer.get_train_dataloader())
    trainer.model.train()
    answer: dict[str, Any] = {"trl": metadata.version("trl"), "torch": torch.__version__}
    while True:
        print(json.dumps(answer), file=replies, flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        steps, losses, start = json.loads(line)["steps"], [], time.perf_counter()
        for _ in range(steps):
            loss = 0.0
            for batch in batches:
                part = trainer.compute_loss(trainer.model, dict(batch)) / len(batches)
                part.backward()
                loss += part.item()
            torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), 1.0)
            trainer.optimizer.step()
            trainer.model.zero_grad()
            losses.append(loss)
        answer = {"seconds": time.perf_counter() - start, "losses": losses}


if __name__ == "__main__":
    main()
