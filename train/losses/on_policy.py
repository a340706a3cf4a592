"""On-policy distillation from several teachers, with long horizons, outcome rewards: advantages and weights per token.

The advantages go into `distill.mopd` or any loss of `policy`; the weights multiply the mask before a reduction.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from . import advantage, distill, masked


def of_teacher(per_teacher: Float[Array, "N *S"], teacher: Int[Array, "*S"]) -> Float[Array, "*S"]:
    """Of N teachers' log-probs of the sampled tokens, each token's own: exactly one teacher per token, no average."""
    return jnp.take_along_axis(per_teacher, teacher[None], axis=0)[0]


def teacher_weights(
    mask: Float[Array, "*S"], teacher: Int[Array, "*S"], weights: Float[Array, "N"]
) -> Float[Array, "*S"]:
    """The mask times the weight of each token's teacher; what the mask leaves out, padding and tool output, stays 0.

    Sum losses with it, and divide by the weight of the *mask*: the gradient is then the sum over teachers of their
    weight times their gradient. DeepSeek-V4, https://arxiv.org/abs/2606.19348, eq. 29; it does not publish w_i.
    """
    return mask.astype(jnp.float32) * weights.astype(jnp.float32)[teacher]


def with_outcome(
    teacher_advantage: Float[Array, "*S"], outcome_advantage: Float[Array, "*S"], *, alpha: float
) -> Float[Array, "*S"]:
    """The teacher's advantage + alpha times the answer's outcome advantage, held at each of its tokens; a constant.

    MiMo-V2-Flash, https://arxiv.org/abs/2601.02780, eq. 9; alpha is not published.
    """
    return lax.stop_gradient(teacher_advantage.astype(jnp.float32) + alpha * outcome_advantage.astype(jnp.float32))


def long_horizon_advantage(
    teacher_logp: Float[Array, "B T"],
    student_logp: Float[Array, "B T"],
    mask: Float[Array, "B T"],
    *,
    segments: Int[Array, "B T"],
    discount: float = 1.0,
) -> Float[Array, "B T"]:
    """Discounted sum of log teacher - log student from each token to the end of its answer.

    With discount 1 its policy gradient is that of the sequence-level KL(student || teacher): a token is charged for
    where it leads. With discount 0 it is `distill.sampled_token_advantage`.
    """
    gap = distill.sampled_token_advantage(teacher_logp, student_logp)
    return advantage.rewards_to_go(gap, mask, segments=segments, discount=discount)


def minillm_advantage(
    teacher_logp: Float[Array, "B T"],
    student_logp: Float[Array, "B T"],
    mask: Float[Array, "B T"],
    *,
    segments: Int[Array, "B T"],
    discount: float = 1.0,
) -> Float[Array, "B T"]:
    """The discounted *mean* of log teacher - log student from each token on, so that early tokens do not outweigh late.

    The normalisation removes the reward for short answers, at the price of a bias. MiniLLM,
    https://arxiv.org/abs/2306.08543, section 2.2; add `distill.reverse_kl` for its single-step term.
    """
    total = long_horizon_advantage(teacher_logp, student_logp, mask, segments=segments, discount=discount)
    weight = advantage.rewards_to_go(jnp.ones_like(total), mask, segments=segments, discount=discount)
    return jnp.where(mask != 0, total / jnp.where(mask != 0, weight, 1.0), 0.0)


def mixed_sampler_logp(
    teacher_logp: Float[Array, "*S"], student_logp: Float[Array, "*S"], *, teacher_share: float = 0.2
) -> Float[Array, "*S"]:
    """Log-prob of a token sampled from teacher_share T + (1 - teacher_share) S: the `behavior_logp` of such samples.

    Sampling partly from the teacher keeps a weak student off degenerate text. MiniLLM,
    https://arxiv.org/abs/2306.08543, section 2.2. Raises ValueError unless 0 < teacher_share < 1.
    """
    if not 0.0 < teacher_share < 1.0:
        raise ValueError(f"teacher_share={teacher_share} must lie between 0 and 1; at the ends there is no mixture.")
    teacher, student = (lax.stop_gradient(x.astype(jnp.float32)) for x in (teacher_logp, student_logp))
    return jnp.logaddexp(jnp.log(teacher_share) + teacher, jnp.log1p(-teacher_share) + student)


def per_teacher_mean(
    values: Float[Array, "*S"], mask: Float[Array, "*S"], teacher: Int[Array, "*S"], *, num_teachers: int
) -> Float[Array, "N"]:
    """Masked mean of a value over the tokens of each teacher, 0 for a teacher without any: a metric per domain."""
    own = teacher[None] == jnp.arange(num_teachers).reshape(-1, *(1,) * teacher.ndim)
    weights = jnp.where(own, mask[None], 0.0).reshape(num_teachers, -1)
    flat = jnp.broadcast_to(values[None], own.shape).reshape(num_teachers, -1)
    return masked.sequence_mean(flat, weights)
