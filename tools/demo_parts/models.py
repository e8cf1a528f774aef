"""The class that is shown: PaddleFormers' default one where PaddleFleet runs on the CPU, else the plain one."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from paddle_vl_sp.formers import tiny, tiny_fleet
from paddle_vl_sp.formers.norms import mark_head_norms
from paddle_vl_sp.testing import enable_tensor_parallel_on_cpu


@dataclass(frozen=True)
class Kind:
    """A class of model: how it is built, what its tower's parameters are called, what is cut of it."""

    name: str
    class_name: str
    build: Callable[..., Any]
    draw_weights: Callable[[Any], dict[str, Any]]
    load_weights: Callable[..., None]
    cut: Callable[..., Any]
    tower: str
    is_flattened: bool  # the batch, before it is cut for the ranks

    def on_rank(self, weights: dict[str, Any], rank: int, nranks: int, seq_len: int) -> Any:
        """The model of a rank under sequence parallelism, with its part of the weights."""
        model = self.build(**tiny.tensor_parallel(nranks, seq_len))
        self.load_weights(model, weights, rank, nranks)
        if self.name == "plain":
            mark_head_norms(model)  # upstream's other fault, which the demonstration leaves out
        return model


PLAIN = Kind(
    "plain",
    "Qwen3VLForConditionalGenerationDeprecated",
    tiny.tiny_qwen3_vl,
    tiny.weights_of,
    tiny.load_weights,
    tiny.cut,
    "model.visual.",
    True,
)
FLEET = Kind(
    "fleet",
    "Qwen3VLForConditionalGeneration",
    tiny_fleet.tiny_qwen3_vl_fleet,
    tiny_fleet.draw_weights,
    tiny_fleet.load_weights,
    tiny_fleet.cut,
    ".vision_model.",
    False,
)
KINDS = {kind.name: kind for kind in (PLAIN, FLEET)}


def chosen(asked: str = "auto") -> tuple[Kind, str]:
    """The class to show, and why this one."""
    if asked != "auto":
        return KINDS[asked], "as asked for"
    if importlib.util.find_spec("paddlefleet") is None:
        return PLAIN, "which is built by hand; the default class needs paddlefleet, which is not installed"
    try:
        _try_a_step(FLEET)
    except Exception as error:
        return PLAIN, f"which is built by hand; the default class does not run on a CPU here: {one_line(error)}"
    return FLEET, "the default: what a YAML and AutoModel build"


def _try_a_step(kind: Kind) -> None:
    batch = tiny.draw_batch([["image"]])
    batch["position_ids"] = tiny.positions(tiny.tiny_qwen3_vl(), batch)
    with enable_tensor_parallel_on_cpu():
        kind.build()(**batch).loss.backward()


def one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:160]
