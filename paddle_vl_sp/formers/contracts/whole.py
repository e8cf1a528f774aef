"""A whole model on one rank: a training step by our methods is PaddleFormers' own, bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import paddle

from paddle_vl_sp.formers import tiny
from paddle_vl_sp.formers.changes import Change, replace, undo_changes
from paddle_vl_sp.formers.known import Clause, Family, one_line

Batch = dict[str, Any]
Step = dict[str, Any]  # name: loss or gradient


SAMPLES: dict[str, list[list[str]]] = {  # of each batch
    "images": [["image", "image"], ["image"]],
    "videos": [["video"], ["video", "video"]],
    "text": [[], []],
    "images and videos": [["image", "video"], ["video"], ["image"]],
}


def equals_ours(build: Callable[[], Any], frames_apart: bool = True, has_videos: bool = True) -> Clause:
    """Loss and every gradient, for images, videos, both, text, given positions, padding.

    On images and videos in one batch PaddleFormers may fail: there ours do more.
    """

    def broken(family: Family, module: Any) -> str:
        model = build()
        for name, batch in _batches(frames_apart, has_videos):
            wanted = training_step(model, batch)
            if isinstance(wanted, Exception):
                if name != "images and videos":
                    return f"{name}: it fails by itself, {one_line(wanted)}"
                continue
            with ours_in_place(family, module):
                got = training_step(model, batch)
            why = difference(wanted, got)
            if why:
                return f"{name}: {why}"
        return ""

    return Clause(f"{build.__name__}: loss and gradients are ours", broken)


def fails_on_videos(build: Callable[[], Any]) -> Clause:
    """Ours refuse them for that reason."""

    def broken(_: Family, __: Any) -> str:
        batch = tiny.draw_batch(SAMPLES["videos"])
        return "" if isinstance(training_step(build(), batch), Exception) else "it trains on them"

    return Clause(f"{build.__name__}: it fails on videos", broken)


def _batches(frames_apart: bool, has_videos: bool) -> Iterator[tuple[str, Batch]]:
    for seed, (name, samples) in enumerate(SAMPLES.items()):
        if has_videos or "videos" not in name:
            yield name, tiny.draw_batch(samples, seed=seed, frames_apart=frames_apart)
    batch = tiny.draw_batch(SAMPLES["images"], frames_apart=frames_apart)
    shape = batch["input_ids"].shape
    yield "given positions", {**batch, "position_ids": paddle.arange(shape[1]).expand([3, *shape])}
    padding = paddle.ones_like(batch["input_ids"])
    padding[:, -8:] = 0
    yield "padding", {**batch, "attention_mask": padding}


@contextmanager
def ours_in_place(family: Family, module: Any, is_cut: bool = False) -> Iterator[None]:
    """All methods of the family replaced, known or not."""
    made: list[Change] = []
    try:
        for method in family.methods(is_cut=is_cut):
            owner, _, name = method.name.partition(".")
            replacement = replace(getattr(module, owner), name, method.make)
            if replacement is not None:
                made.append(replacement)
        yield
    finally:
        undo_changes(made)


def training_step(model: Any, batch: Batch) -> Step | Exception:
    """Or how it fails."""
    model.clear_gradients(set_to_zero=False)
    paddle.seed(0)
    try:
        out = model(**{key: value.clone() for key, value in batch.items()})
        loss = out[0] if isinstance(out, tuple) else out.loss
        loss.backward()
    except Exception as error:  # whatever it is: the caller decides what it means
        return error
    grads = {name: p.grad.numpy() for name, p in model.named_parameters() if p.grad is not None}
    return {"the loss": loss.numpy(), **grads}


def difference(wanted: Step, got: Step | Exception, rounding: float = 0.0) -> str:
    """ "" where there is none; rounding: how far apart values may be, relative to their size."""
    if isinstance(got, Exception):
        return f"ours raise {one_line(got)}"
    if set(wanted) != set(got):
        return f"gradients of other parameters, such as {min(set(wanted) ^ set(got))}"
    different = [name for name, value in wanted.items() if not _is_near(value, got[name], rounding)]
    return f"{len(different)} of {len(wanted)} values differ, such as {different[0]}" if different else ""


def _is_near(wanted: Any, got: Any, rounding: float) -> bool:
    if not rounding:
        return np.array_equal(wanted, got)
    return bool(np.linalg.norm(got - wanted) <= rounding * np.linalg.norm(wanted))
