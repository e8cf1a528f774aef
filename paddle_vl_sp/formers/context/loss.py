"""The loss of a cut batch: PaddleFormers' criterion takes the mean over this rank's tokens, and ours weighs it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import paddle
from paddle import Tensor
from paddle.nn import Layer

from paddle_vl_sp.formers.context.step import STEP
from paddle_vl_sp.sequence.loss import global_mean


def criterion_forward(original: Callable[..., Any]) -> Callable[..., Any]:
    """The mean over the tokens of all ranks, with the gradient of this rank's own.

    Whatever is inside, filtered labels, a fused head or recompute, sees this rank's logits and labels.
    """

    @functools.wraps(original)
    def forward(self: Layer, logits: Any, labels: Tensor, loss_mask: Tensor | None = None, **kwargs: Any) -> Any:
        step = STEP.get()
        if step is None:
            return original(self, logits, labels, loss_mask, **kwargs)
        is_known = self.loss_type == "sft" and self.loss_foward_fn.__module__ == "paddleformers.nn.criterion.sft_loss"
        if not is_known:
            raise ValueError(f"context parallelism has the loss of SFT and pretraining, not {self.loss_type!r}")
        if labels.shape[-1] != step.layout.local_len:
            raise ValueError(
                f"the criterion got labels {list(labels.shape)} of a batch that context parallelism cut to "
                f"{step.layout.local_len} places a rank: shift labels in the data set, not between model and criterion"
            )
        step.losses.append(self)
        labels, loss_mask, count = _with_a_token(labels, loss_mask, self.ignored_index, self.use_filtered_label_loss)
        found = original(self, logits, labels, loss_mask, **kwargs)
        own = found[0] if isinstance(found, tuple) else found
        is_sum = not isinstance(found, tuple) and not self.training
        mean, total = global_mean(own * (count > 0).astype("float32") if is_sum else own * count, count, step.group)
        if isinstance(found, tuple):
            return mean, total
        return total if is_sum else mean

    return forward


def _with_a_token(
    labels: Tensor, loss_mask: Tensor | None, ignored: int, is_filtered: bool
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Labels, mask and the number of tokens that count here. Where none does, the first one is made to: the mean of
    none is no number, not even times 0, which is the weight that it gets.
    """
    weights = labels != ignored if is_filtered or loss_mask is None else loss_mask
    count = weights.astype("float32").sum()
    first = paddle.arange(labels.size).reshape(labels.shape) == 0
    is_made = paddle.logical_and(first.to(labels.place), count == 0)
    labels = paddle.where(paddle.logical_and(is_made, labels == ignored), paddle.zeros_like(labels), labels)
    if loss_mask is not None:
        loss_mask = paddle.where(is_made.reshape(loss_mask.shape), paddle.ones_like(loss_mask), loss_mask)
    return labels, loss_mask, count
