"""One kind of attention over the ranks of a group: its layouts, and its computation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import SupportsIndex

from paddle import Tensor

from paddle_vl_sp.attention.delta import gated_delta_rule
from paddle_vl_sp.attention.gather import gather_attention
from paddle_vl_sp.attention.groups import SequenceGroups
from paddle_vl_sp.attention.linear import gated_delta_net_sp
from paddle_vl_sp.attention.ring import ring_attention
from paddle_vl_sp.attention.schedule import ring_share
from paddle_vl_sp.attention.ulysses import ulysses_attention
from paddle_vl_sp.attention.visible import Boundaries, row_bounds
from paddle_vl_sp.comm.collectives import Group
from paddle_vl_sp.layout import SeqLayout, length_multiple
from paddle_vl_sp.sequence.padding import padded_layout


@dataclass(frozen=True)
class ChosenAttention:
    """One kind of attention over the ranks of a group; str() gives the reason too.

    gather and ulysses cut the whole row, and know where packed segments end by the boundaries alone; ring and both cut
    every segment by itself (B = 1), padded to what the cut divides.

    >>> chosen = ContextParallel("gather", FakeGroup(0, 2)).choose(num_heads=4, num_kv_heads=4, seq_len=8)
    >>> chosen.kind, chosen.layout(8).local_len
    ('gather', 4)
    """

    kind: str
    reason: str
    group: Group
    groups: SequenceGroups | None = None

    def __str__(self) -> str:
        return f"{self.kind} over {self.group.nranks} ranks: {self.reason}"

    @property
    def cuts_segments(self) -> bool:
        return self.kind in ("ring", "both")

    def multiple(self, *, sp_size: int = 1) -> int:
        """What the length (of a segment, where those are cut) is padded to a multiple of."""
        sizes = self._cut(sp_size, 0)
        return length_multiple(cp_size=sizes.cp_size, cp_mode=sizes.cp_mode, sp_size=sizes.sp_size)

    def layout(
        self, seq_len: int, cu_seqlens: Sequence[int] | None = None, *, sp_size: int = 1, sp_rank: int = 0
    ) -> SeqLayout:
        """This rank's share of a sequence (padded) of packed segments.

        sp_size, sp_rank   the cut of tensor-parallel sequence parallelism, after that of context parallelism; it is
                           undone where attention is computed
        """
        cut = self._cut(sp_size, sp_rank)
        SeqLayout(seq_len, cu_seqlens=cu_seqlens)  # raises if the boundaries are wrong, also where they are not cut at
        return padded_layout(
            seq_len,
            cu_seqlens=cu_seqlens if self.cuts_segments else None,
            cp_size=cut.cp_size,
            cp_rank=cut.cp_rank,
            cp_mode=cut.cp_mode,
            sp_size=cut.sp_size,
            sp_rank=cut.sp_rank,
        )

    def bounds_of_batch(self, seq_len: int, cu_seqlens: Sequence[int] | None = None) -> tuple[int, ...]:
        """What `shard_batch` and `unshard` take as cu_seqlens: the boundaries at which the layout pads the batch."""
        return tuple(cu_seqlens) if self.cuts_segments and cu_seqlens is not None else (0, seq_len)

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        layout: SeqLayout,
        causal: bool = True,
        scale: float | None = None,
        boundaries: Boundaries | None = None,
        startend_row_indices: Tensor | None = None,
    ) -> Tensor:
        """Attention of this rank's queries with the keys of the whole sequence: [B, S_local, heads, D] in and out.

        layout        of `layout(...)`
        boundaries    of the batch's packed segments, before padding; for gather and ulysses one list for all rows of
                      the batch or one for each. Without causal they must end where padding begins
        startend_row_indices   any mask in their place, for gather and ulysses: see `gather_attention`
        """
        masks = partial(gather_attention, boundaries=boundaries, startend_row_indices=startend_row_indices)
        if self.kind == "gather":
            return masks(q, k, v, layout=layout, group=self.group, causal=causal, scale=scale)
        if self.kind == "ulysses":
            inner, share = partial(masks, layout=SeqLayout(layout.seq_len), group=None), ring_share(layout)
            return ulysses_attention(
                q, k, v, group=self.group, attention=inner, layout=share, causal=causal, scale=scale
            )
        lengths = _segment_lengths(self.kind, layout, boundaries, startend_row_indices)
        ring = self.group if self.groups is None else self.groups.ring
        around = partial(ring_attention, layout=layout, group=ring, lengths=None if causal else lengths)
        if self.groups is None:
            return around(q, k, v, causal=causal, scale=scale)
        return ulysses_attention(
            q, k, v, group=self.groups.ulysses, attention=around, layout=layout, causal=causal, scale=scale
        )

    def gated_delta_net(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor,
        beta: Tensor,
        *,
        layout: SeqLayout,
        conv_weight: Tensor | None = None,
        delta_rule: Callable[..., Tensor] = gated_delta_rule,
        boundaries: Boundaries | None = None,
    ) -> Tensor:
        """`gated_delta_net_sp` over the same shares: by Ulysses where the ranks divide the heads, else by states."""
        divides = not (q.shape[2] % self.group.nranks or v.shape[2] % self.group.nranks)
        run = partial(
            gated_delta_net_sp,
            group=self.group,
            layout=layout if self.groups else ring_share(layout),
            conv_weight=conv_weight,
            delta_rule=delta_rule,
            method="ulysses" if divides else "state",
        )
        if self.cuts_segments:
            _segment_lengths(self.kind, layout, boundaries, None)  # raises if the layout is not that of the boundaries
            return run(q, k, v, g, beta)
        return run(q, k, v, g, beta, cu_seqlens=row_bounds(boundaries, q.shape[0], layout.seq_len))

    def _cut(self, sp_size: int, sp_rank: int) -> SeqLayout:
        """The cut as a layout of length 0."""
        if self.groups is None:
            size, rank, mode = self.group.nranks, self.group.rank, "contiguous" if self.kind == "ulysses" else "zigzag"
            return SeqLayout(0, cp_size=size, cp_rank=rank, cp_mode=mode, sp_size=sp_size, sp_rank=sp_rank)
        if sp_size > 1:
            raise ValueError(
                f"ring x Ulysses cuts twice, and a tensor-parallel cut over {sp_size} ranks would be a third: use "
                "gather or ring with it, or turn sequence_parallel off"
            )
        ring, ulysses = self.groups.ring, self.groups.ulysses
        return SeqLayout(0, cp_size=ring.nranks, cp_rank=ring.rank, sp_size=ulysses.nranks, sp_rank=ulysses.rank)


def _segment_lengths(
    kind: str, layout: SeqLayout, boundaries: Boundaries | None, indices: Tensor | None
) -> list[int] | None:
    """The real length of each segment of a layout that was cut at the boundaries; None where none are given."""
    if indices is not None:
        raise ValueError(f"{kind} takes no startend_row_indices, only packed segments: use gather, or boundaries=")
    if boundaries is None:
        return None
    if not isinstance(boundaries[0], SupportsIndex):
        raise ValueError(
            f"{kind} takes one packed row, B = 1, and one list of boundaries: join the rows to one, or use gather"
        )
    lengths = [int(end) - int(begin) for begin, end in pairwise(boundaries)]  # type: ignore[call-overload]
    rooms = layout.segments()[:, 1].tolist()
    if len(lengths) != len(rooms) or any(length > room for length, room in zip(lengths, rooms, strict=True)):
        raise ValueError(
            f"{kind} cuts every segment by itself: segments of {lengths} do not fit the layout's {rooms}; make the "
            "layout from these boundaries"
        )
    return lengths
