"""A mixture of experts in a feed-forward's place: a token goes to the k of E experts that its router scores highest.

No token is dropped, whatever the load: the choices of all tokens are sorted by expert and multiplied group by group,
by `jax.lax.ragged_dot`. On TPUs that is a grouped product which skips rows that are in no group; on CPUs XLA multiplies
all rows by all experts, which tests can pay. A partitioner cannot split a sort of all tokens, so each device sorts its
own: it sees the tokens of its whole expert axis, gathers what the fsdp axis splits of its experts' weights, and what
the experts of several devices make of a token is summed.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ..sharding import mesh as meshes
from .config import ModelConfig

EXPERT_KERNELS = ("experts_gate", "experts_up", "experts_down")
PARAM_AXES: dict[str, tuple[str, ...]] = {
    "router": ("embed", "choices"),
    "experts_gate": ("experts", "embed", "mlp"),
    "experts_up": ("experts", "embed", "mlp"),
    "experts_down": ("experts", "mlp", "embed"),
}


class Moe(nn.Module):
    """The sum of g_i(x) E_i(x) over the k chosen experts i, SwiGLUs. https://arxiv.org/abs/2401.04088, section 2.1

    None is shared by all tokens, as in Qwen3: https://arxiv.org/abs/2505.09388, section 2.
    """

    config: ModelConfig

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], chosen: Int[Array, "B T k"] | None
    ) -> tuple[Float[Array, "B T D"], Int[Array, "B T k"]]:
        """What experts make of each token, and which they were: `chosen`, or without it the router's choice."""
        c = self.config
        init = nn.initializers.normal(c.init_std)
        router = self.param("router", init, (c.embed_dim, c.num_experts)).astype(x.dtype)
        score = meshes.summed_per_device(
            _score, ("batch", "length", None), PARAM_AXES["router"], whole=("embed",), over=()
        )
        logits = score(x, router)
        if chosen is None:
            chosen = jax.lax.top_k(logits, c.experts_per_token)[1]
        inward, outward = (c.num_experts, c.embed_dim, c.mlp_dim), (c.num_experts, c.mlp_dim, c.embed_dim)
        kernels = [
            self.param(name, init, shape).astype(x.dtype)
            for name, shape in zip(EXPERT_KERNELS, (inward, inward, outward), strict=True)
        ]
        weights = gates(logits, chosen, normalised=c.norm_topk_prob).astype(x.dtype)
        tokens = ("dispatched", "length", None)
        mix = meshes.summed_per_device(
            _mix, tokens, tokens, tokens, ("experts",), *(PARAM_AXES[name] for name in EXPERT_KERNELS),
            whole=("embed",), over=("experts", "mlp"),
        )  # fmt: skip
        return mix(x, chosen, weights, jnp.arange(c.num_experts), *kernels), chosen


def gates(logits: Float[Array, "B T E"], chosen: Int[Array, "B T k"], *, normalised: bool) -> Float[Array, "B T k"]:
    """How much each chosen expert counts, float32: its softmax over all experts, or `normalised` over those chosen.

    The gradient flows through the gates to the router, also where the choice was made elsewhere: Rollout Routing Replay
    (R3) has exp(s_i) / sum_{j chosen} exp(s_j), s the trainer's own logits. https://arxiv.org/abs/2510.11370, section 4
    """
    scores = jnp.take_along_axis(logits, chosen, axis=-1)
    if normalised:
        return jax.nn.softmax(scores, axis=-1)
    return jnp.exp(scores - jax.nn.logsumexp(logits, axis=-1, keepdims=True))


def _score(x: Float[Array, "B T D"], router: Float[Array, "D E"]) -> Float[Array, "B T E"]:
    return jnp.einsum("btd,de->bte", x, router, preferred_element_type=jnp.float32)


def _mix(
    x: Float[Array, "B T D"],
    chosen: Int[Array, "B T k"],
    weights: Float[Array, "B T k"],
    experts: Int[Array, " e"],
    gate: Float[Array, "e D F"],
    up: Float[Array, "e D F"],
    down: Float[Array, "e F D"],
) -> Float[Array, "B T D"]:
    """What the e consecutive `experts` at hand add to each token; what goes to others is sorted last, in no group."""
    k, num = chosen.shape[-1], experts.size
    place = chosen.reshape(-1) - experts[0]
    here = (place >= 0) & (place < num)
    order = jnp.argsort(jnp.where(here, place, num))
    sizes = jnp.sum(place[:, None] == jnp.arange(num)[None, :], axis=0, dtype=jnp.int32)
    grouped = here[order][:, None]
    back = jnp.argsort(order)
    rows = jnp.where(grouped, _ordered(x.reshape(-1, x.shape[-1]), order, back, k), 0)
    hidden = jax.nn.silu(jax.lax.ragged_dot(rows, gate, sizes)) * jax.lax.ragged_dot(rows, up, sizes)
    out = jnp.where(grouped, jax.lax.ragged_dot(hidden, down, sizes), 0)
    out = _ordered(out, back, order, 1).reshape(*chosen.shape, -1)
    return jnp.einsum("btkd,btk->btd", out, weights)


def _repeated(
    x: Float[Array, "N D"], order: Int[Array, " Nk"], back: Int[Array, " Nk"], k: int
) -> Float[Array, "Nk D"]:
    """Every row of `x` k times over, in an order whose inverse is `back`.

    Its derivative is the way back, another gather, where that which JAX derives scatters row by row.
    """
    return x[order // k]


_ordered = jax.custom_vjp(_repeated, nondiff_argnums=(3,))
_ordered.defvjp(
    lambda x, order, back, k: (x[order // k], back),
    lambda k, back, gradient: (gradient[back].reshape(-1, k, gradient.shape[-1]).sum(axis=1), None, None),
)
