"""Normalisers: how much each token of a batch counts, and what the sum is divided by.

`normaliser(mask, segments) -> (weights, divisor)`: a stage sums its loss with the weights, and the train step divides
the total by the sum of the divisors of the *global* batch. Where published recipes differ is this choice alone:

    per_token       every token counts the same: DAPO, OlmoRL, CISPO, SFT
    per_sequence    every answer counts the same, 1/|y| a token: GRPO, GSPO, DeepSeek-V3.2, MiMo's MOPD
    PerBudget       each token counts 1/L, with L the same for all answers: Dr. GRPO; L = 1 is RLOO's sum over tokens
"""

from collections.abc import Callable
from dataclasses import dataclass

from jaxtyping import Array, Float, Int

from . import masked

Normaliser = Callable[[Float[Array, "B T"], Int[Array, "B T"]], tuple[Float[Array, "B T"], Float[Array, ""]]]


def per_token(mask: Float[Array, "B T"], segments: Int[Array, "B T"]) -> tuple[Float[Array, "B T"], Float[Array, ""]]:
    """The mean over all tokens that count. DAPO, https://arxiv.org/abs/2503.14476, eq. 8."""
    return mask, masked.weight(mask)


def per_sequence(
    mask: Float[Array, "B T"], segments: Int[Array, "B T"]
) -> tuple[Float[Array, "B T"], Float[Array, ""]]:
    """The mean over answers of their means. GRPO, https://arxiv.org/abs/2402.03300, eq. 3."""
    weights = masked.per_sequence(mask, segments)
    return weights, masked.weight(weights)


@dataclass(frozen=True, kw_only=True)
class PerBudget:
    """The sum over tokens, divided by answers times `tokens`, whatever their lengths.

    Dr. GRPO, https://arxiv.org/abs/2503.20783, section 3.2, with the length limit as the budget: a long wrong answer is
    then not punished less per token than a short one. With 1, the mean over answers of the sum over their tokens.
    """

    tokens: int

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise ValueError(f"a budget of {self.tokens} tokens cannot be divided by: give the length limit of answers")

    def __call__(
        self, mask: Float[Array, "B T"], segments: Int[Array, "B T"]
    ) -> tuple[Float[Array, "B T"], Float[Array, ""]]:
        """See `Normaliser`."""
        answers = masked.weight(masked.per_sequence(mask, segments))
        return mask, answers * self.tokens
