"""Attention with all keys at hand by Paddle's flashmask: fp16 or bf16 on a GPU, one call for any mask."""

from __future__ import annotations

import paddle
from paddle import Tensor

from paddle_vl_sp.attention.kernels import choose_kernel
from paddle_vl_sp.attention.visible import VisibleRows


def can_run(q: Tensor, v: Tensor) -> bool:
    """Where flash attention can, flashmask can."""
    return choose_kernel(q, v).kernel.name == "flash"


def forward(q: Tensor, k: Tensor, v: Tensor, visible: VisibleRows, scale: float) -> tuple[Tensor, Tensor]:
    """q [B, Sq, Hq, D], k and v [B, S, Hk, D] -> out [B, Sq, Hq, D]; no log-sum-exp is kept."""
    return _attention(_scaled(q, scale), k, v, visible), q.new_zeros([0], dtype="float32")


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, visible: VisibleRows, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v, fp32. The forward runs once more: its graph would have kept the whole k and v."""
    q, k, v = inputs = [x.detach() for x in (_scaled(q, scale), k, v)]
    for x in inputs:
        x.stop_gradient = False
    with paddle.enable_grad():
        again = _attention(q, k, v, visible)
    paddle.autograd.backward([again], [grad.astype(q.dtype)])  # paddle.grad within paddle.grad ends the process
    grad_q, grad_k, grad_v = (
        x.new_zeros(x.shape, dtype="float32") if x.grad is None else x.grad.astype("float32") for x in inputs
    )
    return _scaled(grad_q, scale), grad_k, grad_v


def _scaled(x: Tensor, scale: float) -> Tensor:
    """x * (scale / (1 / sqrt(D))): the operator multiplies by 1 / sqrt(D) itself, and takes no other scale."""
    factor = scale * float(x.shape[-1]) ** 0.5
    return x if abs(factor - 1.0) < 1e-6 else x * factor


def _attention(q: Tensor, k: Tensor, v: Tensor, visible: VisibleRows) -> Tensor:
    """Not causal to flashmask, whose queries are a part of the rows: the mask says all. Key j is hidden from row
    end[j] on, and before row begin[j]: the start of the lower and the end of the upper hidden triangle."""
    if not q.shape[1]:
        return q * 1.0
    indices = paddle.stack([visible.end, visible.begin], axis=-1).unsqueeze(1)  # [B or 1, 1, S, 2]
    out: Tensor = paddle.nn.functional.flashmask_attention(
        q.contiguous(),
        k.contiguous(),
        v.contiguous(),
        startend_row_indices=indices.expand([k.shape[0], 1, k.shape[1], 2]).contiguous(),
        causal=False,
    )
    return out
