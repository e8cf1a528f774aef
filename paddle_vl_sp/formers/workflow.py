"""Plans in the batches of PaddleFormers' command line, whose collate function no setting can change."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import paddle
from paddle.nn import Layer

from paddle_vl_sp.carried import fail_in_the_next_forward
from paddle_vl_sp.formers.changes import Replacement, replace
from paddle_vl_sp.formers.found import UpstreamChanged
from paddle_vl_sp.formers.known import OURS
from paddle_vl_sp.formers.loader import PlanningCollate
from paddle_vl_sp.formers.patch import switched_off
from paddle_vl_sp.formers.shared_tower import is_merging
from paddle_vl_sp.log import logger
from paddle_vl_sp.settings import LOADER_PLANS, is_on

WORKFLOW, COLLATE = "paddleformers.cli.train.sft.workflow", "mm_collate_fn"


def plan_if_asked() -> None:
    """With PADDLE_VL_SP_LOADER_PLANS=1, batches of VL-SFT and VL-PT runs carry the plans of all ranks."""
    if is_on(LOADER_PLANS) and not switched_off():
        plan_in_workflow()
        logger.info("the data loader plans: %s=1", LOADER_PLANS)


def plan_in_workflow() -> Replacement | None:
    """Replaces the collate function of PaddleFormers' VL runs, until `revert()`; None where it is ours already."""
    workflow = importlib.import_module(WORKFLOW)
    if COLLATE not in vars(workflow):
        raise UpstreamChanged(f"{WORKFLOW} has no {COLLATE}, to which {LOADER_PLANS}=1 adds the plans: leave it out")
    return replace(workflow, COLLATE, planning)


def planning(original: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the plans of all ranks to each batch."""

    @functools.wraps(original)
    def collate(batch: Any, *args: Any, **named: Any) -> Any:
        whole = original(batch, *args, **named)
        try:
            return _planner(named)(whole)
        except Exception as error:
            if paddle.io.get_worker_info() is not None:
                raise  # from a worker process it reaches the trainer
            # in the trainer's own process a thread collates, for which Paddle would wait for ever
            logger.error("%s=1: %s", LOADER_PLANS, error)
            fail_in_the_next_forward(error)
            return whole

    return collate


def _planner(named: dict[str, Any]) -> PlanningCollate:
    """Adds the plans to a batch that the original returned for these arguments."""
    model, arguments = named.get("model"), named.get("training_args")
    if model is None or arguments is None:
        raise UpstreamChanged(
            f"{COLLATE} is called in an unknown way, without model and training_args by name, from which "
            f"{LOADER_PLANS}=1 knows how the sequence is cut: leave it out"
        )
    planned = _planned_for(model)
    if planned is None:
        raise ValueError(
            f"{LOADER_PLANS}=1 with {type(model).__name__}: no model in it takes plans from the data loader; leave it "
            "out"
        )
    placeholder_ids, merge_size, cut = planned
    return PlanningCollate(
        dict,
        placeholder_ids,
        sp_size=max(arguments.tensor_model_parallel_size, 1) if arguments.sequence_parallel else 1,
        cut=cut,
        merge_size=merge_size,
        sequence_parallel=arguments.sequence_parallel,
    )


def _planned_for(model: Layer) -> tuple[tuple[int, int], int, str] | None:
    """Placeholder ids, merge size and cut of the layer that takes plans, which may be wrapped, as LoRA does.

    Asked for every batch: it is among the first layers, and the walk ends there.
    """
    for _, layer in model.named_sublayers(include_self=True):
        if hasattr(type(layer).forward, OURS) and hasattr(layer, "vision_model"):  # on PaddleFleet
            ids = layer.image_token_index, layer.video_token_index
            return ids, layer.config.vision_config.spatial_merge_size, "sequence"
        if is_merging(layer):
            ids = layer.config.image_token_id, layer.config.video_token_id
            return ids, layer.visual.spatial_merge_size, "flattened"
    return None
