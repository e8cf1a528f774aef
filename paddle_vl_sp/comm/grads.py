"""Sums partial gradients over a group: of features during the backward, of parameters after it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from weakref import WeakValueDictionary

import numpy as np
import paddle
from paddle import Tensor
from paddle.autograd import PyLayer, PyLayerContext
from paddle.nn import Layer

from paddle_vl_sp.autograd import differentiable_once
from paddle_vl_sp.comm import collectives
from paddle_vl_sp.comm.agree import check_same_parameters, exchange
from paddle_vl_sp.comm.collectives import Group
from paddle_vl_sp.comm.gather import DTYPES, name_of, view_of
from paddle_vl_sp.plan import VisualPlan

BUCKET = 2**24  # elements in one all-reduce
HEAD_NORMS = ("q_norm", "k_norm")  # replicated; a rank's gradient covers its own heads only

_SUMMED: WeakValueDictionary[int, Tensor] = WeakValueDictionary()  # whose gradients are summed in the backward


def complete_grad(features: Sequence[Tensor], plan: VisualPlan, group: Group | None) -> list[Tensor]:
    """The same features, whose gradient is summed over the group in the backward: the whole gradient on every rank.

    features  levels [N, H], replicated over the group; each rank uses only the rows of its own share
    plan      this rank's plan; its number of feature rows is checked
    group     the ranks that the sequence was cut for and that hold copies of the tower (tensor-parallel, SP)

    Without it each rank's tower gets the gradient of this rank's rows only. The forward costs nothing. The backward is
    one all-reduce for all levels, in which every rank must take part, with or without visual rows: its loss must reach
    at least one level; a level that it does not use counts as zero. Which levels need a gradient must be the same on
    every rank, as it is for replicated features. With a group of one, or None, which means no group, nothing is added
    to the graph. There is no second gradient (create_graph=True).

    The sum is exact in the levels' own dtype: a feature row has one owner, so all ranks but one add zero. Levels of
    different dtypes are summed in the widest.

    ::

        main, levels = tower(pixel_values, grid_thw)  # [N, H], L times [N, H]
        main, *levels = complete_grad([main, *levels], plan, group)
        hidden = replace_rows(hidden, main, plan)  # this rank's rows
    """
    if isinstance(features, Tensor):
        raise ValueError("complete_grad takes a list of levels and returns one, got a tensor: pass [features]")
    _check_feature_rows(features, plan)
    collectives.warn_of_no_group(group, "complete_grad", "this rank's gradient is not summed with the others'")
    needing = [level for level in features if not level.stop_gradient]
    if not collectives.has_peers(group) or not needing or not paddle.is_grad_enabled():
        return list(features)
    completed = iter(_CompleteGrad.apply(group, *needing))
    return [level if level.stop_gradient else next(completed) for level in features]


class _CompleteGrad(PyLayer):  # type: ignore[misc]
    @staticmethod
    def forward(ctx: PyLayerContext, group: Group, *levels: Tensor) -> tuple[Tensor, ...]:
        ctx.group = group
        ctx.dtypes = [level.dtype for level in levels]
        return tuple(view_of(level) for level in levels)

    @staticmethod
    @differentiable_once
    def backward(ctx: PyLayerContext, *grads: Tensor) -> tuple[Tensor, ...]:
        widest = _widest(ctx.dtypes)
        # concat makes new memory, also of one tensor: the sum must not overwrite autograd's own
        whole = collectives.all_reduce_sum(paddle.concat([grad.astype(widest).flatten() for grad in grads]), ctx.group)
        parts = paddle.split(whole, [grad.size for grad in grads])
        shaped = zip(parts, grads, ctx.dtypes, strict=True)
        return tuple(part.reshape(grad.shape).astype(dtype) for part, grad, dtype in shaped)


def _widest(dtypes: Sequence[paddle.dtype]) -> paddle.dtype:
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


def sum_parameter_grads(module: Layer, group: Group | None, *, skip: Layer | Sequence[Layer] = ()) -> None:
    """Sums the gradients of the module's replicated parameters over the group, in place: whole on every rank.

    skip  layers of the module whose gradients are whole already, such as a tower behind complete_grad: a second sum
          would multiply them by the number of ranks

    A parameter that is tensor-parallel (`is_distributed`) is not touched: the ranks hold different parts of it, and its
    layer completes its gradient. None means no group: nothing is summed.

    Call it on every rank after the last backward of an optimizer step, before clipping and the step. It is for
    parameters whose gradients cover only this rank's images (encode_shared) or this rank's part of the sequence: a
    replicated tower behind complete_grad has whole gradients already, so skip it. A parameter without a gradient on
    this rank counts as zero, and gets one if any rank has one. Master gradients (`main_grad`) are summed instead of
    `grad`. Do not call it over ranks whose gradients the data-parallel reduction sums. The same parameters must be
    frozen on every rank; if they are not, all raise.

    ::

        loss.backward()
        sum_parameter_grads(model, group, skip=model.visual)
        optimizer.step()
    """
    collectives.warn_of_no_group(group, "sum_parameter_grads", "no gradient was summed")
    if not collectives.has_peers(group):
        return
    named, error = _to_sum(module, [skip] if isinstance(skip, Layer) else list(skip))
    check_same_parameters(named, "parameters whose gradients are summed", group, error)
    if not named:
        return
    parameters = [parameter for _, parameter in named]
    with paddle.no_grad():
        for bucket in _buckets(_agreed_dtypes(parameters, group)):
            grads = [_grad_or_zeros(parameter, dtype) for parameter, dtype in bucket]
            total = collectives.all_reduce_sum(paddle.concat([grad.flatten() for grad in grads]), group)
            parts = paddle.split(total, [grad.size for grad in grads])
            for (parameter, _), grad, part in zip(bucket, grads, parts, strict=True):
                paddle.assign(part.reshape(grad.shape), output=grad)
                if _grad(parameter) is None:
                    setattr(parameter, "main_grad" if hasattr(parameter, "main_grad") else "grad", grad)


def _to_sum(module: Layer, skip: Sequence[Layer]) -> tuple[list[tuple[str, Tensor]], ValueError | None]:
    """The replicated parameters that need a gradient, without those of `skip`, and what is wrong with skip."""
    own = {id(parameter) for parameter in module.parameters()}
    skipped: set[int] = set()
    for layer in skip:
        of_layer = {id(parameter) for parameter in layer.parameters()} if isinstance(layer, Layer) else set()
        if not of_layer or not of_layer <= own:
            return [], ValueError(
                f"skip must be layers with parameters of the module, got {type(layer).__name__}: pass the tower that "
                "the module holds"
            )
        skipped |= of_layer
    return [
        (name, each)
        for name, each in module.named_parameters()
        if not each.stop_gradient and not is_cut(each) and id(each) not in skipped
    ], None


def sum_in_backward(layer: Layer, group: Callable[[], Group | None]) -> None:
    """Has the gradients of the layer's own parameters summed over the group as soon as they are computed, once each.

    For replicated parameters of which every rank sees a part, where no trainer sums marked ones. The group is looked up
    in the backward; `paddle.grad` does not run it, and a copy of the layer needs a call of its own.
    """
    for parameter in layer.parameters(include_sublayers=False):
        if _SUMMED.get(id(parameter)) is parameter:
            continue
        _SUMMED[id(parameter)] = parameter
        frozen, parameter.stop_gradient = parameter.stop_gradient, False  # Paddle hooks no frozen one
        parameter.register_hook(functools.partial(_summed_over, group))
        parameter.stop_gradient = frozen


def head_norms(model: Layer) -> list[Layer]:
    """The model's q_norm and k_norm layers."""
    return [layer for name, layer in model.named_sublayers() if name.rpartition(".")[2] in HEAD_NORMS]


def _summed_over(group: Callable[[], Group | None], grad: Tensor) -> Tensor:
    ranks = group()
    return collectives.all_reduce_sum(grad.clone(), ranks) if collectives.has_peers(ranks) else grad


def mark_for_sum(module: Layer) -> None:
    """Marks the replicated parameters, so that their gradients are summed over the tensor-parallel group every step.

    Paddle's sequence-parallel hooks, or the callback of PaddleFormers' trainer, do the sum. Call it before the trainer
    is built, and do not call sum_parameter_grads as well. Tensor-parallel parameters (`is_distributed`) are not marked.
    The marked ones need a gradient on every rank: encode with idle="dummy".

    ::

        mark_for_sum(model.visual)
        trainer = Trainer(model, ...)
    """
    from paddle.distributed.fleet.utils.sequence_parallel_utils import mark_as_sequence_parallel_parameter

    for parameter in module.parameters():
        if not is_cut(parameter):
            mark_as_sequence_parallel_parameter(parameter)


def is_cut(parameter: Tensor) -> bool:
    """Whether the parameter is tensor-parallel: ranks hold different parts of it."""
    return bool(getattr(parameter, "is_distributed", False))


def _grad(parameter: Tensor) -> Tensor | None:
    main_grad = getattr(parameter, "main_grad", None)
    return parameter.grad if main_grad is None else main_grad


def _grad_or_zeros(parameter: Tensor, dtype: str) -> Tensor:
    grad = _grad(parameter)
    return parameter.new_zeros(parameter.shape, dtype=dtype) if grad is None else grad


def _agreed_dtypes(parameters: list[Tensor], group: Group) -> list[tuple[Tensor, str]]:
    """The parameters that have a gradient on any rank, with its dtype."""
    grads = [_grad(parameter) for parameter in parameters]
    table = exchange([0 if grad is None else 1 + DTYPES.index(name_of(grad.dtype)) for grad in grads], group)  # [n, P]
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
