"""The runs that the demonstration compares."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import paddle
import paddle.distributed as dist

from demo_parts.counting import syncs_and_searches
from paddle_vl_sp.formers import PlanningCollate, apply_to_qwen3_vl, tiny
from paddle_vl_sp.formers.norms import mark_head_norms
from paddle_vl_sp.testing.tensor_parallel import enable_tensor_parallel_on_cpu, init_tensor_parallel

SEQ_LEN = 96
BATCHES = (  # images, several in a sample, videos, and one sample without
    [["image"], ["image"]],
    [["image", "image"], ["image"], [], ["image", "image", "image"]],
    [["video"], ["video", "video"]],
    [["image", "image"], ["image"]],
)
LEARNING_RATE = 1e-3
RUNS = ("without SP", "upstream", "patched")


def batches() -> list[dict[str, Any]]:
    return [tiny.draw_batch(samples, SEQ_LEN, seed=i) for i, samples in enumerate(BATCHES)]


def example() -> npt.NDArray[np.bool_]:
    """Where the visual tokens of a batch are, [B, S]: several images in a sample, one sample without."""
    return np.isin(batches()[1]["input_ids"].numpy(), (tiny.IMAGE, tiny.VIDEO))


def train(model: Any, steps: int, group: Any = None) -> Iterator[tuple[float, dict[str, Any]]]:
    """Loss and gradients of every step; under tensor parallelism marked gradients are summed, as the trainer does."""
    optimizer = paddle.optimizer.AdamW(LEARNING_RATE, parameters=model.parameters())
    for batch in itertools.islice(itertools.cycle(batches()), steps):
        loss = model(**batch, position_ids=tiny.positions(model, batch)).loss
        loss.backward()
        if group is not None:
            tiny.sum_marked_gradients(model, group)
        gradients = tiny.gradients_of(model)
        optimizer.step()
        optimizer.clear_grad(set_to_zero=False)
        yield float(loss), gradients


def on_one_rank(steps: int) -> Iterator[bool]:
    """Step by step: whether the loss and every gradient are the same bits upstream and patched."""
    upstream = train(tiny.tiny_qwen3_vl(), steps)
    with apply_to_qwen3_vl():
        patched = train(tiny.tiny_qwen3_vl(), steps)
    for _ in range(steps):
        wanted = next(upstream)
        with apply_to_qwen3_vl():
            got = next(patched)
        yield wanted[0] == got[0] and all(_same_bits(wanted[1][name], got[1][name]) for name in wanted[1])


def on_ranks(nranks: int, steps: int, progress: str) -> dict[str, Any]:
    """On each rank: losses, worst gradient error of the tower and drift of its replicas, per run and step; counts."""
    enable_tensor_parallel_on_cpu()
    group = init_tensor_parallel(nranks)
    truth = tiny.tiny_qwen3_vl()
    weights = tiny.weights_of(truth)
    right = []
    for loss, gradients in train(truth, steps):
        right.append((loss, gradients))
        _report(progress, group, "the truth: without sequence parallelism")
    found: dict[str, Any] = {"without SP": {"loss": [loss for loss, _ in right]}}
    found["upstream"] = _against(right, nranks, group, weights, progress, "upstream")
    with apply_to_qwen3_vl():
        found["patched"] = _against(right, nranks, group, weights, progress, "patched")
    found["counts"] = _counts(nranks, group, weights)
    return found


def _model(nranks: int, group: Any, weights: dict[str, Any]) -> Any:
    model = tiny.tiny_qwen3_vl(**tiny.tensor_parallel(nranks, SEQ_LEN))
    tiny.load_weights(model, weights, group.rank, nranks)
    mark_head_norms(model)
    return model


def _against(
    right: list[tuple[float, dict[str, Any]]], nranks: int, group: Any, weights: dict[str, Any], progress: str, run: str
) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {"loss": [], "error": [], "drift": []}
    model = _model(nranks, group, weights)
    for (loss, got), (_, wanted) in zip(train(model, len(right), group), right, strict=True):
        tower = [name for name in wanted if "visual" in name]
        found["loss"].append(loss)
        found["error"].append(max(_error(got.get(name, 0 * wanted[name]), wanted[name]) for name in tower))
        found["drift"].append(_drift(model, group))
        _report(progress, group, f"{nranks} sequence-parallel ranks, {run}")
    return found


def _drift(model: Any, group: Any) -> float:
    """How far the towers of the ranks are apart, relative to the first's."""
    tower = paddle.concat([parameter.flatten() for parameter in model.visual.parameters()])
    towers: list[Any] = []
    dist.all_gather(towers, tower, group=group)
    return max(_error(other.numpy(), towers[0].numpy()) for other in towers)


def _counts(nranks: int, group: Any, weights: dict[str, Any]) -> dict[str, dict[str, int]]:
    """Per way of running, what one forward of a batch with several images a sample costs on this rank."""
    model, batch = _model(nranks, group, weights), batches()[1]
    positions = tiny.positions(model, batch)
    counts = {"upstream": syncs_and_searches(model, batch, positions)}
    planned = PlanningCollate(dict, (tiny.IMAGE, tiny.VIDEO), nranks, "flattened", tiny.MERGE)(batch)
    with apply_to_qwen3_vl():
        counts["patched"] = syncs_and_searches(model, batch, positions)
        counts["patched, planned by the loader"] = syncs_and_searches(model, planned, positions)
    return counts


def _report(progress: str, group: Any, doing: str) -> None:
    """A line a step, into a file."""
    if group.rank == 0:
        with Path(progress).open("a") as lines:
            lines.write(f"{doing}\n")


def _error(got: Any, wanted: Any) -> float:
    return float(np.linalg.norm(got - wanted) / max(np.linalg.norm(wanted), 1e-30))


def _same_bits(a: Any, b: Any) -> bool:
    return bool(a.dtype == b.dtype and a.tobytes() == b.tobytes())
