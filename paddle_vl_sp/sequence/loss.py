"""The loss of a cut sequence: every rank gets the global mean and the gradient of its own logits."""

from __future__ import annotations

import paddle
from paddle import Tensor
from paddle.autograd import PyLayer, PyLayerContext

from paddle_vl_sp.autograd import differentiable_once
from paddle_vl_sp.comm.collectives import Group, all_reduce_sum, has_peers
from paddle_vl_sp.layout import SeqLayout
from paddle_vl_sp.sequence.batch import IGNORE
from paddle_vl_sp.sequence.join import unshard


def sequence_parallel_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    group: Group | None,
    weights: Tensor | None = None,
    num_tokens: float | Tensor | None = None,
    ignore_index: int = IGNORE,
    averaged_gradients: bool = False,
) -> Tensor:
    """The mean cross entropy over the tokens of the whole sequence that are not ignored, the same on every rank.

    logits       [B, S_local, V]
    labels       [B, S_local], already shifted; ignore_index where a position has no label
    group        all ranks that hold a part of the sequence; None is one process that holds the whole sequence
    weights      [B, S_local], of each token in the mean; they may need a gradient
    num_tokens   divide by this instead of the group's count: for example the tokens of all accumulated micro-batches
    averaged_gradients   for trainers that average parameter gradients over the group instead of summing: multiplies
                 the gradient (not the loss) by the group's size

    On the whole sequence, with losses = cross_entropy(reduction="none"), it is losses[labels != ignore_index].mean().
    (Where ignore_index is negative, Paddle's own mean divides by the ignored tokens too.) The gradient is that of the
    mean for this rank's logits, and needs no communication: the parameter gradients *summed* over the group are those
    of one process. Without any valid token the loss and the gradients are 0.

    >>> labels = paddle.to_tensor([[3, 1, -100]])
    >>> loss = sequence_parallel_loss(paddle.zeros([1, 3, 8]), labels, group=None)
    >>> round(float(loss), 4)  # log(8)
    2.0794
    """
    scale = float(group.nranks) if averaged_gradients and group is not None else 1.0
    losses = token_losses(logits, labels, ignore_index=ignore_index)
    with paddle.amp.auto_cast(enable=False):
        valid = (labels != ignore_index).astype("float32")
        parts = valid if weights is None else valid * weights.astype("float32")
        own = paddle.stack([(losses * parts).sum(), parts.sum()])  # [2]
        mean: Tensor = _GlobalMean.apply(own, _divisor(num_tokens), group, scale)
    return mean


def global_mean(own_sum: Tensor, own_count: Tensor, group: Group | None) -> tuple[Tensor, Tensor]:
    """The mean over the group of what has this sum and count here, fp32, with the gradient of this rank's own part.

    And the sum over the group, without a gradient.
    """
    with paddle.amp.auto_cast(enable=False):
        own = paddle.stack([own_sum.astype("float32"), own_count.astype("float32")])  # [2]
        total = own_sum.detach().astype("float32").clone()
        if has_peers(group):
            total = all_reduce_sum(total, group)
        return _GlobalMean.apply(own, None, group, 1.0), total


def token_losses(logits: Tensor, labels: Tensor, *, ignore_index: int = IGNORE) -> Tensor:
    """The cross entropy of every token, fp32: [B, S_local, V], [B, S_local] -> [B, S_local]; 0 where ignored.

    >>> (token_losses(paddle.zeros([1, 3, 8]), paddle.to_tensor([[0, 5, -100]])) > 0).tolist()
    [[True, True, False]]
    """
    if list(logits.shape[:-1]) != list(labels.shape):
        raise ValueError(
            f"logits {list(logits.shape)} need labels {list(logits.shape[:-1])}, got {list(labels.shape)}: cut both by "
            "one layout"
        )
    if not labels.size:
        return logits.astype("float32").sum(-1)  # [B, 0], still in the graph
    with paddle.amp.auto_cast(enable=False):
        return paddle.nn.functional.cross_entropy(
            logits.astype("float32"), labels.unsqueeze(-1), reduction="none", ignore_index=ignore_index
        ).squeeze(-1)


def gathered_losses(losses: Tensor, *, layout: SeqLayout, group: Group | None) -> Tensor:
    """For metrics: the token losses of the whole padded sequence on every rank, [B, S], without a gradient.

    ::

        losses = gathered_losses(token_losses(logits, share["labels"]), layout=layout, group=group)
    """
    with paddle.no_grad():
        return unshard(losses.detach(), layout, group, axis=1)


class _GlobalMean(PyLayer):  # type: ignore[misc]
    """[own sum, own count] -> sum over the group / count over the group; backward does not communicate."""

    @staticmethod
    def forward(ctx: PyLayerContext, own: Tensor, divisor: Tensor | None, group: Group | None, scale: float) -> Tensor:
        total = own.astype("float64")
        if has_peers(group):
            total = all_reduce_sum(total, group)
        count = total[1] if divisor is None else divisor
        one = paddle.ones_like(count)
        inverse = paddle.where(count > 0, 1.0 / paddle.where(count > 0, count, one), paddle.zeros_like(count))
        mean = total[0] * inverse
        ctx.of_sum = inverse * scale
        ctx.of_count = -mean * ctx.of_sum if divisor is None else paddle.zeros_like(mean)
        return mean.astype("float32")

    @staticmethod
    @differentiable_once
    def backward(ctx: PyLayerContext, grad: Tensor) -> Tensor:
        return (grad.astype("float64") * paddle.stack([ctx.of_sum, ctx.of_count])).astype("float32")


def _divisor(num_tokens: float | Tensor | None) -> Tensor | None:
    if num_tokens is None:
        return None
    if isinstance(num_tokens, Tensor):
        return num_tokens.detach().astype("float64").reshape([])
    if num_tokens <= 0:
        raise ValueError(f"num_tokens must be positive, got {num_tokens}: count the valid tokens of all micro-batches")
    return paddle.to_tensor(float(num_tokens), dtype="float64")
