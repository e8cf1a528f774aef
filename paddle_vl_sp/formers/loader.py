"""Plans made where the batch is made: the data loader knows the ids on the host, so the model need not ask a device.

A batch with images or videos gets

    visual_update_indices   int64 [ranks, n]  row r: the rows of rank r's flattened hidden states; -1 where it has fewer
    visual_gather_indices   int64 [ranks, n]  the feature row of each, increasing; -1 where it has fewer
    visual_positions        int64 [N]         the place of every visual token among the B * S tokens; [1, N] where the
                                              plans are for the flattened batch, so that a model can tell
    visual_mask             bool [B, S]       where they are: by its shape a model sees that it is planned for its ids
    visual_feature_order    int64 [N]         with images and videos: the row of [image; video] each token takes

The plans of *all* ranks travel in every batch, and a rank takes its own row when it uses them: Paddle's tensor-parallel
wrapper broadcasts the tensors of the group's first rank to the others, so what differs from rank to rank is lost.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from paddle_vl_sp.choices import check_choice
from paddle_vl_sp.joint import order_on_host
from paddle_vl_sp.layout import SeqLayout
from paddle_vl_sp.plan import VisualPlan, check_feature_count, plan_visual

UPDATE, GATHER = "visual_update_indices", "visual_gather_indices"
POSITIONS, MASK, ORDER = "visual_positions", "visual_mask", "visual_feature_order"
KEYS = (UPDATE, GATHER, POSITIONS, MASK, ORDER)
CUTS = ("sequence", "flattened")


@dataclass(frozen=True)
class PlanningCollate:
    """A collate function that adds the plans of all ranks to what another one returns.

    collate          returns a mapping with "input_ids" [B, S] (numpy or Paddle), padded as the model will see it
    placeholder_ids  (image_token_id, video_token_id)
    sp_size          the tensor-parallel degree where sequence_parallel is on, else 1
    sequence_parallel  whether it is on; needed only where it is on with a degree of 1
    cut              "sequence" for PaddleFleet's model, [S / sp_size, B, H]; "flattened" for the plain one
    merge_size       the tower's spatial_merge_size; where given, the grids are held against the ids, in the loader
    """

    collate: Callable[[Any], Mapping[str, Any]]
    placeholder_ids: tuple[int, int]
    sp_size: int = 1
    cut: str = "sequence"
    merge_size: int | None = None
    sequence_parallel: bool | None = None

    def __call__(self, samples: Any) -> dict[str, Any]:
        batch = dict(self.collate(samples))
        ids = np.asarray(batch["input_ids"])
        if self.merge_size is not None:
            _check_grids(batch, ids, self.placeholder_ids, self.merge_size)
        plans = plans_of_all_ranks(ids, self.placeholder_ids, self.sp_size, self.cut, self.sequence_parallel)
        if not isinstance(batch["input_ids"], np.ndarray):
            import paddle

            return batch | {key: paddle.to_tensor(value, place=paddle.CPUPlace()) for key, value in plans.items()}
        return batch | plans


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
        UPDATE: _stacked([plan.update_indices for plan in plans]),
        GATHER: _stacked([plan.gather_indices for plan in plans]),
        POSITIONS: np.flatnonzero(tokens)[None] if flattened else np.flatnonzero(visual),
        MASK: visual,
    }
    order, counts = order_on_host(ids, placeholder_ids)
    return arrays | {ORDER: order} if counts.all() else arrays


@dataclass(frozen=True, eq=False)
class LoadedPlans:
    """The arrays that came with a batch."""

    update: Any  # [ranks, n]
    gather: Any  # [ranks, n]
    positions: Any  # [N]
    mask: Any  # [B, S]
    order: Any  # [N] or None

    @classmethod
    def taken_from(cls, arguments: dict[str, Any], cut: str) -> LoadedPlans | None:
        """Takes the keys out of the arguments of a forward, which does not know them; the model cuts in this way."""
        taken = {key: arguments.pop(key, None) for key in KEYS}
        missing = [key for key in (UPDATE, GATHER, POSITIONS, MASK) if taken[key] is None]
        if len(missing) == 4:
            return None
        if missing:
            raise ValueError(
                f"the batch has part of a plan but no {', '.join(missing)}: hand on all that the loader adds"
            )
        planned = "flattened" if taken[POSITIONS].ndim == 2 else "sequence"
        if planned != cut and taken[UPDATE].shape[0] > 1:
            raise ValueError(
                f"the batch was planned with cut={planned!r}, but this model cuts by {cut!r}: PlanningCollate(..., "
                f"cut={cut!r})"
            )
        return cls(taken[UPDATE], taken[GATHER], taken[POSITIONS].reshape([-1]), taken[MASK], taken[ORDER])

    def hold_shape(self, ids: Any) -> None:
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

    def own(self, group: Any, row_shape: Sequence[int], num_features: int) -> VisualPlan:
        """The plan of this rank's hidden states."""
        update, gather = (own_row(rows, group) for rows in (self.update, self.gather))
        return VisualPlan.from_indices(update, gather, row_shape, num_features)

    def joined(self, image: Any, video: Any) -> Any:
        """[N_img, H] and [N_vid, H] in reading order, [N, H]."""
        from paddle_vl_sp import ops

        check_feature_count(self.order.shape[0], image.shape[0] + video.shape[0])
        return ops.joint_rows(image, video, self.order.to(image.place))

    def check(self, fresh: VisualPlan, ids: Any, wanted: tuple[int, ...]) -> None:
        """Holds places and order against those made from the ids that the model sees."""
        if self.order is not None and len(wanted) == 2:
            order, _ = order_on_host(ids.numpy(), wanted)
            if not np.array_equal(self.order.numpy(), order):
                raise ValueError(
                    f"{ORDER} of the batch is not that of its ids: give PlanningCollate (image_token_id, "
                    f"video_token_id), here {wanted}, in this order"
                )
        if not np.array_equal(self.positions.numpy(), fresh.update_indices.numpy()):
            raise ValueError(
                f"{POSITIONS} of the batch are not those of its ids: got {_told(self.positions)}, expected "
                f"{_told(fresh.update_indices)}; plan in the last collate function, with the ids that the model sees"
            )


def own_row(rows: Any, group: Any) -> Any:
    """[ranks, n] -> [n] of this rank."""
    if rows.shape[0] != group.nranks:
        raise ValueError(
            f"the batch was planned for sp_size {rows.shape[0]}, the tensor-parallel group has {group.nranks} ranks: "
            "give PlanningCollate the degree that the model runs with"
        )
    return rows[group.rank]


def _stacked(arrays: list[npt.NDArray[np.int64]]) -> npt.NDArray[np.int64]:
    """Arrays of different lengths as rows, -1 where they end: [1 2] [3]  ->  [[1 2] [3 -1]]."""
    table = np.full((len(arrays), max(map(len, arrays))), -1, dtype=np.int64)
    for row, array in zip(table, arrays, strict=True):
        row[: array.size] = array
    return table


def _check_grids(batch: Mapping[str, Any], ids: npt.NDArray[Any], wanted: Sequence[int], merge_size: int) -> None:
    """Holds the feature rows that the grids announce against the placeholders."""
    for kind, wanted_id in zip(("image", "video"), wanted, strict=True):
        grid = batch.get(f"{kind}_grid_thw")
        rows = 0 if grid is None else int(np.asarray(grid).reshape(-1, 3).prod(axis=1).sum()) // merge_size**2
        check_feature_count(int((ids == wanted_id).sum()), rows, kind)


def _told(positions: Any) -> str:
    return f"{positions.shape[0]} positions {positions[:4].tolist()}..."
