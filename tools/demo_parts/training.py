"""The runs that the demonstration compares."""

from __future__ import annotations

import itertools
import pickle
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import paddle
import paddle.distributed as dist

from demo_parts.counting import syncs_and_searches
from demo_parts.models import KINDS, PLAIN, Kind
from paddle_vl_sp.formers import PlanningCollate, apply_to_qwen3_vl, tiny
from paddle_vl_sp.testing import enable_tensor_parallel_on_cpu, init_tensor_parallel

SEQ_LEN = 96
BATCHES = (  # images, several in a sample, videos, and one sample without
    [["image"], ["image"]],
    [["image", "image"], ["image"], [], ["image", "image", "image"]],
    [["video"], ["video", "video"]],
    [["image", "image"], ["image"]],
)
LEARNING_RATE = 1e-3
RUNS = ("upstream", "patched")  # on ranks


@dataclass
class OneRank:
    """What one rank learned, step by step: the reference."""

    kind: str
    weights: dict[str, Any]  # at the start
    loss: list[float] = field(default_factory=list)
    tower: list[dict[str, Any]] = field(default_factory=list)  # the tower's gradients


def batches() -> list[dict[str, Any]]:
    """With positions by the plain class, since the default one has a token of the large vocabulary fixed."""
    by = tiny.tiny_qwen3_vl()
    drawn = [tiny.draw_batch(samples, SEQ_LEN, seed=i) for i, samples in enumerate(BATCHES)]
    return [batch | {"position_ids": tiny.positions(by, batch)} for batch in drawn]


def example() -> npt.NDArray[np.bool_]:
    """Where the visual tokens of a batch are, [B, S]: several images in a sample, one sample without."""
    ids = tiny.draw_batch(BATCHES[1], SEQ_LEN, seed=1)["input_ids"].numpy()
    return np.isin(ids, (tiny.IMAGE, tiny.VIDEO))


def train(model: Any, steps: int, group: Any = None) -> Iterator[tuple[float, dict[str, Any]]]:
    """Loss and gradients of every step; under tensor parallelism marked gradients are summed, as the trainer does."""
    optimizer = paddle.optimizer.AdamW(LEARNING_RATE, parameters=model.parameters())
    for batch in itertools.islice(itertools.cycle(batches()), steps):
        loss = model(**batch).loss
        loss.backward()
        if group is not None:
            tiny.sum_marked_gradients(model, group)
        gradients = tiny.gradients_of(model)
        optimizer.step()
        optimizer.clear_grad(set_to_zero=False)
        yield float(loss), gradients


def on_one_rank(kind: Kind, steps: int, learned: list[OneRank]) -> Iterator[bool]:
    """Step by step: whether the loss and every gradient are the same bits upstream and patched.

    `learned` gets what upstream learned.
    """
    model = kind.build()
    weights = kind.draw_weights(model)
    learned.append(OneRank(kind.name, weights))
    kind.load_weights(model, weights)
    with enable_tensor_parallel_on_cpu():
        upstream = train(model, steps)
        with apply_to_qwen3_vl():
            model = kind.build()
            kind.load_weights(model, weights)
            patched = train(model, steps)
        for _ in range(steps):
            wanted = next(upstream)
            with apply_to_qwen3_vl():
                got = next(patched)
            learned[0].loss.append(wanted[0])
            learned[0].tower.append({name: value for name, value in wanted[1].items() if kind.tower in name})
            yield wanted[0] == got[0] and all(_same_bits(wanted[1][name], got[1][name]) for name in wanted[1])


def on_ranks(nranks: int, reference: str, progress: str) -> dict[str, Any]:
    """On each rank: losses, errors of the tower's gradients and drift of its copies, per run and step; counts.

    reference   a file with the pickled OneRank
    """
    one: OneRank = pickle.loads(Path(reference).read_bytes())
    enable_tensor_parallel_on_cpu()
    group = init_tensor_parallel(nranks)
    found: dict[str, Any] = {"without SP": {"loss": one.loss}}
    found["upstream"] = _against(one, nranks, group, progress, "upstream")
    with apply_to_qwen3_vl():
        found["patched"] = _against(one, nranks, group, progress, "patched")
    found["counts"] = _counts(nranks, group)
    return found


def _against(one: OneRank, nranks: int, group: Any, progress: str, run: str) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {"loss": [], "error": [], "norm": [], "drift": []}
    kind = KINDS[one.kind]
    model = kind.on_rank(one.weights, group.rank, nranks, SEQ_LEN)
    for (loss, got), wanted in zip(train(model, len(one.loss), group), one.tower, strict=True):
        right = {name: kind.cut(name, value, group.rank, nranks) for name, value in wanted.items()}
        mine = {name: got.get(name, 0 * value) for name, value in right.items()}
        found["loss"].append(loss)
        found["error"].append(max(_error(mine[name], right[name]) for name in right))
        found["norm"].append(_error(_joined(mine), _joined(right)))
        found["drift"].append(_drift(kind, model, group))
        _report(progress, group, f"{nranks} sequence-parallel ranks, {run}")
    return found


def _drift(kind: Kind, model: Any, group: Any) -> float:
    """How far the ranks' copies of the tower, or of what they hold copies of, are apart, relative to the first's."""
    copies = [
        parameter.flatten()
        for name, parameter in model.named_parameters()
        if kind.tower in name and not getattr(parameter, "is_distributed", False)
    ]
    towers: list[Any] = []
    dist.all_gather(towers, paddle.concat(copies), group=group)
    return max(_error(other.numpy(), towers[0].numpy()) for other in towers)


def _counts(nranks: int, group: Any) -> dict[str, dict[str, int]]:
    """Per way of running, what one forward of the plain class costs on this rank, for several images a sample."""
    model = PLAIN.on_rank(tiny.weights_of(PLAIN.build()), group.rank, nranks, SEQ_LEN)
    batch = batches()[1]
    positions = batch.pop("position_ids")
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


def _joined(values: dict[str, Any]) -> Any:
    return np.concatenate([value.ravel() for value in values.values()])


def _error(got: Any, wanted: Any) -> float:
    return float(np.linalg.norm(got - wanted) / max(np.linalg.norm(wanted), 1e-30))


def _same_bits(a: Any, b: Any) -> bool:
    return bool(a.dtype == b.dtype and a.tobytes() == b.tobytes())
