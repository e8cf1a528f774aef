"""The operations of `plain`, with the same signatures, by custom operators. `dispatch` decides when they are used."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import paddle
from paddle import Tensor, _C_ops
from paddle.autograd import PyLayer, PyLayerContext

from paddle_vl_sp.autograd import differentiable_once
from paddle_vl_sp.backends import plain
from paddle_vl_sp.backends.copies import on_place
from paddle_vl_sp.layout import SeqLayout
from paddle_vl_sp.log import logger

MAX_PLACEHOLDERS = 8
MAX_INLINE_INTERVALS = 8
ELEMENT_TYPES = (paddle.float32, paddle.float64, paddle.float16, paddle.bfloat16)  # as in custom_ops/rows.h

_run = _C_ops._run_custom_op  # type: ignore[attr-defined]
joint_order = plain.joint_order
joint_rows = plain.joint_rows


def build_plan(
    tokens: Tensor,  # [B, S]
    ids: tuple[int, ...] | None,
    layout: SeqLayout,
    sequence_first: bool,
    num_features: int,
    padded: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """update, gather and counts [2]. Padded, it never synchronises; else once, for the number of pairs."""
    table = None
    if layout.cu_seqlens is not None:
        rows = interval_table(layout)
        table = on_place(rows, tokens.place if len(rows) > MAX_INLINE_INTERVALS else paddle.CPUPlace())
    return build_plan_of(tokens, table, ids, layout, layout.local_len, sequence_first, num_features, padded)


def build_plan_of(
    tokens: Tensor,
    table: Tensor | None,
    ids: tuple[int, ...] | None,
    layout: SeqLayout,
    local_len: int,
    sequence_first: bool,
    num_features: int,
    padded: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """build_plan for tokens of any length: cut by the layout's rule or, where it is given, by the table.

    local_len is that of the table; -1, where it is unknown, makes the padded form as long as the sequence.
    """
    if ids is not None and len(ids) > MAX_PLACEHOLDERS:
        tokens, ids = plain.is_any_of(tokens, ids), None
    rule = [
        layout.cp_size,
        layout.cp_rank,
        int(layout.cp_mode == "zigzag"),
        layout.sp_size,
        layout.sp_rank,
        int(layout.remainder == "front"),
    ]
    wanted = [1] if ids is None else list(ids)
    update, gather, counts = _run(
        "vlsp_plan", tokens, table, wanted, rule, local_len, sequence_first, num_features, padded
    )
    return update, gather, counts


def interval_table(layout: SeqLayout, num_intervals: int | None = None) -> npt.NDArray[np.int64]:
    """(start, length, local start) of every interval of a rank, int64 [K, 3]: what the operator takes for packed rows.

    num_intervals  a fixed K, filled up with empty intervals at the end; without it K is the number of intervals, but
                   at least 1, since Paddle takes an empty table for none

    >>> interval_table(SeqLayout(12, cp_size=2, cu_seqlens=(0, 4, 12))).tolist()
    [[0, 1, 0], [3, 3, 1], [10, 2, 4]]
    """
    intervals = layout.intervals()
    wanted = max(1, len(intervals)) if num_intervals is None else num_intervals
    if wanted < max(1, len(intervals)):
        raise ValueError(f"num_intervals must be at least {max(1, len(intervals))} for this layout, got {wanted}")
    empty = np.tile(np.array([[layout.seq_len, 0]], dtype=np.int64), (wanted - len(intervals), 1))
    filled = np.concatenate([intervals, empty])
    length = filled[:, 1:]
    return np.concatenate([filled, np.cumsum(length, axis=0) - length], axis=1)


def replace_rows(hidden: Tensor, features: Tensor, update: Tensor, gather: Tensor) -> Tensor:
    """hidden[update] = features[gather], on a copy; -1 is skipped."""
    return _run_rows("vlsp_replace_rows", hidden, features, update, gather)


def add_rows(hidden: Tensor, features: Tensor, update: Tensor, gather: Tensor) -> Tensor:
    """hidden[update] += features[gather], on a copy; -1 is skipped."""
    return _run_rows("vlsp_add_rows", hidden, features, update, gather)


def add_rows_inplace(hidden: Tensor, features: Tensor, update: Tensor, gather: Tensor) -> Tensor:
    """hidden[update] += features[gather]; -1 is skipped. hidden is contiguous and not a leaf that needs a gradient."""
    if hidden.stop_gradient or not paddle.is_grad_enabled():
        _run("vlsp_add_rows_", hidden, features, update, gather)
    else:
        _AddRowsInplace.apply(hidden, features, update, gather)
    return hidden


class _AddRowsInplace(PyLayer):  # type: ignore[misc]  # a custom operator's own gradient leaves `hidden` the old graph
    @staticmethod
    def forward(ctx: PyLayerContext, hidden: Tensor, features: Tensor, update: Tensor, gather: Tensor) -> Tensor:
        ctx.needs_features = not features.stop_gradient
        ctx.save_for_backward(update, gather, _like(features.shape[0] if ctx.needs_features else 0, features))
        ctx.feature_type = _element_type(features)
        _run("vlsp_add_rows_", hidden, features, update, gather)
        return hidden

    @staticmethod
    @differentiable_once
    def backward(ctx: PyLayerContext, out_grad: Tensor) -> tuple[Tensor, Tensor | None]:
        hidden_grad, feature_grad = _run("vlsp_add_rows_back", *ctx.saved_tensor(), out_grad, ctx.feature_type)
        return hidden_grad, feature_grad if ctx.needs_features else None


def _run_rows(name: str, hidden: Tensor, features: Tensor, update: Tensor, gather: Tensor) -> Tensor:
    if paddle.in_dynamic_mode():
        if not paddle.is_grad_enabled():  # which custom operators do not check
            hidden, features = hidden.detach(), features.detach()
        like_features = _like(features.shape[0], features)
    else:
        like_features = paddle.zeros([paddle.shape(features)[0], 0], dtype="int64")
    (out,) = _run(name, hidden, features, update, gather, like_features, _element_type(features))
    return out


def _like(num_features: int, features: Tensor) -> Tensor:
    """[num_features, 0], beside the features: how many there are, for gradients, which need nothing else of them."""
    return paddle.empty([num_features, 0], dtype="int64", device=features.place)


def _element_type(x: Tensor) -> int:
    return ELEMENT_TYPES.index(x.dtype)


def set_up(library: Path) -> None:
    """What the operators cannot know by themselves."""
    loaded = ctypes.CDLL(str(library))
    loaded.vlsp_set_creates_graph(_creates_graph)
    loaded.vlsp_set_second_gradients_in_graphs.restype = ctypes.c_bool
    if not loaded.vlsp_set_second_gradients_in_graphs(_spoils_second_gradients):
        raise RuntimeError("this Paddle does not let them differentiate their gradients in static graphs")
    learn_references(library)


def _is_creating_graph() -> bool:
    """Whether an operator is called from paddle.grad(..., create_graph=True), the Python frame below this one."""
    caller = sys._getframe().f_back
    return caller is not None and bool(caller.f_locals.get("create_graph"))


def _is_built_by_to_static() -> bool:
    """Whether to_static builds the graph, and lets common subexpressions be eliminated in it."""
    frame = sys._getframe().f_back
    while frame is not None:
        if frame.f_globals.get("__name__", "").startswith("paddle.jit.dy2static"):
            return bool(paddle.get_flags("FLAGS_enable_cse_in_dy2st")["FLAGS_enable_cse_in_dy2st"])
        frame = frame.f_back
    return False


_creates_graph = ctypes.CFUNCTYPE(ctypes.c_bool)(_is_creating_graph)  # kept, since the library calls them
_spoils_second_gradients = ctypes.CFUNCTYPE(ctypes.c_bool)(_is_built_by_to_static)


def learn_references(library: Path) -> None:
    """Lets `add_rows` return the gradient it receives without a copy, where nothing else refers to that gradient.

    Backward passes of one row count the references that autograd holds to a gradient that no user keeps. If the count
    is the same for one that is kept, the two cannot be told apart, and every gradient is copied.
    """
    operators = ctypes.CDLL(str(library))
    operators.vlsp_last_references.restype = ctypes.c_int64
    operators.vlsp_set_unshared_references.argtypes = [ctypes.c_int64]
    with paddle.base.dygraph.guard(paddle.CPUPlace()), paddle.enable_grad():
        ways = (add_rows, add_rows_inplace)
        unkept = {_references(operators, add, lambda out: None) for add in ways}
        kept = {_references(operators, add, keep) for add in ways for keep in (Tensor.retain_grads, _keep_by_hook)}
    known = len(unkept) == 1 and unkept.isdisjoint(kept)
    operators.vlsp_set_unshared_references(min(unkept) if known else 0)
    if not known:
        logger.warning(
            "every gradient of add_rows is copied, which is slower: with this Paddle, a gradient that no user keeps "
            "has %s references and one that is kept has %s",
            sorted(unkept),
            sorted(kept),
        )


def _references(operators: ctypes.CDLL, add: Callable[..., Tensor], keep: Callable[[Tensor], object]) -> int:
    """How many references to its gradient `add` finds in a backward pass, where keep(out) may add one."""
    hidden, features = paddle.zeros([1, 1]), paddle.zeros([1, 1])
    hidden.stop_gradient = features.stop_gradient = False
    first = paddle.zeros([1], "int64")
    out = add(hidden * 1, features, first, first)
    kept = keep(out)
    out.sum().backward()
    del kept
    return int(operators.vlsp_last_references())


def _keep_by_hook(out: Tensor) -> list[Tensor]:
    kept: list[Tensor] = []
    out.register_hook(kept.append)
    return kept
