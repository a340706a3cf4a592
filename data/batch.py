"""The contract between data and training: which arrays a batch holds and what they mean."""

from collections.abc import Mapping

import numpy as np

Batch = Mapping[str, np.ndarray]
"""Arrays of shape [B, T], by name.

    tokens     int32    the input at each position
    targets    int32    the token that the position must predict
    mask       float32  weight of the prediction: 1 on tokens the policy chose (EOS included), 0 on prompts,
                        padding and tool output
    segments   int32    who may attend to whom (see below); 0 is padding
    positions  int32    rotary position, counted from 0 within each conversation

plus per-token fields that a loss names (advantage, behavior_logp, teacher_logp, ...), float32 unless said otherwise.

A segment id is `group * BRANCHES + branch`, group >= 1. Position q attends to an earlier position k of the same row if
both have the same group and k's branch is 0 or q's own. A plain packed conversation is a group with branch 0 only. A
prompt shared by several answers is branch 0, the answers are branches 1, 2, ...: each answer sees the prompt and
itself, and the prompt is computed once. Padding is never inferred from a token id.
"""

BRANCHES = 1024
FIELDS = ("tokens", "targets", "mask", "segments", "positions")
