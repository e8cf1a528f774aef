"""The text model's forward: what it cuts under sequence parallelism, and when it asks for a level to be added."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy as np
import numpy.typing as npt
import paddle
from paddle import Tensor
from paddle.nn import Layer, LayerList

from paddle_vl_sp.carried import OfMask
from paddle_vl_sp.formers.contracts.ranks import as_rank
from paddle_vl_sp.formers.known import Clause, Family, original_of

BATCH, SEQ_LEN, NUM_LEVELS, NUM_LAYERS = 2, 8, 3, 4
STORED = {"recompute_granularity": None}
RECOMPUTE = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}

Build = Callable[[], Any]


class Doubling(Layer):  # type: ignore[misc]
    """Takes the place of a decoder layer."""

    attention_type = "full_attention"

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor]:
        return (hidden_states * 2.0,)


class Recorder:
    """Takes the place of `_deepstack_process`: adds 1 after the first layer, 2 after the second, and so on."""

    def __init__(self, mask: Tensor, levels: list[Tensor]) -> None:
        self.mask, self.levels = OfMask(mask), levels
        self.seen: list[npt.NDArray[Any]] = []
        self.why = ""

    def __call__(self, hidden_states: Tensor, visual_pos_masks: Tensor, visual_embeds: Tensor) -> Tensor:
        number = len(self.seen)
        self.seen.append(hidden_states.numpy())
        if not self.mask.is_for(visual_pos_masks):
            self.why = "another mask than it was given"
        elif number >= len(self.levels) or visual_embeds is not self.levels[number]:
            self.why = f"addition {number} is not of level {number} as it was given"
        return hidden_states + float(number + 1)


def asks_for_every_level(method: str, build: Build) -> Clause:
    """One rank, with recompute and without."""

    def broken(_: Family, module: Any) -> str:
        for settings in (STORED, RECOMPUTE):
            why = _run(original_of(module, method), build, 0, 1, settings)
            if why:
                return f"{why}{', full recompute' if settings is RECOMPUTE else ''}"
        return ""

    return Clause(f"{method} asks for each level to be added once, after its own layer", broken)


def cuts_the_flattened_batch(method: str, build: Build) -> Clause:
    """Sequence parallelism: rank r holds part r of the rows [B * S]."""

    def broken(_: Family, module: Any) -> str:
        for nranks in (2, 4):
            for rank in range(nranks):
                why = _run(original_of(module, method), build, rank, nranks, {"sequence_parallel": True})
                if why:
                    return f"{why}: rank {rank} of {nranks}"
        return ""

    return Clause(f"{method} cuts the rows of the flattened batch, in order, before the first layer", broken)


def _run(forward: Any, build: Build, rank: int, nranks: int, settings: dict[str, Any]) -> str:
    text = _emptied(build())
    rng = np.random.default_rng(0)
    embeds = rng.standard_normal((BATCH, SEQ_LEN, text.config.hidden_size)).astype("float32")
    mask = paddle.to_tensor(rng.random((BATCH, SEQ_LEN)) < 0.5)
    levels = [paddle.rand([int(mask.sum()), text.config.hidden_size]) for _ in range(NUM_LEVELS)]
    text._deepstack_process = recorder = Recorder(mask, levels)
    positions = paddle.arange(SEQ_LEN).reshape([1, 1, SEQ_LEN]).tile([3, BATCH, 1])
    given = paddle.to_tensor(embeds, stop_gradient=False)
    with as_rank(rank, nranks), mock.patch.multiple(text.config, **settings):
        out = forward(
            text,
            inputs_embeds=given * 1.0,
            position_ids=positions,
            visual_pos_masks=mask,
            deepstack_visual_embeds=levels,
            return_dict=True,
        )
    own = embeds if nranks == 1 else np.split(embeds.reshape(-1, embeds.shape[-1]), nranks)[rank]
    return recorder.why or _chain(own, recorder.seen, out.last_hidden_state.numpy())


def _emptied(model: Any) -> Any:
    """The text model, whose layers only double, without its last norm."""
    text = model.model.language_model
    text.layers, text.norm = LayerList([Doubling() for _ in range(NUM_LAYERS)]), paddle.nn.Identity()
    text.train()
    return text


def _chain(hidden: npt.NDArray[Any], seen: list[npt.NDArray[Any]], out: npt.NDArray[Any]) -> str:
    if len(seen) != NUM_LEVELS:
        return f"{len(seen)} levels of {NUM_LEVELS} are added"
    for number in range(NUM_LAYERS):
        hidden = hidden * np.float32(2)
        if number < NUM_LEVELS:
            if not np.array_equal(seen[number], hidden):
                return f"level {number} is added to other rows than layer {number} returned"
            hidden = hidden + np.float32(number + 1)
    return "" if np.array_equal(out, hidden) else "what is added does not go on to the next layer"
