"""Vision DP around any tower: each rank encodes its share of the images, and all get all features."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, overload

import numpy as np
import numpy.typing as npt
import paddle
from paddle import Tensor
from paddle.autograd import PyLayer, PyLayerContext

from paddle_vl_sp.autograd import differentiable_once
from paddle_vl_sp.comm.agree import fingerprint
from paddle_vl_sp.comm.collectives import Group, has_peers, warn_of_no_group, wire_place
from paddle_vl_sp.comm.gather import GRADS, RowKind, agree_rows, gather_rows, view_of
from paddle_vl_sp.comm.grads import is_cut
from paddle_vl_sp.comm.uneven import MODES
from paddle_vl_sp.plan import VisualPlan
from paddle_vl_sp.report import note_shared
from paddle_vl_sp.settings import check_choice
from paddle_vl_sp.vision.owners import own_plan, rows_from_encoders, rows_from_here, wanted_rows
from paddle_vl_sp.vision.share import tower_alpha
from paddle_vl_sp.vision.work import Grid, Work, plan_work

IDLE = ("dummy", "skip")
QWEN3_VL_ALPHA = tower_alpha(1152, 4304)

Encoded = TypeVar("Encoded")  # features, or (features, [levels])


@overload
def encode_shared(
    encode: Callable[[Tensor, Grid], Encoded],
    pixel_values: Tensor,
    grid_thw: Grid,
    *,
    group: Group | None,
    merge_size: int,
    policy: str = ...,
    idle: str = ...,
    grad: str = ...,
    mode: str = ...,
    split_frames: bool = ...,
    alpha: int = ...,
    replicate_below: int = ...,
    plan: None = None,
) -> Encoded: ...


@overload
def encode_shared(
    encode: Callable[[Tensor, Grid], Encoded],
    pixel_values: Tensor,
    grid_thw: Grid,
    *,
    group: Group | None,
    merge_size: int,
    policy: str = ...,
    idle: str = ...,
    grad: str = ...,
    mode: str = ...,
    split_frames: bool = ...,
    alpha: int = ...,
    replicate_below: int = ...,
    plan: VisualPlan,
) -> tuple[Encoded, VisualPlan]: ...


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
    plan: VisualPlan | None = None,
) -> Encoded | tuple[Encoded, VisualPlan]:
    """encode(pixel_values, grid_thw), with the work shared over the group; the same result on every rank.

    With this rank's `plan`, only the rows that it uses: (result, own_plan), where own_plan places them::

        features, levels = encode_shared(tower, pixel_values, grid_thw, group=sp_group, merge_size=2)  # [N, H], L x ..
        (features, levels), own_plan = encode_shared(..., group=sp_group, merge_size=2, plan=plan)  # [n, H], L x ..
        (features, levels), own_plan = encode_shared(..., plan=plan, grad="whole")  # [N, H], L x [n, H]

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
    plan             on every rank its own, of the same batch: a row goes to the ranks whose plans use it, and to no
                     other. The result is [n, H], in reading order, for features that are placed after the cut:
                     gradients are partial, and return to the rank that encoded the row. With grad="whole" this is so
                     for the levels alone: features are placed before the cut, so every rank has all, as without a plan

    One small collective exchanges errors, a fingerprint of the batch and the arguments, and the rows' width and dtype;
    one gather moves features and levels together. With plans, another small one says who uses which row, and one
    exchange moves the rows. An error on one rank is raised on all. A grid or a plan on a device is read. There is no
    second gradient (create_graph=True).
    """
    warn_of_no_group(group, "encode_shared", "this process encodes all images")
    error: Exception | None = None
    work, outs, form, wanted = None, None, -1, None
    try:
        _check_choices(idle, grad, mode, plan)
        refuse_tensor_parallel(encode, group)
        work = plan_work(pixel_values, grid_thw, group, merge_size, policy, split_frames, alpha, replicate_below)
        wanted = None if plan is None else wanted_rows(plan, work.total_rows)
        if work.has_images or idle == "dummy" or not work.total_rows:
            outs, form = work.encode_own(encode, pixel_values, grid_thw)
    except Exception as wrong:  # raised by agree_rows, on every rank
        error = wrong
    if has_peers(group):
        grid = work.grid if work else ()
        options = policy, idle, grad, mode, split_frames, alpha, replicate_below, plan is None
        kind = agree_rows(outs, form, fingerprint(grid, merge_size, *options), error, group)
        assert work is not None
        if work.is_shared:
            note_shared(work.share.imbalance)
        outs, form = _exchanged(outs, work, kind, group, mode, grad, wanted), kind.form
    elif error is not None:
        raise error
    elif wanted is not None and outs is not None:
        to_all = _num_to_all(outs, grad, wanted)
        outs = outs[:to_all] + rows_from_here(outs[to_all:], wanted)
    assert outs is not None
    result: Encoded = join_result(outs, form)
    return result if plan is None or wanted is None else (result, own_plan(plan, len(wanted)))


def _exchanged(
    outs: list[Tensor] | None,
    work: Work,
    kind: RowKind,
    group: Group,
    mode: str,
    grad: str,
    wanted: npt.NDArray[np.int64] | None,
) -> list[Tensor]:
    """Features and levels of the whole batch, or the wanted rows, from this rank's outs; None if it skipped."""
    own = outs or no_rows(kind, group)
    num = _num_to_all(own, grad, wanted)
    to_all, to_owners = own[:num], own[num:]
    if not work.is_shared and grad == "whole":
        to_all = [_OwnGradient.apply(x, group) for x in to_all]
    elif work.is_shared and to_all:
        to_all = gather_rows(to_all, work.share.rows, group, mode, grad, kind.needs_grad)
    if wanted is None or not to_owners:
        return to_all
    if not work.is_shared:
        return to_all + rows_from_here(to_owners, wanted)
    return to_all + rows_from_encoders(to_owners, work.share.rows, wanted, group, kind.needs_grad)


def _num_to_all(outs: list[Tensor], grad: str, wanted: npt.NDArray[np.int64] | None) -> int:
    """How many of features and levels every rank gets whole; of the others each rank gets the rows that it wants."""
    if wanted is None:
        return len(outs)
    return 1 if grad == "whole" else 0  # features that are placed before the cut


def join_result(outs: list[Tensor], form: int) -> Any:
    return outs[0] if form < 0 else (outs[0], outs[1:])


def no_rows(kind: RowKind, group: Group) -> list[Tensor]:
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


def _check_choices(idle: str, grad: str, mode: str, plan: VisualPlan | None) -> None:
    check_choice("idle", idle, IDLE)
    check_choice("grad", grad, GRADS)
    check_choice("mode", mode, ("auto", *MODES))
    if plan is not None and grad == "partial" and mode != "auto":
        raise ValueError(
            f"encode_shared with a plan moves rows in its own way, got mode={mode!r}: leave it out, or say "
            'grad="whole" where the features are placed before the cut and only the levels go by the plan'
        )


def refuse_tensor_parallel(encode: object, group: Group | None) -> None:
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
