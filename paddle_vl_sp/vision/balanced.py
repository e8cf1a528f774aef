"""Vision DP over data parallelism: every rank brings its own images, and the work of all of them is balanced."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar, cast

import numpy as np
import numpy.typing as npt
import paddle
from paddle import Tensor

from paddle_vl_sp.comm.agree import agree_on, check_equal_fingerprints, exchange, fingerprint
from paddle_vl_sp.comm.collectives import Group, has_peers, warn_of_no_group
from paddle_vl_sp.comm.gather import DTYPES, agree_rows, check_tensors, name_of
from paddle_vl_sp.comm.routed import route_rows
from paddle_vl_sp.report import note_balanced
from paddle_vl_sp.settings import check_choice
from paddle_vl_sp.vision.homes import POLICIES, BalancedShare, balance_images
from paddle_vl_sp.vision.parallel import IDLE, QWEN3_VL_ALPHA, join_result, no_rows, refuse_tensor_parallel
from paddle_vl_sp.vision.work import Grid, checked_grid, encode_items

Encoded = TypeVar("Encoded")  # features, or (features, [levels])
Integers = npt.NDArray[np.int64]

# what ranks say of themselves before they exchange grids
NUMBERS = ("has stopped", "fingerprint of the arguments", "images", "width", "dtype", "wants a gradient", "trains")


def encode_balanced(
    encode: Callable[[Tensor, Grid], Encoded],
    pixel_values: Tensor,
    grid_thw: Grid,
    *,
    group: Group | None,
    merge_size: int,
    policy: str = "longest",
    idle: str = "dummy",
    split_frames: bool = False,
    alpha: int = QWEN3_VL_ALPHA,
) -> Encoded:
    """encode(pixel_values, grid_thw) of this rank's own images, encoded wherever the group's load is balanced.

    Every rank gets the features of its own images, in reading order, whoever encoded them::

        features, levels = encode_balanced(tower, pixel_values, grid_thw, group=data_group, merge_size=2)
        loss_of(features, levels).backward()  # [N, H], L x [N, H]

    encode        a tower with replicated weights: pixels [P, C] and grid [I, 3] of (t, h, w) to features [N, H], or to
                  (features, [levels]), all of one width and dtype; N is P / merge_size**2
    pixel_values  the patches of this rank's images, and grid_thw their grids; [0, C] and [0, 3] where it has none
    group         the ranks whose work is balanced, such as those of data parallelism; None is no group
    policy        who encodes what (`paddle_vl_sp.vision.homes.balance_images`)
    idle          what a rank that encodes nothing does: "dummy", a blank image of the smallest size, so that every rank
                  calls the tower, or "skip" (see encode_shared); dummies too where pixels need a gradient
    split_frames  share videos by frames: for towers that attend within a frame
    alpha         what a patch's linear layers cost, in patches of attention (tower_alpha)

    The sum over the group of the tower's parameter gradients is the sum of all ranks' as without balance: where data
    parallelism sums or averages them, nothing changes. They are not whole on one rank.

    Two small collectives exchange errors and grids, one exchange moves pixels, a small one says how the encoding went,
    and one exchange moves rows home; nothing is moved if every rank encodes its own. The backward is one exchange that
    returns the rows' gradients. Every rank must make each call and its backward: a rank without images gets [0, H],
    which must be in its loss (`replace_rows` with a plan without rows is enough). An error on one rank is raised on
    all. A rank that makes no more calls says so by `stop_balancing`. A grid on a device is read. There is no second
    gradient.
    """
    warn_of_no_group(group, "encode_balanced", "this process encodes its own images")
    if not has_peers(group):
        grid = _checked(encode, pixel_values, grid_thw, group, merge_size, policy, idle)
        outs, form = encode_items(encode, pixel_values, grid, grid_thw, merge_size)
        return cast(Encoded, join_result(outs, form))
    meeting = _meet(encode, pixel_values, grid_thw, group, (merge_size, policy, idle, split_frames, alpha))
    share = balance_images(meeting.grids, merge_size, alpha, policy, split_frames)
    pixels = meeting.like_others(pixel_values)
    if share.moves:
        (pixels,) = route_rows([pixels], share.routes_of_pixels(group.rank), group, meeting.wants_pixel_grad)
    must_encode = idle == "dummy" or meeting.wants_pixel_grad
    outs, form = _by_share(encode, pixels, grid_thw, share, group, must_encode)
    note_balanced(share, _row_bytes([pixels]), _row_bytes(outs))
    return cast(Encoded, join_result(outs, form))


def encode_assigned(
    encode: Callable[[Tensor, Grid], Encoded],
    pixel_values: Tensor,
    share: BalancedShare,
    *,
    group: Group | None,
    idle: str = "dummy",
) -> Encoded:
    """As `encode_balanced`, for pixels that are where they are encoded: no pixels travel, only rows.

    pixel_values  the patches of what this rank encodes by the share, `share.encoded_grid(rank)`; [0, C] where that is
                  nothing
    share         the same on every rank, made before of sizes that all know (`balance_images`,
                  `paddle_vl_sp.vision.loading`); its ranks are those of the group

    Every rank gets the rows of its batch. Where several ranks hold one batch, each must use them for its own part of
    the sequence: the gradient of a row is the sum over them.
    """
    error: Exception | None = None
    try:
        check_choice("idle", idle, IDLE)
        refuse_tensor_parallel(encode, group)
        check_tensors([pixel_values])
        _check_assigned(pixel_values, share, group)
    except Exception as wrong:  # raised by agree_on, on every rank
        error = wrong
    told = fingerprint(idle, share.items, share.batch, share.encoder, share.num_ranks, share.merge_size)
    wants = error is None and paddle.is_grad_enabled() and not pixel_values.stop_gradient
    table = agree_on([0, told, wants, *[0] * (len(NUMBERS) - 3)], error, group)
    _check_stopped(table[:, 0])
    check_equal_fingerprints(table[:, 1], "share", "a sampler with another seed, epoch or data set on some ranks")
    grid_like = paddle.zeros([0, 3], dtype="int64", device=pixel_values.place)
    must_encode = idle == "dummy" or bool(table[:, 2].any())
    outs, form = _by_share(encode, pixel_values, grid_like, share, group, must_encode)
    note_balanced(share, 0, _row_bytes(outs))
    return cast(Encoded, join_result(outs, form))


def _by_share(
    encode: Callable[[Tensor, Grid], object],
    pixels: Tensor,
    grid_like: Grid,
    share: BalancedShare,
    group: Group | None,
    must_encode: bool,
) -> tuple[list[Tensor], int]:
    """Features and levels of this rank's batch, and their form, from the pixels that it encodes."""
    if not has_peers(group):
        return encode_items(encode, pixels, share.encoded_grid(0), grid_like, share.merge_size)
    encoded, form, error = None, -1, None
    own_grid = share.encoded_grid(group.rank)
    try:
        if len(own_grid) or must_encode or not len(share.items):
            encoded, form = encode_items(encode, pixels, own_grid, grid_like, share.merge_size)
    except Exception as wrong:  # raised by agree_rows, on every rank
        error = wrong
    kind = agree_rows(encoded, form, 0, error, group)
    outs = no_rows(kind, group) if encoded is None else encoded
    if share.moves or share.ranks_per_batch > 1:
        outs = route_rows(outs, share.routes_of_rows(group.rank), group, kind.needs_grad)
    return outs, kind.form


def stop_balancing(group: Group | None) -> None:
    """Says that this rank makes no more calls of encode_balanced over this group; every rank says it at its end::

        for batch in loader:
            train(batch)  # with encode_balanced(..., group=data_group)
        stop_balancing(data_group)

    If others still encode, all raise, with the rank that stopped, where they would wait for it for ever.
    """
    if has_peers(group):
        _check_stopped(agree_on([1] + [0] * (len(NUMBERS) - 1), None, group)[:, 0])


@dataclass(frozen=True)
class _Meeting:
    """What all ranks bring to one call."""

    grids: list[Integers]  # of each rank, [I, 3]
    width: int  # of pixels
    dtype: str
    wants_pixel_grad: bool

    def like_others(self, pixels: Tensor) -> Tensor:
        """Without rows, of the others' width and dtype."""
        if pixels.shape[0]:
            return pixels
        return paddle.zeros([0, self.width], dtype=self.dtype, device=pixels.place)


def _meet(
    encode: object, pixels: Tensor, grid_thw: Grid, group: Group, arguments: tuple[int, str, str, bool, int]
) -> _Meeting:
    """The grids of all ranks, by two small collectives; an error of one, or a difference, is raised on all."""
    error: Exception | None = None
    grid, own = np.zeros([0, 3], dtype=np.int64), [0] * len(NUMBERS)
    try:
        grid = _checked(encode, pixels, grid_thw, group, *arguments[:3])
        trains = paddle.is_grad_enabled()
        dtype = DTYPES.index(name_of(pixels.dtype))
        wants_grad = trains and not pixels.stop_gradient
        own = [0, fingerprint(arguments), len(grid), pixels.shape[1], dtype, wants_grad, trains]
    except Exception as wrong:  # raised by agree_on, on every rank
        error = wrong
    table = agree_on(own, error, group)
    stopped, fingerprints, counts, widths, dtypes, wants, training = table.T
    _check_stopped(stopped)
    check_equal_fingerprints(fingerprints, "arguments of encode_balanced (merge_size, policy, idle, ..)", "its callers")
    if training.any() and not training.all():
        raise ValueError(
            f"rank {training.argmin()} calls encode_balanced under no_grad, and rank {training.argmax()} with "
            "gradients: all ranks of the group must train or evaluate at the same time; look for a data loader that is "
            "shorter on some ranks"
        )
    bring = counts > 0 if counts.any() else counts == 0  # where no rank has images, each has pixels [0, C]
    kinds = sorted({(int(width), DTYPES[dtype]) for width, dtype in zip(widths[bring], dtypes[bring], strict=True)})
    if len(kinds) > 1:
        described = ", ".join(f"{width} wide {dtype}" for width, dtype in kinds)
        raise ValueError(f"all ranks must bring pixels of one width and dtype, got {described}: cast them first")
    padded = np.zeros([int(counts.max()), 3], dtype=np.int64)
    padded[: len(grid)] = grid
    grids = (
        exchange(padded.ravel().tolist(), group).reshape(len(counts), -1, 3) if padded.size else [grid] * len(counts)
    )
    return _Meeting([own[:count] for own, count in zip(grids, counts, strict=True)], *kinds[0], bool(wants.any()))


def _checked(
    encode: object, pixels: Tensor, grid_thw: Grid, group: Group | None, merge_size: int, policy: str, idle: str
) -> Integers:
    """This rank's grid, int64 [I, 3]."""
    check_choice("policy", policy, POLICIES)
    check_choice("idle", idle, IDLE)
    refuse_tensor_parallel(encode, group)
    check_tensors([pixels])
    return checked_grid(pixels, grid_thw, merge_size)


def _row_bytes(xs: Sequence[Tensor]) -> int:
    return sum(x.shape[1] * x.element_size() for x in xs)


def _check_assigned(pixels: Tensor, share: BalancedShare, group: Group | None) -> None:
    rank, num_ranks = (group.rank, group.nranks) if has_peers(group) else (0, 1)
    if share.num_ranks != num_ranks:
        raise ValueError(f"the share is of {share.num_ranks} ranks and the group has {num_ranks}: make one of it")
    wanted = int(share.patches_encoded[rank])
    if len(pixels.shape) != 2 or pixels.shape[0] != wanted:
        raise ValueError(
            f"by the share rank {rank} encodes {wanted} patches, got pixel_values {list(pixels.shape)}: give "
            "those of share.encoded_grid(rank), in its order"
        )


def _check_stopped(stopped: Integers) -> None:
    if stopped.any() and not stopped.all():
        ranks = ", ".join(map(str, np.flatnonzero(stopped)))
        raise ValueError(
            f"rank {ranks} of {len(stopped)} has stopped, and the others still call encode_balanced: all ranks of the "
            "group must make equally many forwards; look for a data loader that is shorter on some ranks (drop_last, a "
            "sampler that pads)"
        )
