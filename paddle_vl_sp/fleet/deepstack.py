"""The transformer layer that adds deepstack features: one row addition in the layer's own order."""

from __future__ import annotations

from typing import Any

import paddle
from paddle import Tensor

from paddle_vl_sp.carried import CARRIED, GATHER, LEVELS, MASK, UPDATE, indices_to_carry, levels_to_carry, mask_to_carry
from paddle_vl_sp.comm.grads import complete_grad, head_norms, sum_in_backward
from paddle_vl_sp.fleet.topology import layer_share, pipeline_size, tensor_parallel_group, visual_subclass
from paddle_vl_sp.plan import VisualPlan, plan_visual
from paddle_vl_sp.report import note_forward
from paddle_vl_sp.rows import add_rows
from paddle_vl_sp.verify import check_result, checking


class VisualDeepstack:
    """For a subclass of a PaddleFleet transformer layer: after the layer, level `i` is added to layer `i`'s rows.

    The addition is outside recompute and uses the plan of the embedding. Where only visual_pos_masks arrived, from
    an embedding of PaddleFleet's own, the first deepstack layer makes the plan and, like every maker of a plan,
    completes the gradients of the levels. The last one removes everything visual from the dict.

    inplace = False  the sum is a new tensor: hooks may keep the layer's output, as under PaddleFleet
    inplace = True   the layer's output is overwritten, for layers whose output is not kept elsewhere

    ::

        class Layer(VisualDeepstack, TransformerLayer):  # keep "TransformerLayer" in the class's name for pipelines
            inplace = True
    """

    inplace = False
    config: Any
    layer_number: int

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if getattr(self.config, "sequence_parallel", False) or not isinstance(self, paddle.nn.Layer):
            return  # PaddleFleet marks them
        for norm in head_norms(self):
            sum_in_backward(norm, tensor_parallel_group)

    def forward(self, dict_args: dict[str, Any]) -> dict[str, Any]:
        carried = {key: dict_args[key] for key in CARRIED if dict_args.get(key) is not None}
        out: dict[str, Any] = super().forward(  # type: ignore[misc]
            {key: value for key, value in dict_args.items() if key not in CARRIED}
        )
        num_levels = len(carried.get(LEVELS, []))
        level = self.layer_number - (getattr(self.config, "num_empty_layers_add_in_head", None) or 0)
        if 0 <= level < num_levels:
            plan = self._carried_plan(carried, out["hidden_states"])
            hidden = out["hidden_states"]
            inplace = self.inplace and not (hidden.is_leaf and not hidden.stop_gradient)
            out["hidden_states"] = self._add(hidden, carried[LEVELS][level], plan, inplace)
            if checking() and not inplace and MASK in carried:
                self._check_addition(hidden, carried[MASK], carried[LEVELS][level], out["hidden_states"])
        if level + 1 < num_levels:
            out |= carried | {LEVELS: levels_to_carry(carried[LEVELS], level)}
            if MASK in carried:
                out[MASK] = mask_to_carry(carried[MASK], pipeline_size(self.config))
        return out

    def _deepstack_process(self, hidden_states: Tensor, visual_pos_masks: Tensor, visual_embeds: Tensor) -> Tensor:
        """visual_embeds [N, H] added where visual_pos_masks [B, S] says; as upstream, their gradient is partial."""
        plan = self._plan_of_mask(visual_pos_masks, hidden_states, visual_embeds)
        return self._add(hidden_states, visual_embeds, plan, inplace=False)

    def _check_addition(self, hidden: Tensor, mask: Tensor, embeds: Tensor, ours: Tensor) -> None:
        """Against the base's own way, where it has one."""
        upstream = getattr(super(), "_deepstack_process", None)
        if upstream is not None:
            with paddle.no_grad():
                wanted = upstream(hidden, mask, embeds)
            check_result("the deepstack addition", ours, wanted, "report it")

    def _carried_plan(self, carried: dict[str, Any], hidden: Tensor) -> VisualPlan:
        """The plan of the dict, or a new one, which `carried` then has for the layers that follow."""
        levels = carried[LEVELS]
        if UPDATE in carried and GATHER in carried:
            row_shape = self._row_shape(hidden, carried.get(MASK))
            return VisualPlan.from_indices(carried[UPDATE], carried[GATHER], row_shape, levels[0].shape[0])
        if MASK not in carried:
            raise ValueError(
                f"{LEVELS} arrived without {UPDATE} and {GATHER} and without {MASK}: hand on what the embedding returns"
            )
        plan = self._plan_of_mask(carried[MASK], hidden, levels[0])
        share = layer_share(self)
        note_forward(plan, num_levels=len(levels), group=share.group)
        if share.size > 1:
            carried[LEVELS] = complete_grad(levels, plan, share.group)
        carried |= indices_to_carry(plan, pipeline_size(self.config))
        return plan

    def _row_shape(self, hidden: Tensor, mask: Tensor | None) -> tuple[int, int]:
        """The leading shape that the layer's order and the mask's batch ask for."""
        first, second = hidden.shape[:2]
        if mask is None:
            return first, second
        return (first, mask.shape[0]) if self.config.sequence_parallel else (mask.shape[0], second)

    def _plan_of_mask(self, mask: Tensor, hidden: Tensor, embeds: Tensor) -> VisualPlan:
        """For hidden [S_local, B, H] under sequence parallel; without it, or flattened, rows go sample by sample."""
        sequence_first = bool(self.config.sequence_parallel) and hidden.ndim == 3
        layout = layer_share(self).layout(int(mask.shape[1]))
        return plan_visual(mask, None, layout, sequence_first=sequence_first, num_features=int(embeds.shape[0]))

    def _add(self, hidden: Tensor, embeds: Tensor, plan: VisualPlan, inplace: bool) -> Tensor:
        return add_rows(hidden, own_columns(embeds, int(hidden.shape[-1])), plan, inplace=inplace)


def deepstack_layer(base: type) -> type:
    """A subclass of the transformer layer `base` with VisualDeepstack, named Visual + its name.

    ::

        Layer = deepstack_layer(TransformerLayer)
    """
    if "transformerlayer" not in base.__name__.lower():
        raise ValueError(
            f"{base.__name__} is not named like a transformer layer: pipelines find the layers they cut between by "
            "'TransformerLayer' in the class name; rename it"
        )
    return visual_subclass(VisualDeepstack, base)


def own_columns(embeds: Tensor, width: int) -> Tensor:
    """This rank's columns where the hidden states are cut along H as well: embeds [N, H] -> [N, H / size]."""
    total = int(embeds.shape[-1])
    if total == width:
        return embeds
    group = tensor_parallel_group()
    if group is None or width * group.nranks != total:
        size = "no group" if group is None else f"{group.nranks} ranks"
        raise ValueError(
            f"visual features are {total} wide and hidden states {width}: not the columns of one tensor-parallel rank "
            f"({size}); project the features to the hidden size"
        )
    return embeds[:, group.rank * width : (group.rank + 1) * width]
