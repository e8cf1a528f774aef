"""What a batch brings to the embedding: visual features by kind, and perhaps a plan made by the data loader."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import paddle

from paddle_vl_sp.joint import joint_features
from paddle_vl_sp.layout import SeqLayout
from paddle_vl_sp.ops import joint_rows, on_place
from paddle_vl_sp.plan import VisualPlan, check_feature_count, plan_visual
from paddle_vl_sp.reference import is_any_of

KINDS = ("image", "video")
FEATURES = ("image_embeds", "video_embeds", "deepstack_image_embeds", "deepstack_video_embeds")
UPDATE, GATHER, ORDER = "visual_update_indices", "visual_gather_indices", "visual_feature_order"
MASK, LEVELS = "visual_pos_masks", "deepstack_visual_emb"


@dataclass(frozen=True)
class VisualInputs:
    """The kinds a batch has features for: their placeholder ids, and per kind [main, level 0, level 1, ...]."""

    ids: Any  # [B, S]
    placeholder_ids: dict[str, int]
    features: dict[str, list[Any]]  # each [N_kind, H]
    order: Any  # [N] into [image; video] where the data loader made it, else None

    @property
    def num_features(self) -> int:
        return sum(int(rows[0].shape[0]) for rows in self.features.values())

    @property
    def num_levels(self) -> int:
        return max(len(rows) - 1 for rows in self.features.values())

    def mask(self) -> Any:
        """Where the visual tokens are: bool [B, S]."""
        return is_any_of(self.ids, self._wanted())

    def joined(self) -> list[Any]:
        """[main, *levels] with the rows of all kinds in reading order, each [N, H]."""
        self._check_levels()
        if len(self.features) == 1:
            return next(iter(self.features.values()))
        image, video = ([self._own_rows(kind, rows) for rows in self.features[kind]] for kind in KINDS)
        if self.order is None:
            joined: list[Any] = joint_features(image, video, self.ids, self._wanted())
            return joined
        check_feature_count(int(self.order.shape[0]), self.num_features)
        order = on_place(self.order, image[0].place)
        return [joint_rows(*levels, order) for levels in zip(image, video, strict=True)]

    def plan(self, layout: SeqLayout, sequence_first: bool) -> VisualPlan:
        return plan_visual(
            self.ids, self._wanted(), layout, sequence_first=sequence_first, num_features=self.num_features
        )

    def _wanted(self) -> tuple[int, ...]:
        return tuple(self.placeholder_ids.values())

    def _own_rows(self, kind: str, rows: Any) -> Any:
        """The kind's own rows of a level that has rows for all kinds, as PaddleFleet's joint merge takes them."""
        if rows.shape[0] == self.features[kind][0].shape[0]:
            return rows
        visual = paddle.masked_select(self.ids, self.mask())  # [N]
        return paddle.gather(rows, paddle.nonzero(visual == self.placeholder_ids[kind]).flatten())

    def _check_levels(self) -> None:
        num_levels = {kind: len(rows) - 1 for kind, rows in self.features.items()}
        if len(set(num_levels.values())) > 1:
            raise ValueError(
                f"image and video have different numbers of deepstack levels, {num_levels}: every level needs "
                "both kinds"
            )
        for kind, (main, *levels) in self.features.items():
            for i, level in enumerate(levels):
                if level.shape[0] not in (main.shape[0], self.num_features):
                    raise ValueError(
                        f"deepstack level {i} of {kind} has {level.shape[0]} rows, but {kind}_embeds has "
                        f"{main.shape[0]}: every level needs one row for each {kind} token"
                    )


def visual_inputs(dict_args: dict[str, Any], config: Any) -> VisualInputs | None:
    """The visual part of a batch, None where it has none."""
    ids = dict_args.get("input_ids")
    given = [kind for kind in KINDS if dict_args.get(f"{kind}_embeds") is not None]
    if ids is None or not given:
        return None
    features = {
        kind: [dict_args[f"{kind}_embeds"], *(dict_args.get(f"deepstack_{kind}_embeds") or [])] for kind in given
    }
    wanted = {kind: getattr(config, f"{kind}_token_id") for kind in given}
    return VisualInputs(ids, wanted, features, dict_args.get(ORDER))


def loaded_plan(
    dict_args: dict[str, Any], layout: SeqLayout, batch: int, sequence_first: bool, num_features: int
) -> VisualPlan | None:
    """The plan that the data loader put into the batch, held against what is known without reading a device.

    Its arrays are [n] of this rank, or [ranks, n] with a row for every rank; -1 at the end of a row is skipped.
    """
    update, gather = dict_args.get(UPDATE), dict_args.get(GATHER)
    if update is None and gather is None:
        return None
    if update is None or gather is None:
        missing = UPDATE if update is None else GATHER
        raise ValueError(f"the batch has one of the two index arrays but no {missing}: a plan is both or none")
    row_shape = (layout.local_len, batch) if sequence_first else (batch, layout.local_len)
    update, gather = (_own_row(rows, layout) for rows in (update, gather))
    plan = VisualPlan.from_indices(update, gather, row_shape, num_features)
    _check_size(plan, is_whole=layout.local_len == layout.seq_len)
    return plan


def _own_row(rows: Any, layout: SeqLayout) -> Any:
    if len(rows.shape) != 2 or rows.shape[0] != layout.sp_size:
        return rows
    return rows[layout.sp_rank]


def _check_size(plan: VisualPlan, is_whole: bool) -> None:
    kinds = {str(x.dtype).removeprefix("paddle.") for x in (plan.update_indices, plan.gather_indices)}
    if kinds != {"int64"}:
        raise ValueError(f"{UPDATE} and {GATHER} must be int64, got {sorted(kinds)}")
    n, most = int(plan.update_indices.shape[0]), min(plan.num_features, plan.num_rows)
    if n > most or (is_whole and n != plan.num_features):
        raise ValueError(
            f"the batch's plan has {n} visual rows for this rank, but there are {plan.num_features} feature rows and "
            f"{plan.num_rows} rows of hidden states: plan with the ids, the layout and the rank of this batch"
        )


def indices_to_carry(plan: VisualPlan, num_stages: int) -> dict[str, Any]:
    """The index arrays for the model's dict: [n], or -1 up to [B * S_local] where pipeline stages have to be crossed.

    Between stages, shapes are agreed upon once; n changes from batch to batch, the number of rows does not.
    """
    arrays = {UPDATE: plan.update_indices, GATHER: plan.gather_indices}
    if num_stages == 1:
        return arrays
    return {key: _filled_up(array, plan.num_rows) for key, array in arrays.items()}


def _filled_up(indices: Any, length: int) -> Any:
    """[4 7]  ->  [4 7 -1 -1 ...]"""
    return paddle.concat([indices, paddle.full([length - indices.shape[0]], -1, "int64").to(indices.place)])
