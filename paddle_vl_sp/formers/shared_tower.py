"""Vision DP for the plain classes: the tensor-parallel ranks share the tower's images instead of all encoding all."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeAlias
from weakref import WeakSet

import paddle
from paddle import Tensor
from paddle.nn import Layer

from paddle_vl_sp.comm.collectives import Group
from paddle_vl_sp.formers.context.setting import is_on as context_parallelism_is_on
from paddle_vl_sp.formers.context.step import STEP
from paddle_vl_sp.formers.groups import require_tensor_parallel_group
from paddle_vl_sp.formers.known import OURS
from paddle_vl_sp.plan import VisualPlan
from paddle_vl_sp.settings import VISION_DP

Encoded: TypeAlias = "Tensor | tuple[Tensor, list[Tensor]]"
Encode = Callable[[Tensor, Tensor], Encoded]

_sharing: WeakSet[Any] = WeakSet()
_sharing_over_context: WeakSet[Any] = WeakSet()
_shared_as_built: WeakSet[Any] = WeakSet()  # of them, those that model_init shared


def share_tower(model: Layer) -> Any:
    """Turns it on for the plain model inside `model`, and marks the tower's parameters: returns what has them.

    Each rank's parameter gradients then cover its own images. PaddleFormers' trainer sums marked parameters over the
    tensor-parallel group under sequence parallelism; in your own loop, sum_parameter_grads does.
    """
    from paddle_vl_sp.comm.grads import mark_for_sum

    inner = plain_model_of(model)
    if context_parallelism_is_on():  # its ranks share the work, and the trainer sums over them
        _sharing_over_context.add(inner)
        return inner
    if not getattr(text_config(inner), "sequence_parallel", False):
        raise ValueError(
            "vision_dp=True with sequence_parallel off: no trainer would sum the tower's gradients, of which every "
            "rank has its own images' only; turn sequence_parallel on, or call encode_shared and sum_parameter_grads"
        )
    _sharing.add(inner)
    mark_for_sum(inner.visual)
    return inner


def model_init(original: Callable[..., Any]) -> Callable[..., Any]:
    """Has the tensor-parallel ranks share the work of the tower, in every model that is built from now on."""

    @functools.wraps(original)
    def __init__(self: Layer, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        original(self, *args, **kwargs)
        _shared_as_built.add(share_tower(self))

    return __init__


def refusing_init(original: Callable[..., Any]) -> Callable[..., Any]:
    """Refuses to share the work of a tower that is tensor-parallel."""

    @functools.wraps(original)
    def __init__(self: Layer, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        raise ValueError(
            f"vision_dp=True, or {VISION_DP}=1, with {type(self).__name__}: the vision tower of the model on "
            "PaddleFleet is cut over the tensor-parallel ranks, so they share its work already; leave it out, or say "
            "'data' to balance it over the data-parallel ranks"
        )

    return __init__


def stop_where_not_asked_for() -> None:
    """Stops sharing the towers that were shared as they were built, where their classes build as upstream again."""
    for inner in take_built_as_upstream(_shared_as_built):
        stop_sharing(inner)


def take_built_as_upstream(models: WeakSet[Any]) -> list[Any]:
    """Out of models that our constructors built, those whose classes have their own again."""
    taken = [
        inner for inner in models if not any(hasattr(vars(cls).get("__init__"), OURS) for cls in type(inner).__mro__)
    ]
    for inner in taken:
        models.discard(inner)
    return taken


def stop_sharing(inner: Layer) -> None:
    _sharing.discard(inner)
    _sharing_over_context.discard(inner)
    for parameter in inner.visual.parameters():
        parameter.sequence_parallel = False


def plain_model_of(model: Layer) -> Any:
    """The layer that encodes and inserts, by a forward of ours."""
    for layer in model.sublayers(include_self=True):
        if is_merging(layer):
            refuse_own_mask(layer, is_to_be_shared=True)
            return layer
    raise ValueError(
        f"vision_dp needs a plain model whose methods are replaced, got {type(model).__name__}: the tower of "
        "the model on PaddleFleet is tensor-parallel over the same ranks, so its images cannot be shared among them"
    )


def is_merging(layer: Layer) -> bool:
    """Whether a forward of ours encodes and inserts in this layer, by a tower that every rank has whole."""
    return hasattr(type(layer).forward, OURS) and all(
        hasattr(layer, name) for name in ("visual", "get_placeholder_mask")
    )


def has_own_mask(model: Layer) -> bool:
    """Whether a subclass, or the instance, decides itself where the features go: PaddleFormers' forward must ask it."""
    if "get_placeholder_mask" in vars(model):
        return True
    return bool(type(model).get_placeholder_mask.__module__.partition(".")[0] != "paddleformers")


def text_config(inner: Layer) -> Any:
    """The configuration of the text model, also of one that is wrapped."""
    text = inner.language_model
    if hasattr(text, "config"):
        return text.config
    layers = text.sublayers() if isinstance(text, paddle.nn.Layer) else []
    return next((layer.config for layer in layers if hasattr(layer, "config")), inner.config.text_config)


def refuse_own_mask(inner: Layer, is_to_be_shared: bool = False) -> None:
    """PaddleFormers' own forward, which such a model needs, has every rank encode every image."""
    if (is_to_be_shared or is_shared(inner)) and has_own_mask(inner):
        raise ValueError(
            f"vision_dp=True with a subclass that has its own get_placeholder_mask ({type(inner).__name__}): "
            "PaddleFormers' own forward runs it, which shares nothing; leave vision_dp out"
        )


def _check_marks(tower: Layer) -> None:
    """Parameters that came after the marks, such as LoRA's, would be trained on this rank's own images."""
    unmarked = [
        name
        for name, parameter in tower.named_parameters()
        if not parameter.stop_gradient
        and not getattr(parameter, "sequence_parallel", False)
        and not getattr(parameter, "is_distributed", False)  # which encode_shared refuses, by its own words
    ]
    if unmarked:
        raise ValueError(
            f"{len(unmarked)} parameters of the shared tower are not marked for the sum of their gradients, such as "
            f"{unmarked[0]}: call apply_to_paddleformers(model, vision_dp=True) once the model has all its parameters, "
            "after LoRA, and before the trainer is built"
        )


def is_shared(inner: Layer) -> bool:
    return inner in _sharing or inner in _sharing_over_context


def shares_a_batch(inner: Layer) -> bool:
    """Whether several ranks, which could share the work, hold the same batch, and somebody sums their gradients."""
    return context_parallelism_is_on() or bool(getattr(text_config(inner), "sequence_parallel", False))


def is_shared_over_context(inner: Layer) -> bool:
    """Whether the ranks of context parallelism share its work."""
    return inner in _sharing_over_context


def is_shared_over_tensor_parallel(inner: Layer) -> bool:
    return inner in _sharing


def encoded(inner: Layer, encode: Encode, pixels: Tensor, grid: Tensor, plan: VisualPlan | None = None) -> Encoded:
    """encode(pixels, grid), by all ranks together where the tower is shared: features [N, H], maybe with levels.

    plan  of this rank: of the features that are placed after the cut, only the rows [n, H] that it uses arrive. Those
          are the levels, and under context parallelism the features too
    """
    if inner in _sharing_over_context:
        step = STEP.get()
        if step is None:
            return encode(pixels, grid)
        # rows are placed after the cut, so that each rank's gradient is partial
        return _encoded(inner, encode, pixels, grid, step.group, "partial", plan)
    if inner not in _sharing:
        return encode(pixels, grid)
    _check_marks(inner.visual)
    # whole: by the cut's own backward for the features, and without a plan by complete_grad for the levels
    return _encoded(inner, encode, pixels, grid, require_tensor_parallel_group(), "whole", plan)


def _encoded(
    inner: Layer,
    encode: Encode,
    pixels: Tensor,
    grid: Tensor,
    group: Group,
    grad: str,
    plan: VisualPlan | None = None,
) -> Encoded:
    from paddle_vl_sp.vision.parallel import encode_shared
    from paddle_vl_sp.vision.share import tower_alpha

    tower = inner.visual
    share = functools.partial(
        encode_shared,
        encode,
        pixels,
        grid,
        group=group,
        merge_size=tower.spatial_merge_size,
        grad=grad,
        split_frames=True,  # the tower attends within a frame
        alpha=tower_alpha(tower.config.hidden_size, tower.config.intermediate_size),
    )
    features: Encoded = share() if plan is None else share(plan=plan)[0]
    return features
