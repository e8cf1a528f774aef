"""PaddleFleet's GPTEmbedding: what ours, a subclass of it, relies on, on every rank of a mocked group."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import paddle
from paddle import Tensor

from paddle_vl_sp.carried import GATHER, LEVELS, MASK, UPDATE
from paddle_vl_sp.formers.contracts.fleet_parts import IDS, WIDTH, as_fleet_rank, built_embedding
from paddle_vl_sp.formers.known import Clause, Family, below_ours, one_line

Array = npt.NDArray[Any]

NUM_LEVELS, SEQ_LEN = 2, 12
LAYOUTS = ((1, 1), (3, 1), (1, 2), (3, 2), (2, 4))  # (B, ranks)
ATTRIBUTES = ("config", "embedding", "sequence_parallel", "multimodal_embedding")


def merges_as_ours(name: str) -> Clause:
    """Text alone is this rank's rows, and with features it returns what ours does: rows, mask, levels, gradients."""

    def broken(family: Family, module: Any) -> str:
        base = below_ours(getattr(module, name))
        ours = family.swapped[0].make(base)
        for batch, nranks in LAYOUTS:
            for rank in range(nranks):
                with as_fleet_rank(base, rank, nranks):
                    why = _on_one_rank(base, ours, batch, rank, nranks)
                if why:
                    return f"{why}: rank {rank} of {nranks}, {batch} samples"
        return ""

    return Clause(f"{name} merges, cuts and hands on as ours", broken)


def _on_one_rank(base: type, ours: type, batch: int, rank: int, nranks: int) -> str:
    theirs, mine = (built_embedding(cls, rank, nranks) for cls in (base, ours))
    missing = [name for name in ATTRIBUTES if not hasattr(theirs, name)]
    if missing:
        return f"it has no {', '.join(missing)}"
    why = _of_text(theirs, batch, rank, nranks)
    if why:
        return f"{why}, text alone"
    for kinds, mask in _batches(batch):
        why = _of_features(theirs, mine, kinds, mask, is_trained=nranks == 1)
        if why:
            return f"{why}, {' and '.join(kinds)}, {int((mask > 0).sum())} visual tokens"
    return ""


def _of_text(theirs: Any, batch: int, rank: int, nranks: int) -> str:
    """Ours lets it embed the whole sequence and cut it, and then writes into these rows."""
    ids = np.arange(batch * SEQ_LEN).reshape(batch, SEQ_LEN) % 7 + 8
    out = theirs.forward({"input_ids": paddle.to_tensor(ids), "labels": None}, None, None)
    rows = theirs.embedding.embed_tokens.weight.numpy()[ids]  # [B, S, H]
    own = rows if nranks == 1 else np.split(rows, nranks, axis=1)[rank]
    wanted = own if nranks == 1 else own.swapaxes(0, 1)  # [S / n, B, H]
    hidden = out["hidden_states"]
    if list(hidden.shape) != list(wanted.shape):
        return f"hidden states {list(hidden.shape)}, {list(wanted.shape)} are wanted"
    if not np.array_equal(hidden.numpy(), wanted):
        return "hidden states that are not the rows of its rank"
    extra = [key for key in (MASK, LEVELS, UPDATE, GATHER) if out.get(key) is not None]
    return f"it hands on {', '.join(extra)}" if extra else ""


def _batches(batch: int) -> Iterator[tuple[tuple[str, ...], Array]]:
    """The kinds and where they are [B, S], 1 for an image token and 2 for a video token: runs, all, the last share."""
    runs = np.zeros((batch, SEQ_LEN), dtype=int)
    for sample in range(batch):
        runs[sample, 1 + sample : 6 + 2 * sample] = 1
    last = np.zeros_like(runs)
    last[-1, -2:] = 1
    for mask in (runs, np.ones_like(runs), last):
        yield ("image",), mask
        yield ("video",), 2 * mask
    both = runs.copy()
    both[:, -3:-1], both[0, 2] = 2, 2
    yield ("image", "video"), both


def _of_features(theirs: Any, mine: Any, kinds: tuple[str, ...], mask: Array, is_trained: bool) -> str:
    for with_levels in (True, False):
        wanted, inputs = _one_forward(theirs, kinds, mask, with_levels)
        if isinstance(wanted, Exception):
            if len(kinds) > 1:
                continue  # there ours do more
            return f"it fails by itself, {one_line(wanted)}"
        got, ours_inputs = _one_forward(mine, kinds, mask, with_levels)
        why = _difference(wanted, got)
        if not why and is_trained and not isinstance(got, Exception):
            why = _of_gradients(wanted, got, [*inputs, *_weights(theirs)], [*ours_inputs, *_weights(mine)])
        if why:
            return f"{why}{'' if with_levels else ', no levels'}"
    return ""


def _weights(embedding: Any) -> list[Tensor]:
    return [embedding.embedding.embed_tokens.weight]


def _one_forward(embedding: Any, kinds: tuple[str, ...], mask: Array, with_levels: bool) -> tuple[Any, list[Tensor]]:
    """What it returns, or how it fails, and the features. Of two kinds, levels have a row for each token of both."""
    rng = np.random.default_rng(0)
    ids = np.where(mask == 0, np.arange(mask.size).reshape(mask.shape) % 7 + 8, 0)
    given: dict[str, Any] = {"labels": None}
    inputs: list[Tensor] = []
    for place, kind in enumerate(("image", "video"), 1):
        ids[mask == place] = IDS[kind]
        if kind not in kinds:
            continue
        rows = [int((mask == place).sum())] + [int((mask > 0).sum())] * NUM_LEVELS * with_levels
        features = [
            paddle.to_tensor(rng.standard_normal((n, WIDTH)).astype("float32"), stop_gradient=False) for n in rows
        ]
        given |= {f"{kind}_embeds": features[0]} | ({f"deepstack_{kind}_embeds": features[1:]} if with_levels else {})
        inputs += features
    try:
        return embedding.forward({"input_ids": paddle.to_tensor(ids), **given}, None, None), inputs
    except Exception as error:  # the caller decides what it means
        return error, inputs


def _difference(wanted: dict[str, Any], got: Any) -> str:
    if isinstance(got, Exception):
        return f"ours raise {one_line(got)}"
    added = {UPDATE, GATHER} & set(got) - set(wanted)
    if set(got) - added != set(wanted):
        return f"other keys, such as {min(set(got) - added ^ set(wanted))}"
    for key in (key for key in wanted if isinstance(wanted[key], Tensor | list)):
        ours, theirs = (value if isinstance(value, list) else [value] for value in (got[key], wanted[key]))
        if len(ours) != len(theirs) or not all(map(_alike, ours, theirs)):
            return f"other {key}"
    return ""


def _alike(ours: Any, theirs: Any) -> bool:
    return (
        ours.dtype == theirs.dtype
        and list(ours.shape) == list(theirs.shape)
        and np.array_equal(ours.numpy(), theirs.numpy())
    )


def _of_gradients(wanted: Any, got: Any, inputs: list[Tensor], ours_inputs: list[Tensor]) -> str:
    for out in (wanted, got):
        hidden = out["hidden_states"]
        loss = (hidden * paddle.arange(hidden.size, dtype="float32").reshape(hidden.shape)).sum()
        for number, level in enumerate(out.get(LEVELS) or [], 2):
            loss = loss + number * (level**2).sum()
        loss.backward()
    grads = [[None if x.grad is None else x.grad.numpy() for x in both] for both in (inputs, ours_inputs)]
    for x in inputs + ours_inputs:
        x.clear_gradient(set_to_zero=False)
    for theirs, ours in zip(*grads, strict=True):
        if (theirs is None) != (ours is None) or not (theirs is None or np.array_equal(theirs, ours)):
            return "other gradients"
    return ""
