"""The tower's parameters under shared work: each rank's gradients cover its own images, and their sum is the whole."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import paddle
from paddle import Tensor

from paddle_vl_sp import collectives
from paddle_vl_sp.comm import DTYPES, name_of
from paddle_vl_sp.consensus import exchange

BUCKET = 2**24  # elements in one all-reduce


def sum_parameter_grads(module: Any, group: Any) -> None:
    """Sums the gradients of the module's replicated parameters over the group, in place: whole on every rank.

    A parameter that is tensor-parallel (`is_distributed`) is left as it is: the ranks hold different parts of it, and
    its layer makes its gradient whole. A group of None means nobody: nothing is summed.

    Call it on every rank after the last backward of an optimizer step, before clipping and the step. Only for
    parameters that saw this rank's part alone, of the images (encode_shared) or of the sequence: a replicated tower
    behind complete_grad has whole gradients already. A parameter without a gradient on this rank counts as zero, and
    gets one where any rank has one. Master gradients (`main_grad`) are summed where they are. On ranks that the
    data-parallel reduction joins anyway, that sums them, and this must not.
    """
    collectives.warn_of_no_group(group, "sum_parameter_grads", "no gradient was summed")
    if collectives.is_alone(group):
        return
    parameters = [each for each in module.parameters() if not each.stop_gradient and not _is_cut(each)]
    if not parameters:
        return
    with paddle.no_grad():
        for bucket in _buckets(_agreed_dtypes(parameters, group)):
            grads = [_grad_or_zeros(parameter, dtype) for parameter, dtype in bucket]
            total = collectives.summed(paddle.concat([grad.flatten() for grad in grads]), group)
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
        if not _is_cut(parameter):
            mark_as_sequence_parallel_parameter(parameter)


def refuse_tensor_parallel(encode: Any, group: Any) -> None:
    """Raises if encode is, or is a method of, a layer whose weights are cut over ranks of this group."""
    layer = encode if isinstance(encode, paddle.nn.Layer) else getattr(encode, "__self__", None)
    if not isinstance(layer, paddle.nn.Layer) or collectives.is_alone(group):
        return
    for name, part in layer.named_sublayers(include_self=True):
        cut = [own for own, parameter in part.named_parameters(include_sublayers=False) if _is_cut(parameter)]
        of = getattr(part, "model_parallel_group", None)
        if cut and (of is None or len(set(of.ranks) & set(group.ranks)) > 1):
            raise ValueError(
                f"the tower's {name or type(part).__name__}.{cut[0]} ({type(part).__name__}) is tensor-parallel over "
                f"ranks of the group {list(group.ranks)}: work can be shared only where each rank holds the whole "
                "tower; build it with a tensor-parallel size of 1, or share over another group"
            )


def _is_cut(parameter: Tensor) -> bool:
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
