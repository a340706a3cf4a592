"""Optimizers as settings that can be written down and compared."""

from dataclasses import dataclass
from typing import Literal

import optax


@dataclass(frozen=True, kw_only=True)
class AdamW:
    """AdamW (https://arxiv.org/abs/1711.05101) with gradient clipping, warm-up and a schedule.

    `final` is the share of the peak learning rate that "linear" and "cosine" end at.
    """

    learning_rate: float
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: int = 0
    final: float = 0.0
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float = 1.0

    def build(self, steps: int) -> optax.GradientTransformation:
        """The optax transformation for a run of `steps` updates."""
        decay = max(steps - self.warmup_steps, 1)
        peak = self.learning_rate
        if self.schedule == "constant":
            after = optax.constant_schedule(peak)
        elif self.schedule == "linear":
            after = optax.linear_schedule(peak, peak * self.final, decay)
        else:
            after = optax.cosine_decay_schedule(peak, decay, alpha=self.final)
        warmup = optax.linear_schedule(peak / max(self.warmup_steps, 1), peak, max(self.warmup_steps - 1, 1))
        schedule = optax.join_schedules([warmup, after], [self.warmup_steps]) if self.warmup_steps else after
        adam = optax.adamw(schedule, b1=self.b1, b2=self.b2, eps=self.eps, weight_decay=self.weight_decay)
        return optax.chain(optax.clip_by_global_norm(self.clip_norm), adam)
