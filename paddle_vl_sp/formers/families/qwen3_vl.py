"""The plain Qwen3-VL, dense and MoE: visual rows are planned once in the model's forward, and used in every layer."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import paddle
from paddle import Tensor
from paddle.nn import Layer

from paddle_vl_sp.backends.dispatch import joint_rows
from paddle_vl_sp.backends.plain import is_any_of
from paddle_vl_sp.carried import Handover, LoadedPlans, OfMask
from paddle_vl_sp.comm.collectives import Group
from paddle_vl_sp.comm.grads import complete_grad
from paddle_vl_sp.formers import shared_tower
from paddle_vl_sp.formers.deepstack import OWN_ROWS, OwnRows, deepstack
from paddle_vl_sp.formers.groups import require_tensor_parallel_group
from paddle_vl_sp.formers.known import MODELS, Called, Family, Replaced
from paddle_vl_sp.formers.model_view import ModelView
from paddle_vl_sp.formers.norms import text_init
from paddle_vl_sp.interleave import joint_features, order_on_host
from paddle_vl_sp.layout import SeqLayout
from paddle_vl_sp.plan import VisualPlan, check_feature_count, plan_visual
from paddle_vl_sp.report import note_forward
from paddle_vl_sp.rows import replace_rows
from paddle_vl_sp.verify import check_loaded, check_order, check_positions, checking

KINDS = {  # kind: (its pixels, its grid, the method that encodes it)
    "image": ("pixel_values", "image_grid_thw", "get_image_features"),
    "video": ("pixel_values_videos", "video_grid_thw", "get_video_features"),
}
LOADER_ADVICE = "plan in the last collate function, with the ids that the model sees"


@dataclass(frozen=True, eq=False)
class Visual(OfMask):
    """What the model's forward knows of the mask that it hands to the text model."""

    plan: VisualPlan  # of the uncut sequence
    loaded: LoadedPlans | None
    syncs: int  # host synchronisations so far
    reached: list[bool] = field(default_factory=list)  # by PaddleFormers' text model, which completes the levels


VISUAL: Handover[Visual] = Handover("visual")


def model_forward(original: Callable[..., Any]) -> Callable[..., Any]:
    """Inserts the features by one plan and lets the original do the rest, which then sees no pixels."""
    signature = inspect.signature(original)

    @functools.wraps(original)
    def forward(self: Layer, *args: Any, **kwargs: Any) -> Any:
        loaded = LoadedPlans.pop_from(kwargs, "flattened")
        call = signature.bind(self, *args, **kwargs)
        given = call.arguments
        kinds = [kind for kind, (pixels, _, _) in KINDS.items() if given.get(pixels) is not None]
        if given.get("input_ids") is None or not kinds:
            return original(self, *args, **kwargs)
        if shared_tower.has_own_mask(self):
            shared_tower.refuse_own_mask(self)
            return original(self, *args, **kwargs)
        embeds = given.get("inputs_embeds")
        if embeds is None:
            embeds = self.get_input_embeddings()(given["input_ids"])
        features = {kind: _encoded(self, kind, given) for kind in kinds}
        given["inputs_embeds"], visual, levels = _inserted(self, embeds, features, given["input_ids"], loaded)
        for kind in kinds:
            given[KINDS[kind][0]] = None
        call.arguments[next(iter(signature.parameters))] = _with_levels(self, visual.mask, levels)
        with VISUAL.given(visual):
            out = original(*call.args, **call.kwargs)
        if levels and not visual.reached and _is_cut(self):
            raise ValueError(
                f"the forward of {type(self.language_model).__name__} did not reach PaddleFormers' own text model, "
                "where the gradients of the deepstack levels are completed under sequence parallelism: call "
                "super().forward, or leave paddle_vl_sp out (PADDLE_VL_SP=0)"
            )
        return out

    return forward


def text_forward(original: Callable[..., Any]) -> Callable[..., Any]:
    """Plans this rank's rows where a mask came, with levels whose gradients are whole."""
    signature = inspect.signature(original)

    @functools.wraps(original)
    def forward(self: Layer, *args: Any, **kwargs: Any) -> Any:
        call = signature.bind(self, *args, **kwargs)
        given = call.arguments
        mask, levels = given.get("visual_pos_masks"), given.get("deepstack_visual_embeds")
        if mask is None or levels is None or not len(levels) or mask.ndim != 2 or mask.dtype != paddle.bool:
            return original(*call.args, **call.kwargs)
        plan, levels = _of_this_rank(mask, list(levels), self.config.sequence_parallel)
        given["deepstack_visual_embeds"] = levels
        with OWN_ROWS.given(OwnRows(mask, plan)):
            return original(*call.args, **call.kwargs)

    return forward


def _with_levels(model: Layer, mask: Tensor, levels: list[Tensor]) -> Any:
    """The model, whose text model gets mask and levels as PaddleFormers' forward would hand them over."""
    given = {"visual_pos_masks": mask, "deepstack_visual_embeds": levels}
    return ModelView(model, lambda args, kwargs: (args, {**kwargs, **given}))


def _encoded(model: Layer, kind: str, given: dict[str, Any]) -> list[Tensor]:
    """[main, *levels] of one kind, each [N_kind, H]."""
    pixels, grid, method = KINDS[kind]

    def encode(pixels: Tensor, grid: Tensor) -> tuple[Tensor, list[Tensor]]:
        per_item, levels = getattr(model, method)(pixels, grid)
        return paddle.concat(list(per_item)), [] if levels is None else levels  # None: deepstack is off

    main, levels = shared_tower.encoded(model, encode, given[pixels], given.get(grid))
    return [main, *levels]


def _inserted(
    model: Layer, embeds: Tensor, features: dict[str, list[Tensor]], ids: Tensor, loaded: LoadedPlans | None
) -> tuple[Tensor, Visual, list[Tensor]]:
    """The embeddings [B, S, H] with the main features in their places, what was planned, and the levels [N, H]."""
    wanted = {kind: getattr(model.config, f"{kind}_token_id") for kind in features}
    mask = is_any_of(ids, tuple(wanted.values()))
    num_features = sum(rows[0].shape[0] for rows in features.values())
    if loaded:
        loaded.check_shape(ids)
        plan, syncs = loaded.whole(ids.shape, num_features), 0
    else:
        # the text model plans for its own cut and compares the counts: this plan need not synchronise
        padded = _is_cut(model) and any(len(rows) > 1 for rows in features.values())
        plan, syncs = _plan_whole(mask, num_features, padded), int(not padded)
    if loaded and checking():
        _check_loaded(loaded, mask, ids, tuple(wanted.values()))
    plan = plan.to(embeds.place)
    main, *levels = _joined(features, ids, tuple(wanted.values()), loaded)
    return replace_rows(embeds, main, plan), Visual(mask, plan, loaded, syncs), levels


def _plan_whole(mask: Tensor, num_features: int, padded: bool) -> VisualPlan:
    layout = SeqLayout(mask.shape[1])
    return plan_visual(mask, None, layout, sequence_first=False, num_features=num_features, padded=padded)


def _is_cut(model: Layer) -> bool:
    return bool(getattr(shared_tower.text_config(model), "sequence_parallel", False))


def _check_loaded(loaded: LoadedPlans, mask: Tensor, ids: Tensor, wanted: tuple[int, ...]) -> None:
    if loaded.order is not None and len(wanted) == 2:
        advice = f"give PlanningCollate (image_token_id, video_token_id), here {wanted}, in this order"
        check_order(loaded.order, order_on_host(ids.numpy(), wanted)[0], advice)
    tokens = mask.numpy().reshape(1, -1)  # the plain classes cut the flattened batch
    check_positions(loaded.positions, np.flatnonzero(tokens), LOADER_ADVICE)
    layout = SeqLayout(tokens.shape[1], sp_size=loaded.update.shape[0])
    check_loaded(loaded.update, loaded.gather, tokens, layout, False, LOADER_ADVICE)


def _joined(
    features: dict[str, list[Tensor]], ids: Tensor, wanted: tuple[int, ...], loaded: LoadedPlans | None
) -> list[Tensor]:
    """[main, *levels] with the rows of all kinds in reading order."""
    if len(features) == 1:
        return next(iter(features.values()))
    image, video = features["image"], features["video"]
    if loaded is None or loaded.order is None:
        joined: list[Tensor] = joint_features(image, video, ids, wanted)
        return joined
    check_feature_count(loaded.order.shape[0], image[0].shape[0] + video[0].shape[0])
    order = loaded.order.to(image[0].place)
    return [joint_rows(i, v, order) for i, v in zip(image, video, strict=True)]


def _of_this_rank(mask: Tensor, levels: list[Tensor], sequence_parallel: bool) -> tuple[VisualPlan, list[Tensor]]:
    """The plan of the text model's hidden states; under sequence parallelism, a cut of the flattened batch [B * S]."""
    visual = VISUAL.get()
    if visual is not None and visual.is_for(mask):
        visual.reached.append(True)
    else:  # another caller's mask, or a replay in the backward
        visual = None
    group = require_tensor_parallel_group() if sequence_parallel else None
    plan, syncs = _own_plan(mask, levels[0].shape[0], visual, group)
    syncs += visual.syncs if visual else 0
    note_forward(plan, num_levels=len(levels), group=group, syncs=syncs)
    return plan, complete_grad(levels, plan, group)


def _own_plan(mask: Tensor, num_features: int, visual: Visual | None, group: Group | None) -> tuple[VisualPlan, int]:
    """And the host synchronisations that it took."""
    if visual and group is None:
        return visual.plan, 0
    tokens = mask if group is None else mask.reshape([1, -1])
    layout = SeqLayout(tokens.shape[1])
    if group is not None:
        layout = SeqLayout(tokens.shape[1], sp_size=group.nranks, sp_rank=group.rank)
    if visual and visual.loaded:
        return visual.loaded.own(group, (1, layout.local_len), num_features).to(mask.place), 0
    return plan_visual(tokens, None, layout, sequence_first=False, num_features=num_features), 1


def _family(name: str, module: str, model: str, text_model: str, known: dict[str, str]) -> Family:
    return Family(
        name,
        f"{MODELS}.{module}",
        replaced=(
            Replaced(f"{model}.forward", model_forward, (known["model"],)),
            Replaced(f"{text_model}.__init__", text_init, (known["init"],)),
            Replaced(f"{text_model}.forward", text_forward, (known["text"],)),
            Replaced(f"{text_model}._deepstack_process", deepstack, ("5d2f3c34ae40ba01",)),
        ),
        called=tuple(Called(f"{model}.{method}", ("self", pixels, grid)) for pixels, grid, method in KINDS.values()),
        shared=(Replaced(f"{model}.__init__", shared_tower.model_init, (known["build"],)),),
    )


PLAIN = _family(
    "plain",
    "qwen3_vl.modeling",
    "Qwen3VLModelDeprecated",
    "Qwen3VLTextModel",
    {"model": "745af1ed87fe646b", "init": "fb4a505451b444d2", "text": "6eebd96dd42e01e6", "build": "827af19258f33ace"},
)
PLAIN_MOE = _family(
    "plain MoE",
    "qwen3_vl_moe.modeling",
    "Qwen3VLMoeModelDeprecated",
    "Qwen3VLMoeTextModel",
    {"model": "84de824353cee7f6", "init": "f2b1b38e665bb7f3", "text": "8f1ed8c9f0439b4a", "build": "8c93e5e20ff03175"},
)
