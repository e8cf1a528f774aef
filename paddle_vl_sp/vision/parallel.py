"""Vision DP around any tower: each rank encodes its share of the images, and all get all features."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import paddle
from paddle import Tensor
from paddle.autograd import PyLayer

from paddle_vl_sp.autograd import differentiable_once
from paddle_vl_sp.comm import collectives
from paddle_vl_sp.comm.agree import fingerprint
from paddle_vl_sp.comm.gather import GRADS, RowKind, agree_rows, gather_rows, view_of
from paddle_vl_sp.comm.grads import is_cut
from paddle_vl_sp.comm.uneven import MODES
from paddle_vl_sp.report import note_shared
from paddle_vl_sp.settings import check_choice
from paddle_vl_sp.vision.share import tower_alpha
from paddle_vl_sp.vision.work import plan_work

IDLE = ("dummy", "skip")
QWEN3_VL_ALPHA = tower_alpha(1152, 4304)


def encode_shared(
    encode: Callable[[Tensor, Any], Any],
    pixel_values: Tensor,
    grid_thw: Any,
    *,
    group: Any,
    merge_size: int,
    policy: str = "contiguous",
    idle: str = "dummy",
    grad: str = "partial",
    mode: str = "auto",
    split_frames: bool = False,
    alpha: int = QWEN3_VL_ALPHA,
    replicate_below: int = 1,
) -> Any:
    """encode(pixel_values, grid_thw), with the work shared out over the group; the same result on every rank.

    encode           a tower with replicated weights: pixels [P, C] and grid [I, 3] of (t, h, w) to features [N, H], or
                     to (features, [levels]), all of one width and dtype; N is P / merge_size**2
    pixel_values     all images' patches, and grid_thw all images', on every rank; [0, C] and [0, 3] without images
    policy           how images are shared (share_images); rows come back in reading order in any case
    idle             what a rank without images does. "dummy": it encodes a blank image of the smallest size, whose rows
                     are cut away but stay in the graph, so that sharded weights and hooks see the same calls on every
                     rank; "skip": nothing (a batch without images is a dummy on every rank all the same)
    grad             "partial": each rank's features are used for its own part of the sequence; "whole": every rank
                     brings the same, whole gradient (see all_gather_rows). Either way the sum over the group of the
                     tower's parameter gradients is the whole gradient: sum_parameter_grads makes it so on every rank
    mode             how rows travel (all_gather_rows)
    split_frames     share videos by frames: for towers that attend within a frame
    alpha            what a patch's linear layers cost, in patches of attention (tower_alpha)
    replicate_below  where sharing would spare the busiest rank fewer patches than this, every rank encodes all and
                     nothing is gathered; 1, the default, is for a single image, 0 for always sharing

    One small collective tells the ranks each other's errors, the batch's fingerprint, and the rows' kind; one gather
    moves features and levels together. An error on one rank is raised on all. A grid on a device is read once. A group
    of one, or None, which means nobody, encodes all. There is no second gradient (create_graph=True).
    """
    error, work, outs, form = None, None, None, -1
    try:
        _check_choices(encode, group, idle, grad, mode)
        work = plan_work(pixel_values, grid_thw, group, merge_size, policy, split_frames, alpha, replicate_below)
        if work.is_needed or idle == "dummy" or not work.num_rows:
            outs, form = work.encoded(encode, pixel_values, grid_thw)
    except Exception as wrong:  # raised by agree_rows, on every rank
        error = wrong
    if not collectives.has_peers(group):
        if error is not None:
            raise error
        assert outs is not None
        return _as_encoded(outs, form)
    grid = work.grid if work else ()
    mark = fingerprint(grid, merge_size, policy, idle, grad, mode, split_frames, alpha, replicate_below)
    kind = agree_rows(outs, form, mark, error, group)
    assert work is not None
    if not work.is_shared:
        assert outs is not None
        if grad == "whole":
            outs = [_OwnGradient.apply(x, group) for x in outs]
        return _as_encoded(outs, kind.form)
    note_shared(work.share.imbalance)
    outs = outs or _no_rows(kind, group)
    rows = gather_rows(outs, work.share.rows, group, mode, grad, kind.needs_grad)
    return _as_encoded(rows, kind.form)


def _as_encoded(xs: Sequence[Tensor], form: int) -> Any:
    return xs[0] if form < 0 else (xs[0], list(xs[1:]))


def _no_rows(kind: RowKind, group: Any) -> list[Tensor]:
    """What a rank that skipped brings to the gather."""
    number, place = 1 + max(kind.form, 0), collectives.wire_place(group)
    return [paddle.zeros([0, kind.width // number], dtype=kind.dtype, device=place) for _ in range(number)]


class _OwnGradient(PyLayer):  # type: ignore[misc]
    """Of replicated work with whole gradients, each rank takes the gradient of some rows, and all of all rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.own = [x.shape[0] * place // group.nranks for place in (group.rank, group.rank + 1)]
        return view_of(x)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        begin, end = ctx.own
        others = paddle.zeros_like(grad)
        return paddle.concat([others[:begin], grad[begin:end], others[end:]])


def _check_choices(encode: Any, group: Any, idle: str, grad: str, mode: str) -> None:
    check_choice("idle", idle, IDLE)
    check_choice("grad", grad, GRADS)
    check_choice("mode", mode, ("auto", *MODES))
    _refuse_tensor_parallel(encode, group)


def _refuse_tensor_parallel(encode: Any, group: Any) -> None:
    """Raises if encode is, or is a method of, a layer whose weights are cut over ranks of this group."""
    layer = encode if isinstance(encode, paddle.nn.Layer) else getattr(encode, "__self__", None)
    if not isinstance(layer, paddle.nn.Layer) or not collectives.has_peers(group):
        return
    for name, part in layer.named_sublayers(include_self=True):
        cut = [own for own, parameter in part.named_parameters(include_sublayers=False) if is_cut(parameter)]
        of = getattr(part, "model_parallel_group", None)
        if cut and (of is None or len(set(of.ranks) & set(group.ranks)) > 1):
            raise ValueError(
                f"the tower's {name or type(part).__name__}.{cut[0]} ({type(part).__name__}) is tensor-parallel over "
                f"ranks of the group {list(group.ranks)}: work can be shared only where each rank holds the whole "
                "tower; build it with a tensor-parallel size of 1, or share over another group"
            )
