"""Vision DP around any tower: each rank encodes its share of the images, and all get all features."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import paddle
from paddle import Tensor
from paddle.autograd import PyLayer, PyLayerContext

from paddle_vl_sp.autograd import differentiable_once
from paddle_vl_sp.comm.agree import fingerprint
from paddle_vl_sp.comm.collectives import Group, has_peers, warn_of_no_group, wire_place
from paddle_vl_sp.comm.gather import GRADS, RowKind, agree_rows, gather_rows, view_of
from paddle_vl_sp.comm.grads import is_cut
from paddle_vl_sp.comm.uneven import MODES
from paddle_vl_sp.report import note_shared
from paddle_vl_sp.settings import check_choice
from paddle_vl_sp.vision.share import tower_alpha
from paddle_vl_sp.vision.work import Grid, Work, plan_work

IDLE = ("dummy", "skip")
QWEN3_VL_ALPHA = tower_alpha(1152, 4304)

Encoded = TypeVar("Encoded")  # features, or (features, [levels])


def encode_shared(
    encode: Callable[[Tensor, Grid], Encoded],
    pixel_values: Tensor,
    grid_thw: Grid,
    *,
    group: Group | None,
    merge_size: int,
    policy: str = "contiguous",
    idle: str = "dummy",
    grad: str = "partial",
    mode: str = "auto",
    split_frames: bool = False,
    alpha: int = QWEN3_VL_ALPHA,
    replicate_below: int = 1,
) -> Encoded:
    """encode(pixel_values, grid_thw), with the work shared over the group; the same result on every rank.

    encode           a tower with replicated weights: pixels [P, C] and grid [I, 3] of (t, h, w) to features [N, H], or
                     to (features, [levels]), all of one width and dtype; N is P / merge_size**2
    pixel_values     the patches of all images, and grid_thw the grids of all, on every rank; [0, C] and [0, 3] without
                     images
    group            the ranks that share the work; None is no group: this process encodes all
    policy           how images are shared (share_images); rows are in reading order in any case
    idle             what a rank without images does. "dummy": it encodes a blank image of the smallest size and cuts
                     the rows away, but keeps the graph, so that sharded weights and hooks see the same calls on every
                     rank. "skip": nothing. If the whole batch has no images, every rank encodes a dummy in any case
    grad             "partial": each rank uses the features for its own part of the sequence, and gradients are summed;
                     "whole": every rank has the same, whole gradient already (see all_gather_rows). Either way the
                     tower's parameter gradients, summed over the group, are whole: call sum_parameter_grads
    mode             how rows travel (all_gather_rows)
    split_frames     share videos by frames: for towers that attend within a frame
    alpha            what a patch's linear layers cost, in patches of attention (tower_alpha)
    replicate_below  if sharing saves the busiest rank fewer patches than this, every rank encodes all images and
                     nothing is gathered. 1, the default, does so for a single image; 0 always shares

    One small collective exchanges errors, a fingerprint of the batch and the arguments, and the rows' width and dtype;
    one gather moves features and levels together. An error on one rank is raised on all. A grid on a device is read
    once. There is no second gradient (create_graph=True).
    """
    warn_of_no_group(group, "encode_shared", "this process encodes all images")
    error: Exception | None = None
    work, outs, form = None, None, -1
    try:
        _check_choices(idle, grad, mode)
        _refuse_tensor_parallel(encode, group)
        work = plan_work(pixel_values, grid_thw, group, merge_size, policy, split_frames, alpha, replicate_below)
        if work.has_images or idle == "dummy" or not work.total_rows:
            outs, form = work.encode_own(encode, pixel_values, grid_thw)
    except Exception as wrong:  # raised by agree_rows, on every rank
        error = wrong
    if has_peers(group):
        grid = work.grid if work else ()
        mark = fingerprint(grid, merge_size, policy, idle, grad, mode, split_frames, alpha, replicate_below)
        kind = agree_rows(outs, form, mark, error, group)
        assert work is not None
        outs, form = _rows_of_all(outs, work, kind, group, mode, grad), kind.form
    elif error is not None:
        raise error
    assert outs is not None
    result: Encoded = _join_result(outs, form)
    return result


def _rows_of_all(
    outs: list[Tensor] | None, work: Work, kind: RowKind, group: Group, mode: str, grad: str
) -> list[Tensor]:
    """Features and levels of the whole batch, from this rank's outs; None if it skipped."""
    if work.is_shared:
        note_shared(work.share.imbalance)
        return gather_rows(outs or _no_rows(kind, group), work.share.rows, group, mode, grad, kind.needs_grad)
    assert outs is not None
    return [_OwnGradient.apply(x, group) for x in outs] if grad == "whole" else outs


def _join_result(outs: list[Tensor], form: int) -> Any:
    return outs[0] if form < 0 else (outs[0], outs[1:])


def _no_rows(kind: RowKind, group: Group) -> list[Tensor]:
    """Features and levels [0, H] of a rank that skipped."""
    number, place = 1 + max(kind.form, 0), wire_place(group)
    return [paddle.zeros([0, kind.width // number], dtype=kind.dtype, device=place) for _ in range(number)]


class _OwnGradient(PyLayer):  # type: ignore[misc]
    """For rows that every rank computed, with whole gradients: each rank keeps the gradient of a part of the rows.

    The parts are disjoint and cover all rows, so the sum over the group of the tower's parameter gradients is whole.
    """

    @staticmethod
    def forward(ctx: PyLayerContext, x: Tensor, group: Group) -> Tensor:
        ctx.own = [x.shape[0] * rank // group.nranks for rank in (group.rank, group.rank + 1)]
        return view_of(x)

    @staticmethod
    @differentiable_once
    def backward(ctx: PyLayerContext, grad: Tensor) -> Tensor:
        begin, end = ctx.own
        others = paddle.zeros_like(grad)
        return paddle.concat([others[:begin], grad[begin:end], others[end:]])


def _check_choices(idle: str, grad: str, mode: str) -> None:
    check_choice("idle", idle, IDLE)
    check_choice("grad", grad, GRADS)
    check_choice("mode", mode, ("auto", *MODES))


def _refuse_tensor_parallel(encode: object, group: Group | None) -> None:
    """Raises if encode is, or is a method of, a layer whose weights are cut over ranks of this group."""
    layer = encode if isinstance(encode, paddle.nn.Layer) else getattr(encode, "__self__", None)
    if not isinstance(layer, paddle.nn.Layer) or not has_peers(group):
        return
    for name, part in layer.named_sublayers(include_self=True):
        cut = [own for own, parameter in part.named_parameters(include_sublayers=False) if is_cut(parameter)]
        cut_over = getattr(part, "model_parallel_group", None)
        if cut and (cut_over is None or len(set(cut_over.ranks) & set(group.ranks)) > 1):
            raise ValueError(
                f"the tower's {name or type(part).__name__}.{cut[0]} ({type(part).__name__}) is tensor-parallel over "
                f"ranks of the group {list(group.ranks)}: work can be shared only where each rank holds the whole "
                "tower; build it with a tensor-parallel size of 1, or share over another group"
            )
