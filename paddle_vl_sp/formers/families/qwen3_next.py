"""Qwen3-Next, text only: three layers of Gated DeltaNet to one of full attention, for context parallelism alone.

The model hands its attention_mask to the linear attention and nothing else, so the cut of a batch reaches it there, in
the form of `marker`; full attention finds it in the place of the row indices.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from paddle import Tensor
from paddle.nn import functional as F  # noqa: N812

from paddle_vl_sp.formers import tiny_text
from paddle_vl_sp.formers.context.forward import linear_inner_forward, outer_forward
from paddle_vl_sp.formers.context.marker import Cut, cut_in
from paddle_vl_sp.formers.contracts import equals_ours_on_text, sees_the_cut
from paddle_vl_sp.formers.known import MODELS, Called, Family, Replaced


def delta_net_forward(original: Callable[..., Any]) -> Callable[..., Any]:
    """Convolution and delta rule across the ranks that share the sequence; packed segments have states of their own."""

    @functools.wraps(original)
    def forward(
        self: Any,
        hidden_states: Tensor,
        cache_params: Any = None,
        cache_position: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        cut = cut_in(attention_mask, self)
        if cut is None:
            return original(self, hidden_states, cache_params, cache_position, attention_mask)
        return across_the_ranks(self, hidden_states, cut)

    return forward


def across_the_ranks(layer: Any, hidden_states: Tensor, cut: Cut) -> Tensor:
    """[B, S_local, H] in and out"""
    projected = layer.in_proj_qkvz(hidden_states), layer.in_proj_ba(hidden_states)
    q, k, v, z, b, a = layer.fix_query_key_value_ordering(*projected)
    g = -layer.A_log.float().exp() * F.softplus(a.float() + layer.dt_bias)  # [B, S_local, Hv]
    out = cut.chosen.gated_delta_net(
        q, k, v, g, b.sigmoid(), layout=cut.layout, conv_weight=layer.conv1d.weight, boundaries=cut.bounds
    )
    normed: Tensor = layer.norm(out.reshape([-1, out.shape[-1]]), z.reshape([-1, z.shape[-1]]))
    joined: Tensor = layer.out_proj(normed.reshape([*z.shape[:2], -1]))
    return joined


FAMILY = Family(
    "Qwen3-Next",
    f"{MODELS}.qwen3_next.modeling",
    replaced=(Replaced("Qwen3NextModel.forward", linear_inner_forward, ("487248ea96bd9992",)),),
    called=(Called("Qwen3NextGatedDeltaNet.fix_query_key_value_ordering", ("self", "mixed_qkvz", "mixed_ba")),),
    cut=(
        Replaced("Qwen3NextForCausalLM.forward", outer_forward, ("896d078f58d5468e",)),
        Replaced("Qwen3NextGatedDeltaNet.forward", delta_net_forward, ("1c9aba11803c1108",)),
    ),
    contract=(equals_ours_on_text(tiny_text.tiny_qwen3_next), sees_the_cut(tiny_text.tiny_qwen3_next)),
    is_optional=True,  # paddlefleet and paddlefleet_ops
)
