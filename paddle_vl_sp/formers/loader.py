"""A data loader that plans: it knows the ids on the host, so that the model need not ask a device."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from paddle_vl_sp.carried import plans_of_all_ranks
from paddle_vl_sp.plan import check_feature_count


@dataclass(frozen=True)
class PlanningCollate:
    """A collate function that adds the plans of all ranks to what another one returns.

    collate          returns a mapping with "input_ids" [B, S] (numpy or Paddle), padded as the model will see it
    placeholder_ids  (image_token_id, video_token_id)
    sp_size          the tensor-parallel degree where sequence_parallel is on, else 1
    sequence_parallel  whether it is on; needed only where it is on with a degree of 1
    cut              "sequence" for PaddleFleet's model, [S / sp_size, B, H]; "flattened" for the plain one
    merge_size       the tower's spatial_merge_size; where given, the grids are compared with the ids, in the loader

    >>> collate = PlanningCollate(lambda ids: {"input_ids": np.array(ids)}, (500, 501), sp_size=2)
    >>> collate([[1, 500, 500, 1]])["visual_update_indices"].tolist()  # a row for each rank
    [[1], [0]]
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


def _check_grids(batch: Mapping[str, Any], ids: npt.NDArray[Any], wanted: Sequence[int], merge_size: int) -> None:
    """Compares the feature rows that the grids announce with the placeholders."""
    for kind, wanted_id in zip(("image", "video"), wanted, strict=True):
        grid = batch.get(f"{kind}_grid_thw")
        rows = 0 if grid is None else int(np.asarray(grid).reshape(-1, 3).prod(axis=1).sum()) // merge_size**2
        check_feature_count(int((ids == wanted_id).sum()), rows, kind)
