"""The classes on PaddleFleet: its text layer adds by a plan, its model hands the data loader's plan on."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from paddle_vl_sp.comm import complete_grad
from paddle_vl_sp.formers.deepstack import Rows, adds_by_plan, tensor_parallel_group, topology
from paddle_vl_sp.formers.loader import GATHER, ORDER, UPDATE, LoadedPlans, own_row
from paddle_vl_sp.layout import SeqLayout
from paddle_vl_sp.plan import VisualPlan, plan_visual
from paddle_vl_sp.run_report import note_forward

MASK, LEVELS = "visual_pos_masks", "deepstack_visual_emb"


def layer_forward(original: Callable[..., Any]) -> Callable[..., Any]:
    """Gives the layer's `_deepstack_process` a plan: the one in the dict, or one made from the mask.

    Indices in the dict say that gradients are complete: who made the plan, an embedding of paddle_vl_sp.fleet or the
    first deepstack layer, completed the levels. Across pipeline stages no indices travel (their lengths change from
    batch to batch), so there every layer plans and completes for itself.
    """

    @functools.wraps(original)
    def forward(self: Any, dict_args: dict[str, Any]) -> Any:
        if not _adds_here(self, dict_args):
            return original(self, dict_args)
        plan, levels, shared = _planned(self, dict_args)
        given = {**dict_args, MASK: Rows(plan, dict_args[MASK]), LEVELS: levels}
        out = original(self, given)
        out[MASK] = dict_args[MASK]
        if shared and self.layer_number + 1 < len(levels):
            out[UPDATE], out[GATHER] = plan.update_indices, plan.gather_indices
        else:
            out.pop(UPDATE, None)
            out.pop(GATHER, None)
        return out

    return forward


def model_forward(original: Callable[..., Any]) -> Callable[..., Any]:
    """Lets this rank's row of the data loader's plans past the fixed dict that the original makes."""

    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        loaded = LoadedPlans.taken_from(kwargs, "sequence")
        if loaded is None:
            return original(self, *args, **kwargs)
        ids = kwargs.get("input_ids", args[0] if args else None)
        if ids is not None:
            loaded.hold_shape(ids)
        own = {UPDATE: _own(self, loaded.update), GATHER: _own(self, loaded.gather)}
        if loaded.order is not None:
            own[ORDER] = loaded.order
        hook = self.language_model.register_forward_pre_hook(lambda _layer, inputs: ({**inputs[0], **own},))
        try:
            return original(self, *args, **kwargs)
        finally:
            hook.remove()

    return forward


def _adds_here(layer: Any, dict_args: dict[str, Any]) -> bool:
    levels, mask = dict_args.get(LEVELS), dict_args.get(MASK)
    if not levels or mask is None or not adds_by_plan(layer):
        return False
    return layer.layer_number in range(len(levels)) and mask.ndim == 2 and dict_args["hidden_states"].ndim == 3


def _planned(layer: Any, dict_args: dict[str, Any]) -> tuple[VisualPlan, list[Any], bool]:
    """The plan, the levels with whole gradients, and whether later layers may use both."""
    hidden, levels = dict_args["hidden_states"], list(dict_args[LEVELS])
    if dict_args.get(UPDATE) is not None and dict_args.get(GATHER) is not None:
        indices = dict_args[UPDATE], dict_args[GATHER]
        return VisualPlan.from_indices(*indices, hidden.shape[:2], levels[0].shape[0]), levels, True
    mask, cut = dict_args[MASK], getattr(layer.config, "sequence_parallel", False)
    seq_len, num_features = mask.shape[1], levels[0].shape[0]
    if not cut or hidden.shape[0] == seq_len:
        plan = plan_visual(mask, None, SeqLayout(seq_len), sequence_first=cut, num_features=num_features)
        _note(layer, plan, hidden, mask, len(levels), None)
        return plan, levels, _is_one_stage()
    group = tensor_parallel_group()
    layout = SeqLayout(seq_len, sp_size=group.nranks, sp_rank=group.rank)
    plan = plan_visual(mask, None, layout, sequence_first=True, num_features=num_features)
    _note(layer, plan, hidden, mask, len(levels), group)
    if _is_one_stage():
        return plan, complete_grad(levels, plan, group), True
    own = layer.layer_number
    levels[own : own + 1] = complete_grad([levels[own]], plan, group)
    return plan, levels, False


def _note(layer: Any, plan: VisualPlan, hidden: Any, mask: Any, num_levels: int, group: Any) -> None:
    """Once a forward, though across pipeline stages every layer plans."""
    shared = _is_one_stage()
    if shared or layer.layer_number == 0:
        syncs = 1 if shared else num_levels
        note_forward(plan, hidden, batch=mask.shape[0], num_levels=num_levels, group=group, syncs=syncs)


def _is_one_stage() -> bool:
    groups = topology()
    return groups is None or int(groups.get_pipe_parallel_world_size()) == 1


def _own(model: Any, rows: Any) -> Any:
    """This rank's row; the first where nothing is cut."""
    is_cut = topology() is not None and getattr(model, "sequence_parallel_lm", False)
    return own_row(rows, tensor_parallel_group()) if is_cut or rows.shape[0] > 1 else rows[0]
