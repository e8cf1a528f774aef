"""Batches that were cut before the model: put together again, so that one way cuts them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from paddle import Tensor

from paddle_vl_sp.attention import ContextParallel
from paddle_vl_sp.comm.agree import agree_on
from paddle_vl_sp.formers.context.attention import INDICES
from paddle_vl_sp.formers.context.bounds import boundaries
from paddle_vl_sp.formers.context.step import choose
from paddle_vl_sp.layout import SeqLayout
from paddle_vl_sp.sequence.join import unshard

CUT = ("input_ids", "labels", "position_ids", "loss_mask")


def put_together(setting: ContextParallel, config: Any, given: Mapping[str, Any]) -> dict[str, Tensor]:
    """The arrays of the whole batch; integers alone travel, a few bytes for each position."""
    group, error, layout = setting.ranks(), None, None
    try:
        layout = _layout(setting, config, given)
    except ValueError as raised:
        error = raised
    shapes = agree_on(given["input_ids"].shape, error, group)
    if (shapes != shapes[0]).any():
        raise ValueError(
            f"ids that are cut already must have one shape on every rank, got {shapes.tolist()}: pad, then cut"
        )
    assert layout is not None  # else all ranks have raised
    present = [name for name in CUT if given.get(name) is not None]
    return {name: unshard(given[name], layout, group, axis=-1) for name in present}


def _layout(setting: ContextParallel, config: Any, given: Mapping[str, Any]) -> SeqLayout:
    """The cut that these ids are of."""
    rows, local = given["input_ids"].shape
    length, indices = local * setting.ranks().nranks, given.get(INDICES)
    positions = given.get("position_ids")
    if positions is None or positions.shape[-1] != local:
        got = "none" if positions is None else list(positions.shape)
        raise ValueError(
            f"ids that are cut already need the position_ids of their {local} places, got {got}: compute them from the "
            "whole ids, then cut both"
        )
    if given.get("attention_mask") is not None:
        raise ValueError(
            "ids that are cut already take no attention_mask: leave it out, and pad behind with labels -100"
        )
    bounds = None
    if indices is not None:
        if list(indices.shape) != [rows, 1, length, 1] or rows != 1:
            raise ValueError(
                f"packed ids that are cut already need B = 1 and {INDICES} of the whole row, [1, 1, {length}, 1], got "
                f"{list(indices.shape)} with B = {rows}"
            )
        bounds = boundaries(indices.numpy(), length)
    layout = choose(setting, config, rows, length, bounds).layout(length, bounds)
    if layout.local_len != local or layout.seq_len != length:
        raise ValueError(
            f"ids of {local} places on each of {setting.ranks().nranks} ranks are no cut that this attention makes, of "
            f"{layout.local_len} places: pad the batch to what choose(...).multiple() says, then cut it"
        )
    return layout
