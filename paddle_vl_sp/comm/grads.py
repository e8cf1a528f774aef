"""Gradients made whole over a group: of features on the way back, and of parameters after the backward."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import paddle
from paddle import Tensor
from paddle.autograd import PyLayer

from paddle_vl_sp.autograd import differentiable_once
from paddle_vl_sp.comm import collectives
from paddle_vl_sp.comm.agree import exchange
from paddle_vl_sp.comm.gather import DTYPES, name_of, view_of
from paddle_vl_sp.plan import VisualPlan

BUCKET = 2**24  # elements in one all-reduce


def complete_grad(features: Sequence[Tensor], plan: VisualPlan, group: Any) -> list[Tensor]:
    """The same features; on the way back every rank receives the sum over the group of all ranks' gradients.

    features  levels [N, H], replicated over the group; each rank uses only the rows of its own share
    plan      this rank's plan; its number of feature rows is checked
    group     the ranks that the sequence was cut for and that hold copies of the tower (tensor-parallel, SP)

    Without it each rank's tower sees the gradient of its own rows and no other. Forward costs nothing. Backward is
    one all-reduce for all levels, in which every rank takes part, with or without visual rows, as long as its loss
    reaches at least one level; a level that it does not use counts as zero. Which levels need a gradient must be the
    same on every rank, as it is for replicated features. A group of one, or None, which means no group, is left out of
    the graph. There is no second gradient (create_graph=True).

    The sum is taken in the levels' own dtype: a feature row has one owner, so at most one rank brings a value and the
    others bring zero, and such a sum is exact in every dtype. Levels of different dtypes travel in the widest.
    """
    if isinstance(features, Tensor):
        raise ValueError("complete_grad takes a list of levels and returns one, got a tensor: pass [features]")
    _check_feature_rows(features, plan)
    needing = [level for level in features if not level.stop_gradient]
    if not collectives.has_peers(group) or not needing or not paddle.is_grad_enabled():
        return list(features)
    completed = iter(_CompleteGrad.apply(group, *needing))
    return [level if level.stop_gradient else next(completed) for level in features]


class _CompleteGrad(PyLayer):  # type: ignore[misc]
    @staticmethod
    def forward(ctx: Any, group: Any, *levels: Tensor) -> tuple[Tensor, ...]:
        ctx.group = group
        ctx.dtypes = [level.dtype for level in levels]
        return tuple(view_of(level) for level in levels)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        wire = _widest(ctx.dtypes)
        # concat makes new memory, also of one tensor: autograd's own buffers are not summed into
        whole = collectives.all_reduce_sum(paddle.concat([grad.astype(wire).flatten() for grad in grads]), ctx.group)
        parts = paddle.split(whole, [grad.size for grad in grads])
        shaped = zip(parts, grads, ctx.dtypes, strict=True)
        return tuple(part.reshape(grad.shape).astype(dtype) for part, grad, dtype in shaped)


def _widest(dtypes: Sequence[Any]) -> Any:
    """The dtype that holds all of these exactly."""
    if len(set(dtypes)) == 1:
        return dtypes[0]
    return paddle.float64 if paddle.float64 in dtypes else paddle.float32


def _check_feature_rows(features: Sequence[Tensor], plan: VisualPlan) -> None:
    rows = [level.shape[0] for level in features]
    if len(set(rows)) > 1 or (rows and plan.num_features not in (None, rows[0])):
        raise ValueError(
            f"the plan is for {plan.num_features} feature rows, got levels of {rows}: use the features of the batch "
            "that was planned, whole and the same on every rank of the group"
        )


def sum_parameter_grads(module: Any, group: Any) -> None:
    """Sums the gradients of the module's replicated parameters over the group, in place: whole on every rank.

    A parameter that is tensor-parallel (`is_distributed`) is left as it is: the ranks hold different parts of it, and
    its layer makes its gradient whole. Without a group (None), nothing is summed.

    Call it on every rank after the last backward of an optimizer step, before clipping and the step. Only for
    parameters that saw this rank's part alone, of the images (encode_shared) or of the sequence: a replicated tower
    behind complete_grad has whole gradients already. A parameter without a gradient on this rank counts as zero, and
    gets one where any rank has one. Master gradients (`main_grad`) are summed where they are. On ranks that the
    data-parallel reduction joins anyway, that sums them, and this must not.
    """
    collectives.warn_of_no_group(group, "sum_parameter_grads", "no gradient was summed")
    if not collectives.has_peers(group):
        return
    parameters = [each for each in module.parameters() if not each.stop_gradient and not is_cut(each)]
    if not parameters:
        return
    with paddle.no_grad():
        for bucket in _buckets(_agreed_dtypes(parameters, group)):
            grads = [_grad_or_zeros(parameter, dtype) for parameter, dtype in bucket]
            total = collectives.all_reduce_sum(paddle.concat([grad.flatten() for grad in grads]), group)
            parts = paddle.split(total, [grad.size for grad in grads])
            for (parameter, _), grad, part in zip(bucket, grads, parts, strict=True):
                paddle.assign(part.reshape(grad.shape), output=grad)
                if _grad(parameter) is None:
                    setattr(parameter, "main_grad" if hasattr(parameter, "main_grad") else "grad", grad)


def mark_for_sum(module: Any) -> None:
    """Marks the parameters for Paddle's own sequence-parallel hooks, or the callback of PaddleFormers' trainer, which
    sum their gradients over the tensor-parallel group once an optimizer step. Before the trainer is built; then leave
    sum_parameter_grads out. Parameters that are tensor-parallel (`is_distributed`) are not marked.

    They need a gradient on every rank: encode with idle="dummy".
    """
    from paddle.distributed.fleet.utils.sequence_parallel_utils import mark_as_sequence_parallel_parameter

    for parameter in module.parameters():
        if not is_cut(parameter):
            mark_as_sequence_parallel_parameter(parameter)


def is_cut(parameter: Tensor) -> bool:
    return bool(getattr(parameter, "is_distributed", False))


def _grad(parameter: Tensor) -> Tensor | None:
    main_grad = getattr(parameter, "main_grad", None)
    return parameter.grad if main_grad is None else main_grad


def _grad_or_zeros(parameter: Tensor, dtype: str) -> Tensor:
    grad = _grad(parameter)
    return parameter.new_zeros(parameter.shape, dtype=dtype) if grad is None else grad


def _agreed_dtypes(parameters: list[Tensor], group: Any) -> list[tuple[Tensor, str]]:
    """The parameters that have a gradient on some rank, with its dtype."""
    mine = [
        0 if (grad := _grad(parameter)) is None else 1 + DTYPES.index(name_of(grad.dtype)) for parameter in parameters
    ]
    table = exchange(mine, group)  # [nranks, P]
    highest = table.max(axis=0)
    if (np.where(table == 0, highest, table) != highest).any():
        raise ValueError(
            "a gradient has different dtypes on different ranks: use the same precision on all of the group"
        )
    return [(parameter, DTYPES[code - 1]) for parameter, code in zip(parameters, highest, strict=True) if code]


def _buckets(parameters: list[tuple[Tensor, str]]) -> Iterator[list[tuple[Tensor, str]]]:
    """Runs of parameters of one gradient dtype, each of about BUCKET elements."""
    bucket: list[tuple[Tensor, str]] = []
    size = 0
    for parameter, dtype in parameters:
        if bucket and (size + parameter.size > BUCKET or dtype != bucket[0][1]):
            yield bucket
            bucket, size = [], 0
        bucket.append((parameter, dtype))
        size += parameter.size
    if bucket:
        yield bucket
