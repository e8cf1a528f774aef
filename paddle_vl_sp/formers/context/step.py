"""One batch of one forward, cut: which positions this rank has, and every array that is cut with them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
from paddle import Tensor
from paddle.nn import Layer

from paddle_vl_sp.attention import ContextParallel
from paddle_vl_sp.attention.chosen import ChosenAttention
from paddle_vl_sp.carried import Handover
from paddle_vl_sp.comm.collectives import Group
from paddle_vl_sp.formers.context.attention import INDICES
from paddle_vl_sp.formers.context.bounds import boundaries
from paddle_vl_sp.formers.context.marker import Cut
from paddle_vl_sp.formers.context.setting import say_once
from paddle_vl_sp.formers.groups import require_tensor_parallel_group
from paddle_vl_sp.formers.known import OURS
from paddle_vl_sp.layout import SeqLayout
from paddle_vl_sp.sequence.batch import IGNORE, shard_batch
from paddle_vl_sp.sequence.padding import source_positions


@dataclass(frozen=True, eq=False)
class Step:
    """How this batch is cut over the ranks that share it."""

    chosen: ChosenAttention
    layout: SeqLayout  # of the padded sequence; this rank's share before a tensor-parallel cut
    tensor_cut: tuple[int, int]  # rank and size of that
    bounds: tuple[int, ...] | None  # of packed segments, before padding
    rows: int  # B of the batch; packed rows are joined to one
    length: int  # S of the batch
    num_layers: int  # whose attention must cross the ranks
    losses: list[Layer] = field(default_factory=list)  # the criteria that took the mean over all ranks

    @property
    def group(self) -> Group:
        return self.chosen.group

    @property
    def own_layout(self) -> SeqLayout:
        """With the tensor-parallel cut of sequence parallelism."""
        rank, size = self.tensor_cut
        return replace(self.layout, sp_rank=rank, sp_size=size) if size > 1 else self.layout

    @property
    def real(self) -> tuple[int, ...]:
        """The boundaries at which the layout pads, before padding."""
        return self.chosen.bounds_of_batch(self.length * (self.rows if self.bounds else 1), self.bounds)

    def joined(self, x: Tensor) -> Tensor:
        """[..., B, S] -> [..., 1, B * S] where packed rows are joined."""
        if self.bounds is None or self.rows == 1:
            return x
        return x.reshape([*x.shape[:-2], 1, self.rows * self.length])

    def own(self, x: Tensor, fill: float) -> Tensor:
        """[..., B, S] -> this rank's [..., B, S_local], or [..., 1, S_local] of joined rows."""
        if x.shape[-1] != self.length or x.shape[-2] not in (1, self.rows):
            raise ValueError(
                f"context parallelism cuts arrays [..., {self.rows}, {self.length}], as the ids are, got "
                f"{list(x.shape)}"
            )
        x = self.joined(x.expand([*x.shape[:-2], self.rows, self.length]))
        share: Tensor = shard_batch({"x": x}, self.layout, cu_seqlens=self.real, padding={"x": fill})["x"]
        return share

    def padded(self, ids: Tensor, fill: int) -> npt.NDArray[np.int64]:
        """The whole ids on the host, [B, S padded]: what plans are made of. One host sync."""
        rows = self.joined(ids).numpy()
        source = source_positions(np.asarray(self.real), self.layout)
        padded: npt.NDArray[np.int64] = np.where(source < 0, fill, rows[:, np.maximum(source, 0)])
        return padded

    @cached_property
    def cut(self) -> Cut:
        return Cut(self.chosen, self.layout, self.bounds)

    @cached_property
    def marker(self) -> Tensor:
        """What stands for the cut in the place of row indices."""
        return self.cut.marker()

    def require_use(self, model: Any, has_labels: bool) -> None:
        """After a forward: whether every layer's attention crossed the ranks, and the loss is that of all."""
        num_crossed = len(self.cut.seen_by)
        if num_crossed < self.num_layers:
            raise ValueError(
                f"context parallelism cut the batch of {type(model).__name__}, and the attention of {num_crossed} of "
                f"{self.num_layers} layers crossed the ranks: use PaddleFormers' or PaddleFleet's own attention in all"
            )
        if has_labels and not self.losses:
            raise ValueError(
                f"context parallelism cut the batch of {type(model).__name__}, and its loss is not that of "
                "PaddleFormers' CriterionLayer, so it is of this rank's tokens alone: use that, or leave labels out "
                "and call sequence_parallel_loss"
            )


STEP: Handover[Step] = Handover("context_parallel_step")


def step_of(setting: ContextParallel, config: Any, given: Mapping[str, Any]) -> Step:
    """Of a batch by its arguments; config: the text model's."""
    _refuse_config(config)
    _refuse_router_loss(given)
    _check_attention(config)
    ids, indices = given["input_ids"], given.get(INDICES)
    rows, length = ids.shape
    _check_mask(given.get("attention_mask"), indices, given.get("labels"), length)
    bounds = None
    if indices is not None:
        if indices.size != rows * length or indices.shape[0] != rows:
            raise ValueError(
                f"{INDICES} must be [{rows}, 1, {length}, 1] for context parallelism, got {list(indices.shape)}: pack "
                "with one causal mask for all heads"
            )
        rows_of_keys = indices.numpy().reshape(-1, length)
        bounds = boundaries(rows_of_keys, length)
        _check_labels(given.get("labels"), rows_of_keys > np.arange(length))
    chosen = choose(setting, config, rows, length, bounds)
    say_once(chosen)
    whole = rows * length if bounds else length
    rank, size = _sequence_parallel(config)
    layout = chosen.layout(whole, bounds, sp_rank=rank, sp_size=size)
    before = replace(layout, sp_rank=0, sp_size=1) if size > 1 else layout
    return Step(chosen, before, (rank, size), bounds, rows, length, config.num_hidden_layers)


def choose(
    setting: ContextParallel, config: Any, rows: int, length: int, bounds: tuple[int, ...] | None
) -> ChosenAttention:
    """For the heads of this model and this batch; packed rows are joined to one."""
    ranks = _tensor_parallel(config)
    return setting.choose(
        config.num_attention_heads // ranks,
        max(config.num_key_value_heads // ranks, 1),
        rows * length if bounds else length,
        head_size=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        batch=1 if bounds else rows,
    )


def own_labels(step: Step, labels: Tensor) -> Tensor:
    return step.own(labels, IGNORE)


def _check_attention(config: Any) -> None:
    """The plain classes take their attention from a table, in which ours stand for all that were there."""
    from paddleformers.nn.attention.interface import ALL_ATTENTION_FUNCTIONS

    name = getattr(config, "_attn_implementation", None)
    if name in ALL_ATTENTION_FUNCTIONS and not hasattr(ALL_ATTENTION_FUNCTIONS[name], OURS):
        raise ValueError(
            f"context parallelism knows nothing of the attention {name!r}, which is not of PaddleFormers: "
            "use eager, sdpa or flashmask"
        )


def _sequence_parallel(config: Any) -> tuple[int, int]:
    """This rank, and how many there are, in the tensor-parallel group where it cuts the sequence once more."""
    if not getattr(config, "sequence_parallel", False):
        return 0, 1
    if "linear_attention" in (getattr(config, "layer_types", None) or ()):
        raise ValueError(
            "context parallelism takes no sequence_parallel with linear attention, for which PaddleFormers joins the "
            "rows of the batch to one: turn sequence_parallel off"
        )
    group = require_tensor_parallel_group()
    return group.rank, group.nranks


def _tensor_parallel(config: Any) -> int:
    return int(getattr(config, "tensor_model_parallel_size", 1) or 1)


def _refuse_config(config: Any) -> None:
    refused = {
        "attention_dropout": "attention dropout",
        "num_nextn_predict_layers": "multi-token prediction",
        "output_router_logits": "loss of the router",
    }
    for name, what in refused.items():
        if getattr(config, name, None):
            raise ValueError(f"context parallelism takes no {what}, got {name}={getattr(config, name)}: turn it off")
    if getattr(config, "ignored_index", IGNORE) != IGNORE:
        raise ValueError(f"context parallelism ignores labels of {IGNORE}, got ignored_index={config.ignored_index}")
    if "sliding_attention" in (getattr(config, "layer_types", None) or ()):
        raise ValueError("context parallelism takes no sliding windows, and layer_types has sliding_attention")
    if (getattr(config, "pipeline_model_parallel_size", 1) or 1) > 1:
        raise ValueError(
            f"context parallelism with pipeline_model_parallel_size={config.pipeline_model_parallel_size}: the cut of "
            "a batch does not travel from stage to stage; use one stage"
        )
    if (getattr(config, "expert_model_parallel_size", 1) or 1) > 1 and _tensor_parallel(config) < 2:
        raise ValueError(
            f"context parallelism with expert_model_parallel_size={config.expert_model_parallel_size} and no tensor "
            "parallelism: PaddleFleet zeroes padding rows by whole ids there; use tensor parallelism with it"
        )


def _refuse_router_loss(given: Mapping[str, Any]) -> None:
    """It is made of means over all tokens, and no sum over the ranks."""
    if {**given, **given.get("kwargs", {})}.get("output_router_logits"):
        raise ValueError("context parallelism takes no loss of the router, got output_router_logits: leave it out")


def _check_mask(mask: Tensor | None, indices: Tensor | None, labels: Tensor | None, length: int) -> None:
    """Padding at the end is no matter to causal attention; anything else is."""
    if mask is None or indices is not None:
        return
    if mask.ndim != 2 or mask.shape[1] != length:
        raise ValueError(
            f"context parallelism takes an attention_mask [B, {length}], got {list(mask.shape)}: leave it out, or pack "
            f"and give {INDICES}"
        )
    kept = mask.astype("bool").numpy()
    if (kept[:, 1:] & ~kept[:, :-1]).any():
        raise ValueError(
            "context parallelism takes padding at the end of a row only, and attention_mask has some in front: pad on "
            "the right"
        )
    _check_labels(labels, kept)


def _check_labels(labels: Tensor | None, is_real: npt.NDArray[np.bool_]) -> None:
    """is_real: [B, S], or [1, S] for all rows"""
    if labels is None or is_real.all() or list(labels.shape[1:]) != [is_real.shape[1]]:
        return
    found = labels.numpy()
    if (found[~np.broadcast_to(is_real, found.shape)] != IGNORE).any():
        raise ValueError(
            f"labels at padding, where a mask or row indices hide the keys, must be {IGNORE}: under context "
            "parallelism nothing behind the padding counts"
        )
