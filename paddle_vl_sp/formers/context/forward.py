"""The forwards of the models: the outer one cuts the batch, the inner one sees this rank's part of it."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import paddle
from paddle import Tensor
from paddle.nn import Layer

from paddle_vl_sp.carried import Handover
from paddle_vl_sp.comm.agree import check_same, fingerprint
from paddle_vl_sp.formers.context.attention import INDICES
from paddle_vl_sp.formers.context.plain import check_tensor_parallel
from paddle_vl_sp.formers.context.setting import context_parallel, refuse_uncut_training
from paddle_vl_sp.formers.context.step import STEP, Step, own_labels, step_of
from paddle_vl_sp.formers.context.together import put_together
from paddle_vl_sp.verify import checking

LABELS = "labels"
WHOLE_EVALUATION: Handover[bool] = Handover("whole_evaluation")  # who evaluates needs the logits of all positions


def outer_forward(original: Callable[..., Any]) -> Callable[..., Any]:
    """Under context parallelism cuts the whole batch: its loss is that of all ranks, its logits are this rank's.

    A forward with a cache, or one in evaluation without labels, as in generate(), or for the trainer's predictions, is
    not cut: each rank computes all.
    """
    signature = inspect.signature(original)

    @functools.wraps(original)
    def forward(self: Layer, *args: Any, **kwargs: Any) -> Any:
        call = signature.bind(self, *args, **kwargs)
        given = call.arguments
        if STEP.get() is not None or not is_to_be_cut(self, given):
            return original(*call.args, **call.kwargs)
        setting = context_parallel()
        if setting is None:
            return original(*call.args, **call.kwargs)
        require_ids(self, given)
        if setting.ids == "cut":
            given |= put_together(setting, text_config_of(self), given)
        step = step_of(setting, text_config_of(self), given)
        if checking():
            check_same(fingerprint(given["input_ids"]), "input_ids", step.group)
        if given.get(LABELS) is not None:
            given[LABELS] = own_labels(step, given[LABELS])
        if given.get("loss_mask") is not None:
            given["loss_mask"] = step.own(given["loss_mask"], 0)
        with STEP.given(step):
            out = original(*call.args, **call.kwargs)
        step.require_use(self, given.get(LABELS) is not None)
        return out

    return forward


def uncut_forward(original: Callable[..., Any]) -> Callable[..., Any]:
    """Refuses to train under context parallelism: its family is not among those that are named."""

    @functools.wraps(original)
    def forward(self: Layer, *args: Any, **kwargs: Any) -> Any:
        refuse_uncut_training(self)
        return original(self, *args, **kwargs)

    return forward


def is_to_be_cut(model: Layer, given: dict[str, Any]) -> bool:
    has_cache = given.get("past_key_values") is not None or bool(given.get("use_cache"))
    is_for_loss = given.get(LABELS) is not None and not WHOLE_EVALUATION.get()
    return not has_cache and ((model.training and paddle.is_grad_enabled()) or is_for_loss)


def require_ids(model: Layer, given: dict[str, Any]) -> None:
    kept = given.get("logits_to_keep")
    if kept is not None and not (isinstance(kept, int) and kept == 0):
        raise ValueError(
            "logits_to_keep under context parallelism: each rank has the logits of its own part; leave it out"
        )
    if given.get("input_ids") is None or given.get("inputs_embeds") is not None:
        raise ValueError(
            f"context parallelism cuts {type(model).__name__} by its input_ids, and this batch has "
            f"{'inputs_embeds' if given.get('inputs_embeds') is not None else 'none'}: give input_ids alone"
        )


def text_config_of(model: Any) -> Any:
    """The configuration of the model's text part."""
    return getattr(model.config, "text_config", None) or model.config


def text_inner_forward(original: Callable[..., Any]) -> Callable[..., Any]:
    """Runs on this rank's ids and positions under context parallelism; without, refuses a sep axis."""
    return _inner_forward(original, mask=lambda step: None)


def linear_inner_forward(original: Callable[..., Any]) -> Callable[..., Any]:
    """As `text_inner_forward`, for a model that hands attention_mask to its linear attention, and that alone."""
    return _inner_forward(original, mask=lambda step: step.marker)


def _inner_forward(original: Callable[..., Any], mask: Callable[[Step], Tensor | None]) -> Callable[..., Any]:
    signature = inspect.signature(original)
    more = next((name for name, p in signature.parameters.items() if p.kind is p.VAR_KEYWORD), "")

    @functools.wraps(original)
    def forward(self: Layer, *args: Any, **kwargs: Any) -> Any:
        step = STEP.get()
        call = signature.bind(self, *args, **kwargs)
        if step is None:
            refuse_uncut_training(self)
            return original(*call.args, **call.kwargs)
        given = call.arguments
        check_tensor_parallel(self.config, step)
        ids, positions = given["input_ids"], given.get("position_ids")
        own = {
            "input_ids": step.own(ids, 0),
            "position_ids": step.own(positions_of(ids) if positions is None else positions.expand(ids.shape), 0),
            "attention_mask": mask(step),
            "use_cache": False,
            INDICES: step.marker,
        }
        named = {name: value for name, value in own.items() if name in signature.parameters}
        given |= named
        if len(named) < len(own):
            given[more] = given.get(more, {}) | {name: own[name] for name in own.keys() - named.keys()}
        return original(*call.args, **call.kwargs)

    return forward


def positions_of(ids: Tensor) -> Tensor:
    """0 .. S - 1 in every row: [B, S]"""
    return paddle.arange(ids.shape[1], dtype="int64").expand(ids.shape)
