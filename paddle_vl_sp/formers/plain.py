"""The plain classes, dense and MoE: visual rows planned once in the model's forward, used in every deepstack layer."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import paddle

from paddle_vl_sp.comm import complete_grad
from paddle_vl_sp.formers import shared_tower
from paddle_vl_sp.formers.deepstack import Rows, adds_by_plan, tensor_parallel_group
from paddle_vl_sp.formers.loader import LoadedPlans
from paddle_vl_sp.joint import joint_features
from paddle_vl_sp.layout import SeqLayout
from paddle_vl_sp.ops import checking
from paddle_vl_sp.plan import VisualPlan, plan_visual
from paddle_vl_sp.rows import replace_rows
from paddle_vl_sp.run_report import note_forward

HANDED = "_paddle_vl_sp_visual"
KINDS = {  # kind: (its pixels, its grid, the method that encodes it)
    "image": ("pixel_values", "image_grid_thw", "get_image_features"),
    "video": ("pixel_values_videos", "video_grid_thw", "get_video_features"),
}


@dataclass(frozen=True, eq=False)
class Visual:
    """What the model's forward hands to the text model's, past whatever stands between the two."""

    mask: Any  # bool [B, S]
    plan: VisualPlan | None  # of the uncut sequence; None: to be made from the mask
    levels: list[Any]  # L times [N, H], in reading order of all kinds
    loaded: LoadedPlans | None = None


def model_forward(original: Callable[..., Any]) -> Callable[..., Any]:
    """Inserts the features by one plan and lets the original do the rest, which then sees no pixels."""
    signature = inspect.signature(original)

    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        loaded = LoadedPlans.taken_from(kwargs, "flattened")
        call = signature.bind(self, *args, **kwargs)
        given = call.arguments
        kinds = [kind for kind, (pixels, _, _) in KINDS.items() if given.get(pixels) is not None]
        if given.get("input_ids") is None or not kinds:
            return original(self, *args, **kwargs)
        if has_own_mask(self):
            shared_tower.refuse_own_mask(self)
            return original(self, *args, **kwargs)
        embeds = given.get("inputs_embeds")
        if embeds is None:
            embeds = self.get_input_embeddings()(given["input_ids"])
        features = {kind: _encoded(self, kind, given) for kind in kinds}
        given["inputs_embeds"], visual = _inserted(embeds, features, given["input_ids"], self.config, loaded)
        for kind in kinds:
            given[KINDS[kind][0]] = None
        with _handed(self.language_model, visual):
            return original(*call.args, **call.kwargs)

    return forward


def has_own_mask(model: Any) -> bool:
    """Whether a subclass says itself where the features go: then PaddleFormers' forward must ask it."""
    return bool(type(model).get_placeholder_mask.__module__.partition(".")[0] != "paddleformers")


@contextmanager
def _handed(text_model: Any, visual: Visual) -> Iterator[None]:
    """Lays it beside the text model: a keyword would not pass a subclass or a wrapper that hands on what it knows."""
    text_model.__dict__[HANDED] = visual
    try:
        yield
        if HANDED in text_model.__dict__ and visual.levels:
            raise ValueError(
                f"the forward of {type(text_model).__name__} did not reach PaddleFormers' own, which adds the "
                "deepstack features: call super().forward, or leave paddle_vl_sp out (PADDLE_VL_SP=0)"
            )
    finally:
        text_model.__dict__.pop(HANDED, None)


def text_forward(original: Callable[..., Any]) -> Callable[..., Any]:
    """Puts the plan of this rank's rows where the original carries its mask, with levels whose gradients are whole."""
    signature = inspect.signature(original)

    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        call = signature.bind(self, *args, **kwargs)
        given = call.arguments
        visual = self.__dict__.pop(HANDED, None) or _handed_over(given)
        if visual is None or not visual.levels:
            return original(*call.args, **call.kwargs)
        embeds = given.get("inputs_embeds")
        like = visual.levels[0] if embeds is None else embeds
        plan, levels = _of_this_rank(visual, self.config.sequence_parallel, like)
        given["visual_pos_masks"] = Rows(plan, visual.mask) if adds_by_plan(self) else visual.mask
        given["deepstack_visual_embeds"] = levels
        return original(*call.args, **call.kwargs)

    return forward


def _encoded(model: Any, kind: str, given: dict[str, Any]) -> list[Any]:
    """[main, *levels] of one kind, each [N_kind, H]."""
    pixels, grid, method = KINDS[kind]

    def encode(pixels: Any, grid: Any) -> tuple[Any, list[Any]]:
        per_item, levels = getattr(model, method)(pixels, grid)
        return paddle.concat(list(per_item)), levels

    main, levels = shared_tower.encoded(model, encode, given[pixels], given.get(grid))
    return [main, *levels]


def _inserted(
    embeds: Any, features: dict[str, list[Any]], ids: Any, config: Any, loaded: LoadedPlans | None
) -> tuple[Any, Visual]:
    """The embeddings [B, S, H] with the main features in their places, and what the deepstack layers need."""
    wanted = {kind: getattr(config, f"{kind}_token_id") for kind in features}
    mask = functools.reduce(lambda a, b: a | b, (ids == wanted_id for wanted_id in wanted.values()))
    num_features = sum(rows[0].shape[0] for rows in features.values())
    if loaded:
        loaded.hold_shape(ids)
    plan = loaded.whole(ids.shape, num_features) if loaded else None
    if plan is None or checking():
        fresh = plan_visual(mask, None, SeqLayout(ids.shape[1]), sequence_first=False, num_features=num_features)
        if loaded:
            loaded.check(fresh, ids, tuple(wanted.values()))
        plan = plan or fresh
    plan = plan.to(embeds.place)
    main, *levels = _joined(features, ids, tuple(wanted.values()), loaded)
    return replace_rows(embeds, main, plan), Visual(mask, plan, levels, loaded)


def _joined(features: dict[str, list[Any]], ids: Any, wanted: tuple[int, ...], loaded: LoadedPlans | None) -> list[Any]:
    """[main, *levels] with the rows of all kinds in reading order."""
    if len(features) == 1:
        return next(iter(features.values()))
    image, video = features["image"], features["video"]
    if loaded is not None and loaded.order is not None:
        return [loaded.joined(i, v) for i, v in zip(image, video, strict=True)]
    joined: list[Any] = joint_features(image, video, ids, wanted)
    return joined


def _handed_over(given: dict[str, Any]) -> Visual | None:
    """Mask and levels that somebody else hands to the text model."""
    mask, levels = given.get("visual_pos_masks"), given.get("deepstack_visual_embeds")
    if mask is None or not levels or mask.ndim != 2 or mask.dtype != paddle.bool:
        return None
    return Visual(mask, None, list(levels))


def _of_this_rank(visual: Visual, sequence_parallel: bool, hidden: Any) -> tuple[VisualPlan, list[Any]]:
    """The plan of the text model's hidden states; under sequence parallelism, a cut of the flattened batch [B * S]."""
    batch, seq_len = visual.mask.shape
    num_features, num_levels = visual.levels[0].shape[0], len(visual.levels)
    syncs = 0 if visual.loaded else 1
    if not sequence_parallel:
        plan = visual.plan or plan_visual(
            visual.mask, None, SeqLayout(seq_len), sequence_first=False, num_features=num_features
        )
        note_forward(plan, hidden, batch=batch, num_levels=num_levels, syncs=syncs, is_plain=True)
        return plan, visual.levels
    group = tensor_parallel_group()
    layout = SeqLayout(batch * seq_len, sp_size=group.nranks, sp_rank=group.rank)
    if visual.loaded:
        plan = visual.loaded.own(group, (1, layout.local_len), num_features).to(visual.mask.place)
    else:
        flat = visual.mask.reshape([1, -1])
        plan = plan_visual(flat, None, layout, sequence_first=False, num_features=num_features)
    if visual.plan and not visual.loaded:
        syncs += 1  # for the plan of the uncut sequence
    note_forward(plan, hidden, batch=batch, num_levels=num_levels, group=group, syncs=syncs, is_plain=True)
    return plan, complete_grad(visual.levels, plan, group)
