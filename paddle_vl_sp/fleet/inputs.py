"""What a batch brings to the embedding: visual features by kind."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import paddle
from paddle import Tensor

from paddle_vl_sp.backends.copies import on_place
from paddle_vl_sp.backends.dispatch import joint_rows
from paddle_vl_sp.backends.plain import is_any_of
from paddle_vl_sp.carried import ORDER
from paddle_vl_sp.interleave import joint_features, order_on_host
from paddle_vl_sp.layout import SeqLayout
from paddle_vl_sp.plan import VisualPlan, check_feature_count, plan_visual

KINDS = ("image", "video")
FEATURES = ("image_embeds", "video_embeds", "deepstack_image_embeds", "deepstack_video_embeds")


@dataclass(frozen=True)
class VisualInputs:
    """The kinds a batch has features for: their placeholder ids, and per kind [main, level 0, level 1, ...]."""

    ids: Tensor  # [B, S]
    placeholder_ids: dict[str, int]
    features: dict[str, list[Tensor]]  # each [N_kind, H]
    order: Tensor | None  # [N] into [image; video] where the data loader made it, else None

    @property
    def num_features(self) -> int:
        return sum(int(rows[0].shape[0]) for rows in self.features.values())

    @property
    def num_levels(self) -> int:
        return max(len(rows) - 1 for rows in self.features.values())

    def mask(self) -> Tensor:
        """Where the visual tokens are: bool [B, S]."""
        return is_any_of(self.ids, self._wanted())

    def joined(self) -> list[Tensor]:
        """[main, *levels] with the rows of all kinds in reading order, each [N, H]."""
        self._check_levels()
        if len(self.features) == 1:
            return next(iter(self.features.values()))
        image, video = ([self._own_rows(kind, rows) for rows in self.features[kind]] for kind in KINDS)
        if self.order is None:
            joined: list[Tensor] = joint_features(image, video, self.ids, self._wanted())
            return joined
        check_feature_count(int(self.order.shape[0]), self.num_features)
        order = on_place(self.order, image[0].place)
        return [joint_rows(*levels, order) for levels in zip(image, video, strict=True)]

    def order_of_ids(self) -> Any:
        """The order that a data loader makes of these ids."""
        return order_on_host(self.ids.numpy(), self._wanted())[0]

    def plan(self, layout: SeqLayout, sequence_first: bool) -> VisualPlan:
        return plan_visual(
            self.ids, self._wanted(), layout, sequence_first=sequence_first, num_features=self.num_features
        )

    def _wanted(self) -> tuple[int, ...]:
        return tuple(self.placeholder_ids.values())

    def _own_rows(self, kind: str, rows: Tensor) -> Tensor:
        """The kind's own rows of a level that has rows for all kinds, which PaddleFleet's joint merge accepts."""
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
