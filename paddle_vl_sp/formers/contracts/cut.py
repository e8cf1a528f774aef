"""A text-only model on one rank: left alone it is PaddleFormers' own, and a cut of its batch reaches all its layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import paddle

from paddle_vl_sp.attention import ContextParallel
from paddle_vl_sp.formers import tiny
from paddle_vl_sp.formers.changes import Change, undo_changes
from paddle_vl_sp.formers.context import forward, install
from paddle_vl_sp.formers.context.step import Step, step_of
from paddle_vl_sp.formers.contracts.whole import Batch, difference, ours_in_place, training_step
from paddle_vl_sp.formers.known import Clause, Family, one_line
from paddle_vl_sp.testing import FakeGroup

ROUNDING = 1e-3  # of fp32 in the worst conditioned gradient; an attention that does not see the cut is 1e-1 off
SEQ_LEN = 19


def equals_ours_on_text(build: Callable[[], Any]) -> Clause:
    """Loss and every gradient where nothing is cut, for plain text, given positions, padding: bit for bit."""

    def broken(family: Family, module: Any) -> str:
        model = build()
        for name, batch in _batches(None):
            wanted = training_step(model, batch)
            if isinstance(wanted, Exception):
                return f"{name}: it fails by itself, {one_line(wanted)}"
            with ours_in_place(family, module):
                why = difference(wanted, training_step(model, batch))
            if why:
                return f"{name}: {why}"
        return ""

    return Clause(f"{build.__name__}: loss and gradients of text are ours", broken)


def sees_the_cut(build: Callable[[], Any], frames_apart: bool | None = None) -> Clause:
    """A batch that is shared by one rank alone: every layer's attention is asked to cross, the criterion for the mean
    over all ranks, and the step is the same.

    frames_apart  of the videos of a vision-language model; None: a model of text
    """

    def broken(family: Family, module: Any) -> str:
        model = build()
        seen: dict[str, dict[str, Any]] = {}
        for name, batch in _batches(frames_apart):
            wanted = training_step(model, batch)
            if isinstance(wanted, Exception):
                return f"{name}: it fails by itself, {one_line(wanted)}"
            seen[name] = wanted
            with ours_in_place(family, module, is_cut=True), _one_rank_shares() as steps:
                why = difference(wanted, training_step(model, batch), ROUNDING)
            if why:
                return f"{name}: {why}"
            text = getattr(model.model, "language_model", model.model)
            num_seen, num_layers = len(steps[-1].cut.seen_by), len(text.layers)
            if num_seen != num_layers:
                return f"{name}: the cut reaches {num_seen} of {num_layers} layers"
        reads_positions = difference(seen["text"], seen["given positions"], ROUNDING)
        return "" if reads_positions else "positions that it is given change nothing"

    return Clause(f"{build.__name__}: a cut of its batch reaches every layer", broken)


def _batches(frames_apart: bool | None) -> Iterator[tuple[str, Batch]]:
    batch = tiny.draw_batch([[], []], SEQ_LEN)
    shape = batch["input_ids"].shape
    axes = [] if frames_apart is None else [3]
    yield "text", batch
    yield "given positions", {**batch, "position_ids": (3 * paddle.arange(shape[1])).expand([*axes, *shape])}
    if frames_apart is not None:
        yield "images", tiny.draw_batch([["image"], ["image", "image"]], 64, frames_apart=frames_apart)
        yield "videos", tiny.draw_batch([["video"], ["video"]], 64, frames_apart=frames_apart)
    mask, labels = paddle.ones(shape), batch["labels"].clone()
    mask[:, -4:], labels[:, -4:] = 0, -100
    yield "padding", {**batch, "attention_mask": mask, "labels": labels}


@contextmanager
def _one_rank_shares() -> Iterator[list[Step]]:
    """Context parallelism over a group of one, which else is nothing to cut; the steps it makes."""
    setting = ContextParallel("gather", group=FakeGroup(0, 1))
    steps: list[Step] = []
    made: list[Change] = []

    def kept(*args: Any) -> Step:
        steps.append(step_of(*args))
        return steps[-1]

    try:
        install.install(setting, made)
        with (
            mock.patch.object(forward, "context_parallel", return_value=setting),
            mock.patch.object(forward, "step_of", kept),
        ):
            yield steps
    finally:
        undo_changes(made)
