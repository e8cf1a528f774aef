"""How a plan travels: in the data loader's batch, in a model's dict, and from a forward to the calls below it.

**Batch.** The data loader adds to a batch with images or videos

    visual_update_indices   int64 [ranks, n]  row r: the rows of rank r's flattened hidden states; -1 where it has fewer
    visual_gather_indices   int64 [ranks, n]  the feature row of each, increasing; -1 where it has fewer
    visual_positions        int64 [N]         the place of every visual token among the B * S tokens; [1, N] where the
                                              plans are for the flattened batch, which is how a model sees it
    visual_mask             bool [B, S]       where they are; its shape must be that of the model's ids
    visual_feature_order    int64 [N]         with images and videos: the row of [image; video] each token takes

The plans of *all* ranks travel in every batch, and a rank takes its own row when it uses them: Paddle's tensor-parallel
wrapper broadcasts the tensors of the group's first rank to the others, so what differs from rank to rank is lost.

**Model's dict.** From layer to layer the plan of this rank travels under the first two names, int64 [n]; across
pipeline stages filled up with -1 to [B * S_local], since stages agree on shapes once and n changes from batch to batch.
Indices in the dict say that the gradients of the levels are complete: who makes the plan completes them.

**Calls.** What a forward knows, and a deeper call that it does not make itself needs, goes through a `Handover`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt

from paddle_vl_sp.interleave import order_on_host
from paddle_vl_sp.layout import SeqLayout
from paddle_vl_sp.plan import VisualPlan, check_feature_count, plan_visual
from paddle_vl_sp.settings import check_choice

if TYPE_CHECKING:
    from paddle import Tensor

    from paddle_vl_sp.comm.collectives import Group

UPDATE, GATHER = "visual_update_indices", "visual_gather_indices"
POSITIONS, PLANNED_MASK, ORDER = "visual_positions", "visual_mask", "visual_feature_order"
BATCH_KEYS = (UPDATE, GATHER, POSITIONS, PLANNED_MASK, ORDER)
MASK, LEVELS = "visual_pos_masks", "deepstack_visual_emb"  # PaddleFleet's own names in the model's dict
PART = "visual_plan_is_of_a_part"  # in an embedding's dict: ids and plan are of a part of the sequence, features whole
CARRIED = (UPDATE, GATHER, LEVELS, MASK)  # everything visual in it
CUTS = ("sequence", "flattened")

T = TypeVar("T")


def plans_of_all_ranks(
    ids: npt.NDArray[Any],
    placeholder_ids: Sequence[int],
    sp_size: int = 1,
    cut: str = "sequence",
    sequence_parallel: bool | None = None,
) -> dict[str, npt.NDArray[Any]]:
    """What the data loader adds to a batch of ids [B, S]; nothing for a batch of text.

    Two samples of four tokens, v visual, cut="flattened" for two ranks::

        ids                    t v v t   v v v t
        visual_update_indices  [[ 1  2 -1]          rank 0 has rows 0 .. 3
                                [ 0  1  2]]         rank 1 has rows 4 .. 7
        visual_gather_indices  [[ 0  1 -1]
                                [ 2  3  4]]
        visual_positions       [[1 2 4 5 6]]
    """
    if len(placeholder_ids) != 2:
        raise ValueError(f"placeholder_ids must be (image_token_id, video_token_id), got {placeholder_ids!r}")
    check_choice("cut", cut, CUTS)
    visual = np.isin(ids, placeholder_ids)  # [B, S]
    if not visual.any():
        return {}
    flattened = cut == "flattened"
    tokens = visual.reshape(1, -1) if flattened else visual
    layouts = [SeqLayout(tokens.shape[1], sp_size=sp_size, sp_rank=rank) for rank in range(sp_size)]
    # sequence-parallel hidden states of PaddleFleet are [S, B, H], also where one rank has all of them
    first = not flattened and (sp_size > 1 if sequence_parallel is None else sequence_parallel)
    plans = [plan_visual(tokens, None, layout, sequence_first=first) for layout in layouts]
    arrays = {
        UPDATE: _stack_rows([plan.update_indices for plan in plans]),
        GATHER: _stack_rows([plan.gather_indices for plan in plans]),
        POSITIONS: np.flatnonzero(tokens)[None] if flattened else np.flatnonzero(visual),
        PLANNED_MASK: visual,
    }
    order, counts = order_on_host(ids, placeholder_ids)
    return arrays | {ORDER: order} if counts.all() else arrays


_failed_in_loader: list[Exception] = []


def fail_in_the_next_forward(error: Exception) -> None:
    """For a loader's thread, whose own exceptions end nothing: the next forward that takes plans raises it."""
    _failed_in_loader.append(error)


@dataclass(frozen=True, eq=False)
class LoadedPlans:
    """The arrays that came with a batch, taken out of the arguments of a forward."""

    update: Tensor  # [ranks, n]
    gather: Tensor  # [ranks, n]
    positions: Tensor  # [N]
    mask: Tensor  # [B, S]
    order: Tensor | None  # [N], with images and videos

    @classmethod
    def pop_from(cls, arguments: dict[str, Any], cut: str | None = None) -> LoadedPlans | None:
        """Takes the keys out of the arguments, whose forward does not know them; None where there are none.

        cut  how the model cuts: "sequence" or "flattened"; None: it uses the plan of the uncut sequence only
        """
        if _failed_in_loader:
            raise _failed_in_loader.pop()
        popped = {key: arguments.pop(key, None) for key in BATCH_KEYS}
        missing = [key for key in (UPDATE, GATHER, POSITIONS, PLANNED_MASK) if popped[key] is None]
        if len(missing) == 4:
            return None
        if missing:
            raise ValueError(
                f"the batch has part of a plan but no {', '.join(missing)}: hand on all that the loader adds"
            )
        planned = "flattened" if popped[POSITIONS].ndim == 2 else "sequence"
        if cut and planned != cut and popped[UPDATE].shape[0] > 1:
            raise ValueError(
                f"the batch was planned with cut={planned!r}, but this model cuts by {cut!r}: PlanningCollate(..., "
                f"cut={cut!r})"
            )
        positions = popped[POSITIONS].reshape([-1])
        return cls(popped[UPDATE], popped[GATHER], positions, popped[PLANNED_MASK], popped[ORDER])

    def check_shape(self, ids: Tensor) -> None:
        """Whether the ids [B, S] are those that were planned for, as far as it shows without reading a device."""
        if list(self.mask.shape) != list(ids.shape):
            raise ValueError(
                f"the batch was planned for ids {list(self.mask.shape)}, but the model sees {list(ids.shape)}: plan in "
                "the last collate function, after padding"
            )

    def whole(self, shape: Sequence[int], num_features: int) -> VisualPlan:
        """The plan of the uncut [B, S]."""
        import paddle

        check_feature_count(self.positions.shape[0], num_features)
        every = paddle.arange(num_features, dtype="int64").to(self.positions.place)
        return VisualPlan.from_indices(self.positions, every, tuple(shape), num_features)

    def own(self, group: Group | None, row_shape: Sequence[int], num_features: int) -> VisualPlan:
        """The plan of this rank's hidden states."""
        rank, size = (0, 1) if group is None else (group.rank, group.nranks)
        update, gather = (own_row(rows, rank, size) for rows in (self.update, self.gather))
        return VisualPlan.from_indices(update, gather, row_shape, num_features)


def own_row(rows: Any, rank: int, size: int) -> Any:
    """[ranks, n] -> [n] of this rank; an array [n] is this rank's already."""
    if len(rows.shape) == 1:
        return rows
    if len(rows.shape) != 2 or (rows.shape[1] == 1 and rows.shape[0] != size):
        raise ValueError(
            f"index arrays must be 1-D and of one length, or [ranks, n] with {size} ranks, got {list(rows.shape)}: "
            "plan for the degree that the model runs with, or, if these are indices of one rank [n, 1], squeeze them"
        )
    if rows.shape[0] != size:
        raise ValueError(
            f"the batch was planned for sp_size {rows.shape[0]}, the tensor-parallel group has {size} ranks: "
            "give PlanningCollate the degree that the model runs with"
        )
    return rows[rank]


def plan_in(dict_args: dict[str, Any], layout: SeqLayout, row_shape: Sequence[int], num_features: int) -> Any:
    """The VisualPlan that is in a model's dict, checked as far as it shows without reading a device; None without one.

    Its arrays are [n] of this rank, or [ranks, n] from the data loader; -1 at the end of a row is skipped.
    """
    update, gather = dict_args.get(UPDATE), dict_args.get(GATHER)
    if update is None and gather is None:
        return None
    if update is None or gather is None:
        missing = UPDATE if update is None else GATHER
        raise ValueError(f"the batch has one of the two index arrays but no {missing}: a plan is both or none")
    update, gather = (own_row(rows, layout.sp_rank, layout.sp_size) for rows in (update, gather))
    plan = VisualPlan.from_indices(update, gather, row_shape, num_features)
    _check_size(plan, is_whole=layout.local_len == layout.seq_len and not dict_args.get(PART))
    return plan


def indices_to_carry(plan: VisualPlan, num_stages: int) -> dict[str, Tensor]:
    """The index arrays for the model's dict: [n]; where pipeline stages are to be crossed, -1 up to [B * S_local]."""
    arrays = {UPDATE: plan.update_indices, GATHER: plan.gather_indices}
    if num_stages == 1:
        return arrays
    return {key: _fill_up(array, plan.num_rows) for key, array in arrays.items()}


def levels_to_carry(levels: Sequence[Tensor], level: int) -> list[Tensor]:
    """The levels after `level` was added: those that are done go on without gradient.

    Across pipeline stages a tensor that wants one is owed one by the stage that receives it.
    """
    return [x.detach() if i <= level else x for i, x in enumerate(levels)]


def mask_to_carry(mask: Tensor, num_stages: int) -> Tensor:
    """A view cannot be sent to another stage, and PaddleFleet's mask is one."""
    return mask if num_stages == 1 else mask.contiguous()


class Handover(Generic[T]):
    """A value from a forward to the calls below it, past whatever is between the two.

    It belongs to the thread, can be read as often as the deeper call runs, and is gone after. Where a deeper call is
    replayed in the backward, as recompute does, there is none: that call must be able to do without.
    """

    def __init__(self, name: str) -> None:
        self._value: ContextVar[T | None] = ContextVar(name, default=None)

    @contextmanager
    def given(self, value: T) -> Iterator[None]:
        token = self._value.set(value)
        try:
            yield
        finally:
            self._value.reset(token)

    def get(self) -> T | None:
        return self._value.get()


@dataclass(frozen=True, eq=False)
class OfMask:
    """What is known of a mask as it was when this was made."""

    mask: Tensor  # bool [B, S]; kept, so that its memory is not given to another

    def __post_init__(self) -> None:
        self.__dict__["_identity"] = _identity(self.mask)

    def is_for(self, mask: Tensor) -> bool:
        """Whether it is that mask, or its detached form as recompute hands it on, and not written to since."""
        return bool(_identity(mask) == self.__dict__["_identity"])


def _identity(x: Tensor) -> tuple[Any, ...]:
    """Memory, form and version of a tensor; in a traced graph the variable."""
    if not hasattr(x, "data_ptr"):
        return (id(x),)
    return x.data_ptr(), tuple(x.shape), tuple(x.strides), x.dtype, x._inplace_version()


def _stack_rows(arrays: list[npt.NDArray[np.int64]]) -> npt.NDArray[np.int64]:
    """Arrays of different lengths as rows, -1 where they end: [1 2] [3]  ->  [[1 2] [3 -1]]."""
    table = np.full((len(arrays), max(map(len, arrays))), -1, dtype=np.int64)
    for row, array in zip(table, arrays, strict=True):
        row[: array.size] = array
    return table


def _fill_up(indices: Tensor, length: int) -> Tensor:
    """[4 7]  ->  [4 7 -1 -1 ...]"""
    import paddle

    return paddle.concat([indices, paddle.full([length - indices.shape[0]], -1, "int64").to(indices.place)])


def _check_size(plan: VisualPlan, is_whole: bool) -> None:
    dtypes = {str(x.dtype).removeprefix("paddle.") for x in (plan.update_indices, plan.gather_indices)}
    if dtypes != {"int64"}:
        raise ValueError(f"{UPDATE} and {GATHER} must be int64, got {sorted(dtypes)}")
    num_features = plan.num_features or 0
    n, most = int(plan.update_indices.shape[0]), min(num_features, plan.num_rows)
    if n > most or (is_whole and n != num_features):
        raise ValueError(
            f"the batch's plan has {n} visual rows for this rank, but there are {num_features} feature rows and "
            f"{plan.num_rows} rows of hidden states: plan with the ids, the layout and the rank of this batch"
        )
