"""Visual features into the embeddings of the uncut sequence by one plan: what the plain families have in common."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import paddle
from paddle import Tensor
from paddle.nn import Layer

from paddle_vl_sp.backends.dispatch import joint_rows
from paddle_vl_sp.backends.plain import is_any_of
from paddle_vl_sp.carried import LoadedPlans
from paddle_vl_sp.formers import balanced_tower, shared_tower
from paddle_vl_sp.formers.own_part import OwnPart
from paddle_vl_sp.interleave import joint_features, order_on_host
from paddle_vl_sp.layout import SeqLayout
from paddle_vl_sp.plan import VisualPlan, check_feature_count, plan_visual
from paddle_vl_sp.report import note_forward
from paddle_vl_sp.rows import replace_rows
from paddle_vl_sp.verify import check_order, check_positions, check_result, checking

if TYPE_CHECKING:
    from paddle_vl_sp.plan import Array

KINDS = {  # kind: (its pixels, its grid, the method that encodes it)
    "image": ("pixel_values", "image_grid_thw", "get_image_features"),
    "video": ("pixel_values_videos", "video_grid_thw", "get_video_features"),
}
LOADER_ADVICE = "plan in the last collate function, with the ids that the model sees"


@dataclass(frozen=True, eq=False)
class Merged:
    """The embeddings with the main features in their places, and what was found out on the way."""

    embeds: Tensor  # [B, S, H]
    levels: list[Tensor]  # [N, H] each, or [n, H] of this rank's rows
    mask: Tensor  # bool [B, S]
    plan: VisualPlan  # of the uncut sequence
    syncs: int  # host synchronisations that it took


def merging_forward(original: Callable[..., Any]) -> Callable[..., Any]:
    """Inserts the features by one plan and lets the original do the rest, which then sees no pixels.

    For models whose features all enter at the embedding, before the sequence is cut: the cut's own backward makes their
    gradients whole.
    """
    signature = inspect.signature(original)

    @functools.wraps(original)
    def forward(self: Layer, *args: Any, **kwargs: Any) -> Any:
        loaded = LoadedPlans.pop_from(kwargs)
        call = signature.bind(self, *args, **kwargs)
        kinds = kinds_to_merge(self, call.arguments)
        if not kinds:
            return original(*call.args, **call.kwargs)
        merged = merge(self, call.arguments, kinds, loaded)
        note_forward(merged.plan, num_levels=0, group=None, syncs=merged.syncs)
        hide_pixels(call.arguments, kinds, merged.embeds)
        return original(*call.args, **call.kwargs)

    return forward


def kinds_to_merge(model: Layer, given: dict[str, Any]) -> list[str]:
    """The kinds that the arguments of a forward have pixels of; none where the original must merge.

    Images, without pixels, where there are none, and the rank must meet others for their images.
    """
    kinds = [kind for kind, (pixels, _, _) in KINDS.items() if given.get(pixels) is not None]
    meets_others = balanced_tower.takes_part(model, given)
    if given.get("input_ids") is None or not (kinds or meets_others):
        return []
    if shared_tower.has_own_mask(model):
        shared_tower.refuse_own_mask(model)
        return []
    return kinds or ["image"]


def kind_ids(model: Layer, kinds: list[str]) -> dict[str, int]:
    """kind -> the id of its placeholders"""
    return {kind: getattr(model.config, f"{kind}_token_id") for kind in kinds}


def merge(
    model: Layer,
    given: dict[str, Any],
    kinds: list[str],
    loaded: LoadedPlans | None,
    is_counted_later: bool = False,
    own: OwnPart | None = None,
) -> Merged:
    """Encodes and inserts the features of these kinds.

    is_counted_later  somebody else compares the features with the placeholders, so that this plan need not synchronise
    own               this rank's part, where the tower is shared: the levels are of its rows alone
    """
    ids, embeds = given["input_ids"], given.get("inputs_embeds")
    if embeds is None:
        embeds = model.get_input_embeddings()(ids)
    features = features_of(model, kinds, given, own.plans if own else None)
    wanted = tuple(kind_ids(model, kinds).values())
    mask = is_any_of(ids, wanted)
    num_features = sum(rows[0].shape[0] for rows in features.values())
    padded = is_counted_later and any(len(rows) > 1 for rows in features.values())
    if loaded:
        loaded.check_shape(ids)
        plan, syncs = loaded.whole(ids.shape, num_features), 0
        if checking():
            _check_loaded(loaded, mask, ids, wanted)
    else:
        layout = SeqLayout(mask.shape[1])
        plan = plan_visual(mask, None, layout, sequence_first=False, num_features=num_features, padded=padded)
        syncs = int(not padded)
    plan = plan.to(embeds.place)
    main, levels = _joined_apart(features, ids, wanted, loaded, own)
    if not num_features:  # nothing to insert, but a tower that other ranks used stays in the graph
        main, levels = paddle.concat([main, *levels]), []
    merged = replace_rows(embeds, main, plan)
    if checking():
        _check_merge(
            merged, embeds, {kind_id: rows[0] for kind_id, rows in zip(wanted, features.values(), strict=True)}, ids
        )
    return Merged(merged, levels, mask, plan, syncs)


def hide_pixels(given: dict[str, Any], kinds: list[str], embeds: Tensor) -> None:
    """The arguments of the original, which has nothing left to merge."""
    given["inputs_embeds"] = embeds
    for kind in kinds:
        given[KINDS[kind][0]] = None


def features_of(
    model: Layer, kinds: list[str], given: dict[str, Any], plans: Mapping[str, VisualPlan] | None = None
) -> dict[str, list[Tensor]]:
    """[main, *levels] of each kind; with this rank's plan of each, for a shared tower, only the rows that it uses.

    Under sequence parallelism this is so for the levels alone.
    """
    if balanced_tower.takes_part(model, given):
        return _balanced(model, kinds, given)
    return {kind: _encoded(model, kind, given, plans[kind] if plans else None) for kind in kinds}


def _balanced(model: Layer, kinds: list[str], given: dict[str, Any]) -> dict[str, list[Tensor]]:
    """All kinds in one call, since all ranks make equally many."""
    named = [(given.get(pixels), given.get(grid)) for pixels, grid, _ in (KINDS[kind] for kind in kinds)]
    brought = [(pixels, grid) for pixels, grid in named if pixels is not None]

    def encode(pixels: Tensor, grid: Tensor) -> shared_tower.Encoded:
        return shared_tower.encoded(model, lambda *own: encoded_rows(model.get_image_features(*own)), pixels, grid)

    rows = balanced_tower.balanced_rows(model, encode, brought, given["input_ids"].place)
    return dict(zip(kinds, rows, strict=True))


def _encoded(model: Layer, kind: str, given: dict[str, Any], plan: VisualPlan | None) -> list[Tensor]:
    """[main, *levels] of one kind, each [N_kind, H], or of this rank's rows [n_kind, H]."""
    pixels, grid, method = KINDS[kind]

    def encode(pixels: Tensor, grid: Tensor) -> shared_tower.Encoded:
        return encoded_rows(getattr(model, method)(pixels, grid))

    encoded = shared_tower.encoded(model, encode, given[pixels], given.get(grid), plan)
    return [encoded] if isinstance(encoded, Tensor) else [encoded[0], *encoded[1]]


def encoded_rows(found: Any) -> shared_tower.Encoded:
    """Of what a model's method returns: rows per item, or those and levels, maybe in an output; None: no levels."""
    found = getattr(found, "pooler_output", found)
    if isinstance(found, tuple) and len(found) == 2 and (found[1] is None or isinstance(found[1], (list, tuple))):
        return _rows(found[0]), list(found[1] or [])
    return _rows(found)


def _rows(per_item: Any) -> Tensor:
    return per_item if isinstance(per_item, Tensor) else paddle.concat(list(per_item))


def _check_merge(merged: Tensor, embeds: Tensor, features: dict[int, Tensor], ids: Tensor) -> None:
    """Against the slow, obvious way: each kind's features written where its placeholders are."""
    with paddle.no_grad():
        wanted = embeds.clone()
        for kind_id, rows in features.items():
            wanted[ids == kind_id] = rows.astype(wanted.dtype)
    check_result("the merge", merged, wanted, "report it")


def _check_loaded(loaded: LoadedPlans, mask: Tensor, ids: Tensor, wanted: tuple[int, ...]) -> None:
    if loaded.order is not None and len(wanted) == 2:
        advice = f"give PlanningCollate (image_token_id, video_token_id), here {wanted}, in this order"
        check_order(loaded.order, order_on_host(ids.numpy(), wanted)[0], advice)
    check_positions(loaded.positions, np.flatnonzero(mask.numpy()), LOADER_ADVICE)


def _joined_apart(
    features: dict[str, list[Tensor]],
    ids: Tensor,
    wanted: tuple[int, ...],
    loaded: LoadedPlans | None,
    own: OwnPart | None,
) -> tuple[Tensor, list[Tensor]]:
    """main [N, H] and levels, of the batch or of this rank's part."""
    if own is None:
        main, *levels = joined(features, ids, wanted, loaded)
        return main, levels
    (main,) = joined({kind: rows[:1] for kind, rows in features.items()}, ids, wanted, loaded)
    of_levels = {kind: rows[1:] for kind, rows in features.items()}
    return main, joined(of_levels, own.ids, wanted, None) if all(of_levels.values()) else []


def joined(
    features: dict[str, list[Tensor]], ids: Array, wanted: tuple[int, ...], loaded: LoadedPlans | None
) -> list[Tensor]:
    """[main, *levels] with the rows of all kinds in reading order of the ids that they belong to."""
    if len(features) == 1:
        return next(iter(features.values()))
    image, video = features["image"], features["video"]
    if loaded is None or loaded.order is None:
        joined: list[Tensor] = joint_features(image, video, ids, wanted)
        return joined
    check_feature_count(loaded.order.shape[0], image[0].shape[0] + video[0].shape[0])
    order = loaded.order.to(image[0].place)
    return [joint_rows(i, v, order) for i, v in zip(image, video, strict=True)]
