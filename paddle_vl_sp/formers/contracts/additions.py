"""`_deepstack_process`: adds one level's features to the rows of this rank."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import paddle

from paddle_vl_sp.formers.contracts.ranks import as_rank
from paddle_vl_sp.formers.known import Clause, Family, original_of

Array = npt.NDArray[Any]

WIDTH, SEQ_LEN = 6, 12
LAYOUTS = ((1, 1), (3, 1), (1, 2), (2, 2), (3, 4), (2, 3))  # (B, ranks)


def adds_the_rows_of_its_rank(method: str, sequence_first: bool) -> Clause:
    """sequence_first: under sequence parallelism hidden states are [S / n, B, H], else a cut of [B * S, H]."""

    def broken(family: Family, module: Any) -> str:
        add = original_of(module, method)
        for batch, nranks in LAYOUTS:
            for mask in _masks(batch):
                for rank in range(nranks):
                    why = _of_one_rank(add, mask, rank, nranks, sequence_first)
                    if why:
                        return f"{why}: rank {rank} of {nranks}, {batch} samples, {int(mask.sum())} visual tokens"
        return _of_columns(add)

    return Clause(f"{method} adds the rows of its rank", broken)


def _masks(batch: int) -> Iterator[Array]:
    """[B, S]: runs, nothing, everything, the last rank's share alone."""
    runs = np.zeros((batch, SEQ_LEN), dtype=bool)
    for sample in range(batch):
        runs[sample, 1 + sample : 6 + 2 * sample] = True
    last = np.zeros_like(runs)
    last[-1, -2:] = True
    yield from (runs, np.zeros_like(runs), np.ones_like(runs), last)


def _of_one_rank(add: Any, mask: Array, rank: int, nranks: int, sequence_first: bool) -> str:
    rng = np.random.default_rng(0)
    hidden = rng.standard_normal((*mask.shape, WIDTH)).astype("float32")
    features = rng.standard_normal((int(mask.sum()), WIDTH)).astype("float32")
    wanted, taken = hidden.copy(), np.full(mask.shape, -1)
    wanted[mask] += features
    taken[mask] = np.arange(len(features))

    def own(array: Array) -> Array:
        """This rank's part, as the layer holds it."""
        if nranks == 1:
            return array
        if not sequence_first:
            return np.split(array.reshape(-1, *array.shape[2:]), nranks)[rank]
        return np.ascontiguousarray(np.split(array, nranks, axis=1)[rank].swapaxes(0, 1))

    start = paddle.to_tensor(own(hidden), stop_gradient=False)
    level = paddle.to_tensor(features, stop_gradient=False)
    layer = SimpleNamespace(config=SimpleNamespace(sequence_parallel=nranks > 1))
    given = start * 1.0
    with as_rank(rank, nranks):
        out = add(layer, hidden_states=given, visual_pos_masks=paddle.to_tensor(mask), visual_embeds=level)
    if list(out.shape) != list(start.shape) or not np.array_equal(out.numpy(), own(wanted)):
        return "other hidden states"
    if not np.array_equal(given.numpy(), own(hidden)):
        return "writes into the hidden states that it is given"
    weights = rng.standard_normal(own(wanted).shape).astype("float32")
    (out * paddle.to_tensor(weights)).sum().backward()
    wanted_grad = np.zeros_like(features)
    rows = own(taken).reshape(-1)
    wanted_grad[rows[rows >= 0]] = weights.reshape(-1, WIDTH)[rows >= 0]
    got = np.zeros_like(features) if level.grad is None else level.grad.numpy()
    if not np.array_equal(got, wanted_grad):
        return "another gradient of the features"
    is_whole = start.grad is not None and np.array_equal(start.grad.numpy(), weights)
    return "" if is_whole else "another gradient of the hidden states"


def _of_columns(add: Any) -> str:
    """Hidden states [B, S, H / 2] of a rank that holds columns: ours leave them to the original."""
    mask = next(_masks(2))
    rng = np.random.default_rng(1)
    hidden = rng.standard_normal((*mask.shape, WIDTH // 2)).astype("float32")
    features = rng.standard_normal((int(mask.sum()), WIDTH)).astype("float32")
    layer = SimpleNamespace(config=SimpleNamespace(sequence_parallel=False))
    for rank in range(2):
        wanted = hidden.copy()
        wanted[mask] += np.split(features, 2, axis=1)[rank]
        with as_rank(rank, 2):
            out = add(layer, *map(paddle.to_tensor, (hidden, mask, features)))
        if not np.array_equal(out.numpy(), wanted):
            return f"other hidden states: columns of rank {rank} of 2"
    return ""
