"""What context parallelism changes besides the models: attention, the criterion's mean, two methods of the trainer."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from paddle_vl_sp.attention import ContextParallel
from paddle_vl_sp.formers.changes import Change, keep, replace
from paddle_vl_sp.formers.context.attention import core_forward, crossing
from paddle_vl_sp.formers.context.forward import WHOLE_EVALUATION
from paddle_vl_sp.formers.context.loss import criterion_forward
from paddle_vl_sp.formers.context.setting import turn_off, turn_on
from paddle_vl_sp.formers.known import OURS, Deviation, Replaced, original_of
from paddle_vl_sp.log import logger

CRITERION = "paddleformers.nn.criterion.interface"
MEAN = Replaced("CriterionLayer.forward", criterion_forward, ("a22b63f3aa52da40",))
FLEET_ATTENTION = "paddlefleet.transformer.dot_product_attention"
TRAINER = "paddleformers.trainer.trainer"
ATTENTION = "paddleformers.nn.attention"  # others may compute something else


@dataclass(frozen=True, eq=False)
class TurnedOn:
    """The setting itself."""

    setting: ContextParallel
    needs_methods = True

    def undo(self) -> bool:
        turn_off(self.setting)
        return True


@dataclass(frozen=True, eq=False)
class Registered:
    """One of PaddleFormers' attention functions, in its table."""

    table: dict[str, Any]
    name: str
    original: Any
    ours: Any

    def undo(self) -> bool:
        if self.table.get(self.name) is self.ours:
            self.table[self.name] = self.original
        return True


def deviations() -> list[Deviation]:
    """What is not as known of the criterion and the trainer."""
    module: Any = importlib.import_module(CRITERION)
    why = MEAN.unknown(original_of(module, MEAN.name), module.CriterionLayer)
    trainer = _class_in(TRAINER, "Trainer")
    gone = [name for name in TRAINER_METHODS if trainer and name not in vars(trainer)]
    return [Deviation(why)] * bool(why) + [Deviation(f"Trainer.{name} is not there") for name in gone]


def install(setting: ContextParallel, made: list[Change]) -> None:
    """Appends each change as it is made, so that an error on the way can be undone."""
    made += _attention_functions()
    trainer = _class_in(TRAINER, "Trainer")
    for owner, name, make in (
        (_class_in(CRITERION, "CriterionLayer"), "forward", MEAN.make),
        (_class_in(FLEET_ATTENTION, "DotProductAttention"), "forward", core_forward),
        *((trainer, name, make) for name, make in TRAINER_METHODS.items()),
    ):
        change = None if owner is None else replace(owner, name, make)
        if change is not None:
            made.append(change)
    turn_on(setting)
    made.append(keep(TurnedOn(setting)))


def whole_inputs(original: Callable[..., Any]) -> Callable[..., Any]:
    """Leaves the batch whole for models that cut it themselves."""

    @functools.wraps(original)
    def _get_inputs_list(self: Any, inputs: Any) -> Any:
        if not cuts_by_itself(self.model):
            return original(self, inputs)
        asked = self.args.split_inputs_sequence_dim
        self.args.split_inputs_sequence_dim = False
        try:
            return original(self, inputs)
        finally:
            self.args.split_inputs_sequence_dim = asked

    return _get_inputs_list


def whole_predictions(original: Callable[..., Any]) -> Callable[..., Any]:
    """Has every rank evaluate whole batches where the logits are asked for, which are of its own part otherwise."""

    @functools.wraps(original)
    def prediction_step(
        self: Any, model: Any, inputs: Any, prediction_loss_only: bool, *args: Any, **kwargs: Any
    ) -> Any:
        with WHOLE_EVALUATION.given(not prediction_loss_only):
            return original(self, model, inputs, prediction_loss_only, *args, **kwargs)

    return prediction_step


TRAINER_METHODS = {"_get_inputs_list": whole_inputs, "prediction_step": whole_predictions}


def cuts_by_itself(model: Any) -> bool:
    """Whether a forward of ours is in it."""
    return any(hasattr(type(layer).forward, OURS) for layer in model.sublayers(include_self=True))


def _attention_functions() -> list[Change]:
    from paddleformers.nn.attention.interface import AttentionInterface

    made: list[Change] = []
    table = AttentionInterface._global_mapping
    for name, original in list(table.items()):
        if getattr(original, "__module__", "").startswith(ATTENTION) and not hasattr(original, OURS):
            ours: Any = crossing(original)
            setattr(ours, OURS, original)
            table[name] = ours
            made.append(keep(Registered(table, name, original, ours)))
    return made


def _class_in(module: str, name: str) -> Any:
    """None where the module cannot be imported: then it is not in use."""
    try:
        return getattr(importlib.import_module(module), name, None)
    except Exception as error:  # what others raise while they are imported is not ours to sort
        logger.debug("%s cannot be imported: %s", module, error)
        return None
