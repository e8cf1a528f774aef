"""PADDLE_VL_SP_AUDIT: the gradients of PaddleFormers' trainer, audited with the first batch before the first step."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakSet

from paddle import Tensor

from paddle_vl_sp.audit import GradientAudit, audit_gradients
from paddle_vl_sp.audit.state import assign, gradient_of
from paddle_vl_sp.comm.collectives import Group, all_reduce_sum, has_peers
from paddle_vl_sp.formers.balanced_tower import is_any_balanced
from paddle_vl_sp.formers.changes import Change, replace
from paddle_vl_sp.formers.groups import data_group, topology
from paddle_vl_sp.log import logger
from paddle_vl_sp.report import paused
from paddle_vl_sp.settings import AUDIT, setting

_audited: WeakSet[Any] = WeakSet()  # trainers


def audit_if_asked() -> list[Change]:
    """With PADDLE_VL_SP_AUDIT=1 or strict, every trainer audits its first batch; strict stops on wrong gradients."""
    if setting(AUDIT) == "0":
        return []
    from paddleformers.trainer import Trainer

    change = replace(Trainer, "training_step", auditing)
    return [] if change is None else [change]


def auditing(original: Callable[..., Any]) -> Callable[..., Any]:
    """Audits before the first step of each trainer, which then does what it would have done."""

    @functools.wraps(original)
    def training_step(self: Any, model: Any, inputs: Any, *args: Any, **named: Any) -> Any:
        if self not in _audited:
            _audited.add(self)
            audit_step(self, model, inputs, functools.partial(original, self, model, inputs, *args, **named))
        return original(self, model, inputs, *args, **named)

    return training_step


def audit_step(trainer: Any, model: Any, inputs: Any, step: Callable[[], Tensor]) -> GradientAudit | None:
    """The audit of one trainer's model, logged by the first rank; None where it cannot be made."""
    group, why_not = _group_of(trainer)
    if why_not:
        logger.warning("%s: the gradients are not audited: %s", AUDIT, why_not)
        return None
    is_pipeline = _steps_by_itself(trainer)
    loss = step if is_pipeline else _loss_of(trainer, model, inputs)
    after = _sum_over_sep(list(trainer.model.parameters()), group)
    try:
        with paused():
            audit = audit_gradients(loss, trainer.model, group, after=after, has_backward=is_pipeline)
    except ValueError as error:  # raised by all ranks of the group
        if setting(AUDIT) == "strict":
            raise
        logger.warning("%s: the gradients are not audited: %s", AUDIT, error)
        return None
    logger.info("%s: %s", AUDIT, audit)
    if audit.wrong and setting(AUDIT) == "strict":
        raise ValueError(
            f"{AUDIT}=strict: {len(audit.wrong)} of {len(audit.findings)} gradients are wrong, and no step was made; "
            f"{AUDIT}=1 goes on\n{audit}"
        )
    return audit


def _loss_of(trainer: Any, model: Any, inputs: Any) -> Callable[[], Tensor]:
    """The forward of `Trainer.training_step`."""
    model.train()
    prepared = trainer._prepare_inputs(inputs)

    def loss() -> Tensor:
        with trainer.autocast_smart_context_manager():
            value: Tensor = trainer.compute_loss(model, dict(prepared))  # it pops labels
        return value

    return loss


def _steps_by_itself(trainer: Any) -> bool:
    """Whether the trainer's step is forward and backward in one, as that of the fleet classes is."""
    from paddleformers.utils.import_utils import is_paddlefleet_available

    return bool(is_paddlefleet_available() and trainer.using_fleet_model)


def _group_of(trainer: Any) -> tuple[Group | None, str]:
    """The ranks that hold copies, and why there can be no audit."""
    args, groups = trainer.args, topology()
    if args.pipeline_model_parallel_size > 1:
        return None, "each pipeline stage has other parameters"
    if "stage2" in str(args.sharding) or "stage3" in str(args.sharding):
        return None, "sharding stages 2 and 3 cut the gradients"
    if _steps_by_itself(trainer) and args.gradient_accumulation_steps > 1:
        return None, "the fleet classes accumulate batches before their step: set gradient_accumulation_steps to 1"
    if is_any_balanced() and has_peers(data_group()):
        return None, "the data-parallel ranks share their towers' work, so that a gradient is not of one rank's loss"
    if groups is None:
        return None, ""
    tensor, sep = groups.get_model_parallel_group(), _sep_of(groups)
    if has_peers(tensor) and has_peers(sep):
        return None, "tensor and sep parallelism together are two groups: use one of them for the audit"
    return (sep if has_peers(sep) else tensor if has_peers(tensor) else None), ""


def _sep_of(groups: Any) -> Group | None:
    if groups.get_sep_parallel_world_size() < 2:
        return None
    group: Group = groups.get_sep_parallel_group()
    return group


def _sum_over_sep(parameters: Sequence[Tensor], group: Group | None) -> Callable[[], None] | None:
    """What the trainer does over the sep axis after the backward; None where the group is another."""
    groups = topology()
    if group is None or groups is None or _sep_of(groups) is not group:
        return None

    def after() -> None:
        for gradient in map(gradient_of, parameters):
            if gradient is not None:
                assign(gradient, all_reduce_sum(gradient.detach().clone(), group))

    return after
