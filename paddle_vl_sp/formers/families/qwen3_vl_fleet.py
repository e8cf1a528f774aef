"""Qwen3-VL on PaddleFleet, dense and MoE: its text layer adds by a plan, its model hands the data loader's plan on."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable
from typing import Any

import paddle
from paddle import Tensor
from paddle.nn import Layer

from paddle_vl_sp.carried import (
    CARRIED,
    GATHER,
    LEVELS,
    MASK,
    ORDER,
    UPDATE,
    LoadedPlans,
    indices_to_carry,
    levels_to_carry,
    mask_to_carry,
    own_row,
)
from paddle_vl_sp.comm.grads import complete_grad
from paddle_vl_sp.formers.balanced_tower import balanced_init, balanced_rows, takes_part
from paddle_vl_sp.formers.context.fleet import part_of
from paddle_vl_sp.formers.context.forward import outer_forward
from paddle_vl_sp.formers.context.setting import refuse_uncut_training
from paddle_vl_sp.formers.context.step import STEP, Step
from paddle_vl_sp.formers.contracts import adds_the_rows_of_its_rank, hands_on_what_it_is_given, lets_its_layer_add
from paddle_vl_sp.formers.deepstack import OWN_ROWS, OwnRows, deepstack
from paddle_vl_sp.formers.families.paddlefleet import UNIT
from paddle_vl_sp.formers.groups import require_tensor_parallel_group, topology
from paddle_vl_sp.formers.known import MODELS, Family, Replaced, Swapped
from paddle_vl_sp.formers.merge import KINDS, encoded_rows
from paddle_vl_sp.formers.model_view import ModelView
from paddle_vl_sp.formers.shared_tower import refusing_init
from paddle_vl_sp.layout import SeqLayout
from paddle_vl_sp.plan import VisualPlan, plan_visual
from paddle_vl_sp.report import note_forward

PIXELS = tuple(pixels for pixels, _, _ in KINDS.values())


def layer_forward(original: Callable[..., Any]) -> Callable[..., Any]:
    """Gives the layer's `_deepstack_process` a plan: the one in the dict, or one made from the mask.

    Indices in the dict say that gradients are complete: who made the plan, an embedding of paddle_vl_sp.fleet or the
    first deepstack layer, completed the levels. The last deepstack layer drops everything visual.
    """

    @functools.wraps(original)
    def forward(self: Layer, dict_args: dict[str, Any]) -> Any:
        _refuse_empty_layers(self, dict_args)
        if not _adds_here(self, dict_args):
            return original(self, dict_args)
        plan, levels = _planned(self, dict_args)
        with OWN_ROWS.given(OwnRows(dict_args[MASK], plan)):
            out = original(self, {**dict_args, LEVELS: levels})
        out = {key: value for key, value in out.items() if key not in CARRIED}
        if self.layer_number + 1 < len(levels):
            out |= indices_to_carry(plan, _num_stages())
            out |= {
                MASK: mask_to_carry(dict_args[MASK], _num_stages()),
                LEVELS: levels_to_carry(levels, self.layer_number),
            }
        return out

    return forward


def model_forward(original: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the data loader's plans, of all ranks, to the fixed dict that the original makes."""
    signature = inspect.signature(original)

    @functools.wraps(original)
    def forward(self: Layer, *args: Any, **kwargs: Any) -> Any:
        step = STEP.get()
        loaded = LoadedPlans.pop_from(kwargs, None if step else "sequence")
        model: Any = self if step is None else _on_this_part(self, step)
        if takes_part(self, kwargs):
            _require_our_embedding(self)
            call = signature.bind(self, *args, **kwargs)
            model = _adding(model, _balanced_features(self, call.arguments))
            args, kwargs = call.args[1:], call.kwargs
        if step is not None:
            _require_our_embedding(self)
            return original(model, *args, **kwargs)
        refuse_uncut_training(self)
        ids = kwargs.get("input_ids", args[0] if args else None)
        if loaded is not None and ids is not None:
            loaded.check_shape(ids)
        if loaded is not None or all(kwargs.get(pixels) is not None for pixels in PIXELS):
            _require_our_embedding(self)
        if loaded is None:
            return original(model, *args, **kwargs)
        _check_degree(self, loaded)
        plans = {UPDATE: loaded.update, GATHER: loaded.gather}
        if loaded.order is not None:
            plans[ORDER] = loaded.order
        return original(_adding(model, plans), *args, **kwargs)

    return outer_forward(forward)


def _on_this_part(model: Layer, step: Step) -> Any:
    """The model, whose language model gets this rank's part of the sequence."""
    return ModelView(model, lambda inputs, named: ((part_of(step, model, inputs[0]), *inputs[1:]), named))


def _adding(model: Any, more: dict[str, Any]) -> Any:
    """The model, whose language model gets more in its dict."""
    return ModelView(model, lambda inputs, named: (({**inputs[0], **more}, *inputs[1:]), named))


def _balanced_features(model: Layer, given: dict[str, Any]) -> dict[str, Any]:
    """The features of this batch, by an exchange with other ranks; the original is left without pixels.

    All kinds in one call, since all ranks make equally many.
    """
    brought = {kind: given[pixels] for kind, (pixels, _, _) in KINDS.items() if given.get(pixels) is not None}
    if any(isinstance(pixels, list) for pixels in brought.values()):
        raise ValueError('vision_dp="data" takes pixels as one tensor of each kind, got a list: concatenate them first')
    dtype = next(iter(model.vision_model.parameters())).dtype
    is_frozen = bool(getattr(model.config, "freeze_vision_model", False))

    def encode(pixels: Tensor, grid: Tensor) -> Any:
        with paddle.no_grad() if is_frozen else contextlib.nullcontext():
            return encoded_rows(model.get_image_features(pixels.astype(dtype), grid))

    pairs = [(pixels, given[KINDS[kind][1]]) for kind, pixels in brought.items()]
    rows = balanced_rows(model, encode, pairs, given["input_ids"].place)
    features: dict[str, Any] = {}
    for kind, (main, *levels) in zip(brought or ["image"], rows, strict=True):
        features |= {f"{kind}_embeds": main, f"deepstack_{kind}_embeds": levels}
        given[KINDS[kind][0]] = None
    return features


def visual_layer(base: type) -> type:
    """Adds deepstack features by the plan, each level in its layer, also behind empty layers."""
    from paddle_vl_sp.fleet.deepstack import VisualDeepstack, deepstack_layer

    return base if VisualDeepstack in base.__mro__ else deepstack_layer(base)


def _require_our_embedding(model: Layer) -> None:
    """PaddleFleet's own embedding drops plans, and raises on images with videos."""
    if any(getattr(type(layer), "places_by_plan", False) for layer in model.language_model.sublayers()):
        return
    raise ValueError(
        "images with videos in one batch, and plans from the data loader, need the embedding of paddle_vl_sp.fleet, "
        "and this model was built with PaddleFleet's own: call apply_to_qwen3_vl before the model is built"
    )


def _refuse_empty_layers(layer: Layer, dict_args: dict[str, Any]) -> None:
    """PaddleFormers' layer takes its number for its level, and empty layers in front shift the numbers."""
    num_empty = getattr(layer.config, "num_empty_layers_add_in_head", None) or 0
    if num_empty and dict_args.get(LEVELS):
        raise ValueError(
            f"num_empty_layers_add_in_head={num_empty} shifts the deepstack levels of PaddleFormers' layers, and this "
            "model was built of them: call apply_to_qwen3_vl before the model is built"
        )


def _adds_here(layer: Layer, dict_args: dict[str, Any]) -> bool:
    levels, mask = dict_args.get(LEVELS), dict_args.get(MASK)
    if not levels or mask is None or layer.layer_number not in range(len(levels)):
        return False
    return bool(mask.ndim == 2 and dict_args["hidden_states"].ndim == 3)


def _planned(layer: Layer, dict_args: dict[str, Any]) -> tuple[VisualPlan, list[Any]]:
    """The plan, and the levels with whole gradients."""
    hidden, levels = dict_args["hidden_states"], list(dict_args[LEVELS])
    num_features = levels[0].shape[0]
    if dict_args.get(UPDATE) is not None and dict_args.get(GATHER) is not None:
        indices = dict_args[UPDATE], dict_args[GATHER]
        return VisualPlan.from_indices(*indices, hidden.shape[:2], num_features), levels
    mask, group = dict_args[MASK], None
    layout, sequence_first = SeqLayout(mask.shape[1]), bool(getattr(layer.config, "sequence_parallel", False))
    if sequence_first and hidden.shape[0] != mask.shape[1]:
        group = require_tensor_parallel_group()
        layout = SeqLayout(mask.shape[1], sp_size=group.nranks, sp_rank=group.rank)
    plan = plan_visual(mask, None, layout, sequence_first=sequence_first, num_features=num_features)
    note_forward(plan, num_levels=len(levels), group=group)
    return plan, levels if group is None else complete_grad(levels, plan, group)


def _num_stages() -> int:
    groups = topology()
    return 1 if groups is None else int(groups.get_pipe_parallel_world_size())


def _check_degree(model: Layer, loaded: LoadedPlans) -> None:
    """Whether the plans are for the tensor-parallel degree that the model is cut by."""
    is_cut = topology() is not None and getattr(model, "sequence_parallel_lm", False)
    if is_cut or loaded.update.shape[0] > 1:
        group = require_tensor_parallel_group()
        own_row(loaded.update, group.rank, group.nranks)


MOE = Family(  # the rest of it is made of what FAMILY replaces
    "Qwen3-VL MoE fleet",
    f"{MODELS}.qwen3_vl_moe.modeling",
    replaced=(),
    cut=(Replaced("Qwen3VLMoeForConditionalGeneration.forward", outer_forward, ("8eada67793e30adf",)),),
)
FAMILY = Family(
    UNIT,  # dense and MoE: both are made of this layer and this model
    f"{MODELS}.qwen3_vl.modeling_fleet",
    replaced=(
        Replaced("Qwen3VLTextTransformerLayer.forward", layer_forward, ("7128dabd2a78b41d",)),
        Replaced("Qwen3VLTextTransformerLayer._deepstack_process", deepstack, ("97b577cb51c39113",)),
        Replaced("Qwen3VLModelDist.forward", model_forward, ("e63536dcd1ef3476",)),
    ),
    swapped=(Swapped(f"{MODELS}.qwen3_vl.modeling_fleet:Qwen3VLTextProvider", "specific_layer", visual_layer),),
    shared=(Replaced("Qwen3VLModelDist.__init__", refusing_init, ("55a621cbb52a5624",)),),
    balanced=(Replaced("Qwen3VLModelDist.__init__", balanced_init, ("55a621cbb52a5624",)),),
    cut=(Replaced("Qwen3VLForConditionalGeneration.forward", outer_forward, ("16f169b9d3934ad0",)),),
    contract=(
        adds_the_rows_of_its_rank("Qwen3VLTextTransformerLayer._deepstack_process", sequence_first=True),
        lets_its_layer_add("Qwen3VLTextTransformerLayer.forward"),
        hands_on_what_it_is_given("Qwen3VLModelDist.forward"),
    ),
)
