"""The layer and the model on PaddleFleet, each without what is around it."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import paddle
from paddle import Tensor
from paddle.nn import Layer

from paddle_vl_sp.formers.known import Clause, Family, original_of

NUM_LEVELS, WIDTH = 2, 6
CONFIG = {"sequence_parallel": False, "num_empty_layers_add_in_head": 0, "freeze_vision_model": False}


def lets_its_layer_add(method: str) -> Clause:
    """It calls `_deepstack_process` by name in the layers that have a level, and hands everything else on."""

    def broken(_: Family, module: Any) -> str:
        for is_recomputed in (False, True):
            for number in range(NUM_LEVELS + 1):
                why = _layer(original_of(module, method), module, method, number, is_recomputed)
                if why:
                    return f"{why}: layer {number} of {NUM_LEVELS} levels{', full recompute' * is_recomputed}"
        return ""

    return Clause(f"{method} adds one level after each of the first layers, and hands its dict on", broken)


def _layer(forward: Any, module: Any, method: str, number: int, is_recomputed: bool) -> str:
    calls: list[dict[str, Any]] = []

    def add(**given: Any) -> Tensor:
        calls.append(given)
        return given["hidden_states"] + 1.0

    layer = _without_constructor(getattr(module, method.partition(".")[0]))
    layer.config, layer.layer_number, layer.full_recompute = SimpleNamespace(**CONFIG), number, is_recomputed
    layer._forward_impl = lambda hidden_states, *_, **__: (hidden_states * 2.0, None)  # recompute gives it by place
    layer._deepstack_process = add
    hidden = paddle.to_tensor(np.arange(2 * 3 * WIDTH).reshape(2, 3, WIDTH), "float32", stop_gradient=False)
    mask, levels = paddle.ones([2, 3], dtype="bool"), [paddle.rand([6, WIDTH]) for _ in range(NUM_LEVELS)]
    given = {
        "hidden_states": hidden * 1.0,
        "visual_pos_masks": mask,
        "deepstack_visual_emb": levels,
        "visual_update_indices": paddle.arange(6),
        "rotary_pos_emb": paddle.rand([3, 2]),
    }
    out = forward(layer, dict(given))
    is_added = number < NUM_LEVELS
    if len(calls) != is_added:
        return f"{len(calls)} additions"
    for call in calls:
        if call["visual_embeds"] is not levels[number] or call["visual_pos_masks"] is not mask:
            return "another level or mask than is in the dict"
        if not np.array_equal(call["hidden_states"].numpy(), hidden.numpy() * 2):
            return "adds to other hidden states than the layer computed"
    if not np.array_equal(out["hidden_states"].numpy(), hidden.numpy() * 2 + float(is_added)):
        return "returns other hidden states"
    lost = [key for key in given if key != "hidden_states" and out.get(key) is not given[key]]
    return f"does not hand on {', '.join(lost)}" if lost else ""


class _Tower(Layer):  # type: ignore[misc]
    """One row of features a merged patch, two levels."""

    spatial_merge_size = 2

    def __init__(self) -> None:
        super().__init__()
        self.project = paddle.nn.Linear(WIDTH, WIDTH)

    def forward(self, pixels: Tensor, grid_thw: Tensor) -> tuple[Tensor, list[Tensor]]:
        rows = self.project(pixels)[: int(grid_thw.prod(-1).sum()) // 4]
        return rows, [rows + 1.0, rows + 2.0]


class _Language(Layer):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Any] = []

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        self.calls.append((args, kwargs))
        return paddle.ones([1])


def hands_on_what_it_is_given(method: str) -> Clause:
    """Its language model is called once, with one dict: ids, labels, features and levels of each kind."""

    def broken(_: Family, module: Any) -> str:
        for kinds in (("image",), ("video",), ("image", "video"), ()):
            why = _model(original_of(module, method), module, method, kinds)
            if why:
                return f"{why}: {' and '.join(kinds) or 'text'}"
        return ""

    return Clause(f"{method} hands ids, labels, features and levels to its language model in one dict", broken)


def _model(forward: Callable[..., Any], module: Any, method: str, kinds: tuple[str, ...]) -> str:
    model = _without_constructor(getattr(module, method.partition(".")[0]))
    model.language_model, model.vision_model = _Language(), _Tower()
    model.add_encoder, model.rope_deltas, model.sequence_parallel_lm = True, None, False
    model.config, model.criterion = SimpleNamespace(**CONFIG), lambda out, labels: out * 3.0
    ids, grid = paddle.ones([1, 8], dtype="int64"), paddle.to_tensor([[1, 4, 4]])
    pixels = {"image": paddle.rand([16, WIDTH]), "video": paddle.rand([16, WIDTH])}
    given = {"input_ids": ids, "position_ids": paddle.ones([3, 1, 8], dtype="int64"), "labels": ids + 1}
    for kind in kinds:
        given |= {"image": {"pixel_values": pixels[kind]}, "video": {"pixel_values_videos": pixels[kind]}}[kind]
        given[f"{kind}_grid_thw"] = grid
    out = forward(model, **given)
    if len(model.language_model.calls) != 1:
        return f"{len(model.language_model.calls)} calls of the language model"
    (args, kwargs) = model.language_model.calls[0]
    if len(args) != 1 or kwargs or not isinstance(args[0], dict):
        return "the language model does not get one dict alone"
    if float(out) != 3.0:
        return "what it returns is not its criterion's"
    passed = args[0]
    if any(passed.get(key) is not given[key] for key in ("input_ids", "labels", "position_ids")):
        return "other ids, labels or positions"
    for kind in ("image", "video"):
        rows, levels = model.vision_model(pixels[kind], grid) if kind in kinds else (None, None)
        if not _alike(passed.get(f"{kind}_embeds"), rows):
            return f"other {kind}_embeds"
        found = passed.get(f"deepstack_{kind}_embeds")
        if (found is None) != (levels is None) or len(found or []) != len(levels or []):
            return f"other deepstack_{kind}_embeds"
        if not all(map(_alike, found or [], levels or [])):
            return f"other deepstack_{kind}_embeds"
    return ""


def _alike(found: Tensor | None, wanted: Tensor | None) -> bool:
    if found is None or wanted is None:
        return found is wanted
    return found.shape == wanted.shape and np.array_equal(found.numpy(), wanted.numpy())


def _without_constructor(cls: type) -> Any:
    """An instance without what its constructor builds."""
    instance: Any = object.__new__(cls)
    Layer.__init__(instance)
    return instance
