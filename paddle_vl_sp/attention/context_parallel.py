"""The one setting of context parallelism: which attention over which ranks, and the layouts that go with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import SupportsIndex

from paddle import Tensor

from paddle_vl_sp.attention.gather import gather_attention
from paddle_vl_sp.attention.groups import SequenceGroups, sep_group
from paddle_vl_sp.attention.kinds import KINDS, Attention, choose_kind
from paddle_vl_sp.attention.ring import ring_attention
from paddle_vl_sp.attention.schedule import ring_share
from paddle_vl_sp.attention.ulysses import ulysses_attention
from paddle_vl_sp.attention.visible import Boundaries
from paddle_vl_sp.comm.collectives import Group
from paddle_vl_sp.layout import SeqLayout, length_multiple
from paddle_vl_sp.sequence.padding import padded_layout
from paddle_vl_sp.settings import check_choice


@dataclass(frozen=True)
class ContextParallel:
    """How the ranks of a group compute attention over a sequence that they share.

    attention   "gather", "ring", "ulysses", "both" (ring x Ulysses), or "auto": the one that sends least, see `choose`
    group       the ranks that share a sequence; None: fleet's sep axis, looked up when it is used
    groups      the two groups of "both", whose product is the group: `groups_from_ranks`, `groups_from_fleet`
    """

    attention: str = "auto"
    group: Group | None = None
    groups: SequenceGroups | None = None

    def __post_init__(self) -> None:
        check_choice("attention", self.attention, ("auto", *KINDS))
        if self.group is not None and not (hasattr(self.group, "nranks") and hasattr(self.group, "rank")):
            raise ValueError(
                f"group must be a process group of the ranks that share a sequence, got {type(self.group).__name__}: "
                "paddle.distributed.new_group(ranks), or None for fleet's sep axis"
            )
        if self.groups is not None and not isinstance(self.groups, SequenceGroups):
            raise ValueError(
                f"groups must be SequenceGroups(ulysses=..., ring=...), got {type(self.groups).__name__}: "
                "groups_from_ranks or groups_from_fleet makes them"
            )
        if self.attention == "both" and self.groups is None:
            raise ValueError(
                'attention="both" needs groups=SequenceGroups(ulysses=..., ring=...): groups_from_ranks or '
                "groups_from_fleet makes them"
            )
        if self.attention not in ("both", "auto") and self.groups is not None:
            raise ValueError(
                f'groups are those of ring x Ulysses, got attention="{self.attention}": attention="both", or group='
            )

    def ranks(self) -> Group:
        """The ranks that share a sequence."""
        group = sep_group() if self.group is None else self.group
        if self.groups is not None:
            _check_product(group, self.groups)
        return group

    def choose(
        self,
        num_heads: int,
        num_kv_heads: int,
        seq_len: int,
        *,
        head_size: int = 128,
        batch: int = 1,
        any_mask: bool = False,
    ) -> ChosenAttention:
        """The kind for these heads and this length, the same on every rank, with the reason.

        any_mask   there are startend_row_indices that are no packed segments: only gather and ulysses take them

        "auto" takes the one that sends least, of those that are possible; gather only while the keys and values of a
        layer are at most 1 GiB for the whole sequence, both only where groups are given, ring where nothing else is.
        """
        group, groups = self.ranks(), self.groups
        attention = Attention(num_heads, num_kv_heads, seq_len, head_size, batch)
        ulysses = groups.ulysses.nranks if groups else None
        if self.attention == "auto":
            kind, reason = choose_kind(attention, group.nranks, ulysses, any_mask)
        else:
            kind, reason = self.attention, "as the setting says"
            _check_possible(kind, attention, ulysses or group.nranks, any_mask)
        return ChosenAttention(kind, reason, group, groups if kind == "both" else None)


@dataclass(frozen=True)
class ChosenAttention:
    """One kind of attention over the ranks of a group; str() gives the reason too.

    gather and ulysses cut the whole row, and know where packed segments end by the boundaries alone; ring and both cut
    every segment by itself (B = 1), padded to what the cut divides.
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


def _check_product(group: Group, groups: SequenceGroups) -> None:
    size = groups.ulysses.nranks * groups.ring.nranks
    rank = groups.ring.rank * groups.ulysses.nranks + groups.ulysses.rank
    if (group.nranks, group.rank) != (size, rank):
        raise ValueError(
            f"the groups of ring x Ulysses hold {groups.ring.nranks} x {groups.ulysses.nranks} ranks, and this rank "
            f"as rank {rank}; the group that shares the sequence says rank {group.rank} of {group.nranks}: split that "
            "group"
        )


def _check_possible(kind: str, attention: Attention, ulysses: int, any_mask: bool) -> None:
    if any_mask and kind in ("ring", "both"):
        raise ValueError(f"{kind} takes packed segments only, and this mask is none: use gather or ulysses")
    obstacle = attention.obstacle(ulysses) if kind in ("ulysses", "both") else ""
    if obstacle:
        raise ValueError(f'attention="{kind}" is impossible, {obstacle}: use gather or ring, or auto')
