"""Plans and row functions on one device against the slow answers, as cases with names."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import paddle

from paddle_vl_sp.cli import slow
from paddle_vl_sp.layout import SeqLayout
from paddle_vl_sp.plan import VisualPlan, plan_visual
from paddle_vl_sp.rows import add_rows, replace_rows

IMAGE, VIDEO, TEXT = 151655, 151656, 7
BATCH, HIDDEN = 2, 8
DTYPES = ("float32", "float64", "float16", "bfloat16")
CUTS: dict[str, dict[str, Any]] = {
    "whole": {"seq_len": 16},
    "sp 2": {"seq_len": 16, "sp_size": 2},
    "sp 4": {"seq_len": 24, "sp_size": 4},
    "sp 3, remainder": {"seq_len": 16, "sp_size": 3, "remainder": "front"},
    "cp 2 zigzag": {"seq_len": 16, "cp_size": 2},
    "cp 2 contiguous": {"seq_len": 16, "cp_size": 2, "cp_mode": "contiguous"},
    "cp 2 zigzag x sp 2": {"seq_len": 24, "cp_size": 2, "sp_size": 2},
    "packed, cp 2 x sp 2": {"seq_len": 24, "cp_size": 2, "sp_size": 2, "cu_seqlens": (0, 4, 8, 24)},
}
QUICK = ("cp 2 zigzag x sp 2",)


@dataclass(frozen=True)
class Case:
    name: str
    run: Callable[[], None]

    def failure(self) -> str:
        """Why it fails; empty where it does not. Whatever is raised is the finding."""
        try:
            self.run()
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return ""


def local_cases(device: str, cuts: Iterable[str] = tuple(CUTS)) -> Iterator[Case]:
    """Every cut with every form of a plan, and every dtype with both row functions."""
    for cut in cuts:
        for first in (True, False):
            order = "[S, B, H]" if first else "[B, S, H]"
            yield Case(f"{device}: plans of {cut}, {order}", partial(_on, device, _hold_plans, cut, first))
            for dtype in DTYPES:
                name = f"{device}: rows of {cut}, {order}, {dtype}"
                yield Case(name, partial(_on, device, _hold_rows, cut, first, dtype))


def _on(device: str, hold: Callable[..., None], *arguments: Any) -> None:
    """hold(device, ...) with that device as the one where tensors are made."""
    before = paddle.device.get_device()
    paddle.set_device(device)
    try:
        hold(device, *arguments)
    finally:
        paddle.set_device(before)


def layouts_of(cut: str) -> list[SeqLayout]:
    """Of every rank."""
    rule = CUTS[cut]
    cp_size, sp_size = rule.get("cp_size", 1), rule.get("sp_size", 1)
    return [SeqLayout(**rule, cp_rank=cp, sp_rank=sp) for cp in range(cp_size) for sp in range(sp_size)]


def visual_of(layout: SeqLayout) -> slow.Array:
    """A mask [B, S]: runs and single tokens, one sample without any."""
    samples = 1 if layout.cu_seqlens is not None else BATCH + 1
    mask = np.random.default_rng(layout.seq_len).random((samples, layout.seq_len)) < 0.4
    mask[:, 2:5] = True
    if samples > 1:
        mask[1] = False
    return mask


def equal(got: Any, expected: Any, what: str) -> None:
    """Raises, naming the first place that differs."""
    got, expected = np.asarray(got), np.asarray(expected)
    if got.shape != expected.shape:
        raise ValueError(f"{what} has shape {list(got.shape)}, expected {list(expected.shape)}")
    differing = np.argwhere(got != expected)
    if differing.size:
        place = tuple(differing[0].tolist())
        raise ValueError(f"{what} is {got[place]} at {list(place)}, expected {expected[place]}")


def _hold_plans(device: str, cut: str, sequence_first: bool) -> None:
    """Of every rank: from ids and from a mask, on the host and on the device, exact and padded."""
    for rank, layout in enumerate(layouts_of(cut)):
        visual = visual_of(layout)
        update, gather = slow.pairs(visual, slow.positions(layout), sequence_first)
        for name, plan in _all_forms(device, visual, layout, sequence_first):
            used = len(update)
            for kind, indices, expected in (
                ("rows", plan.update_indices, update),
                ("features", plan.gather_indices, gather),
            ):
                found = np.asarray(indices)
                equal(found[:used], expected, f"{kind} of rank {rank}, {name},")
                equal(found[used:], np.full(len(found) - used, -1), f"{kind} of rank {rank}, {name}, the rest")
            plan.check()


def _all_forms(device: str, visual: slow.Array, layout: SeqLayout, first: bool) -> Iterator[tuple[str, VisualPlan]]:
    kinds = np.where(np.arange(visual.size).reshape(visual.shape) % 2, IMAGE, VIDEO)
    ids = np.where(visual, kinds, TEXT)
    for source, tokens, wanted in (("mask", visual, None), ("ids", ids, (IMAGE, VIDEO))):
        for where in ("host", device):
            placed = tokens if where == "host" else paddle.to_tensor(tokens, place=device)
            for padded in (False, True):
                plan = plan_visual(
                    placed,
                    wanted,
                    layout,
                    sequence_first=first,
                    num_features=int(visual.sum()),
                    padded=padded,
                )
                yield f"{source} on {where}{', padded' if padded else ''}", plan


def _hold_rows(device: str, cut: str, sequence_first: bool, dtype: str) -> None:
    """Both row functions, on a copy and in place, with gradients; movement is exact and a sum rounds once."""
    for rank, layout in enumerate(layouts_of(cut)):
        visual = visual_of(layout)
        pairs = slow.pairs(visual, slow.positions(layout), sequence_first)
        plan = plan_visual(paddle.to_tensor(visual, place=device), None, layout, sequence_first=sequence_first)
        drawn = [
            _drawn(shape, dtype, device, seed) for seed, shape in enumerate((plan.row_shape, (int(visual.sum()),)))
        ]
        for name in ("replace_rows", "add_rows", "add_rows in place"):
            _hold_one(f"{name} of rank {rank}", name, drawn, plan, pairs, dtype)


def _hold_one(
    what: str, name: str, drawn: list[Any], plan: VisualPlan, pairs: tuple[list[int], list[int]], dtype: str
) -> None:
    hidden, features = (x.detach() for x in drawn)
    hidden.stop_gradient = features.stop_gradient = False
    made = hidden * 1  # what an operation made may be written in place
    if name == "replace_rows":
        out = replace_rows(made, features, plan)
    else:
        out = add_rows(made, features, plan, inplace=name.endswith("place"))
    wide = "float64" if dtype == "float64" else "float32"
    numbers = [x.astype(wide).numpy() for x in drawn]
    adds = name != "replace_rows"
    expected = slow.written(numbers[0], numbers[1], *pairs, adds)
    equal(_wide(out, wide), _rounded(expected, dtype, wide), what)
    out_grad = _drawn(plan.row_shape, dtype, paddle.device.get_device(), seed=2)
    feature_grad, hidden_grad = paddle.grad([out], [features, hidden], [out_grad])
    seen = out_grad.astype(wide).numpy()
    equal(
        _wide(feature_grad, wide), slow.feature_gradient(seen, len(numbers[1]), *pairs), f"features' gradient, {what}"
    )
    if not adds:
        seen = slow.written(seen, np.zeros_like(numbers[1]), *pairs, adds)
    equal(_wide(hidden_grad, wide), seen, f"hidden states' gradient, {what}")


def _drawn(leading: tuple[int, ...], dtype: str, device: str, seed: int) -> Any:
    numbers = np.random.default_rng(seed).standard_normal((*leading, HIDDEN))
    return paddle.to_tensor(numbers, place=device).astype(dtype)


def _wide(x: Any, wide: str) -> slow.Array:
    numbers: slow.Array = x.astype(wide).numpy()
    return numbers


def _rounded(numbers: slow.Array, dtype: str, wide: str) -> slow.Array:
    return _wide(paddle.to_tensor(numbers, place=paddle.CPUPlace()).astype(dtype), wide)
