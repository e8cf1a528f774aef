"""The one setting of context parallelism: which attention, over which ranks."""

from __future__ import annotations

from dataclasses import dataclass

from paddle_vl_sp.attention.chosen import ChosenAttention
from paddle_vl_sp.attention.groups import SequenceGroups, sep_group
from paddle_vl_sp.attention.kinds import KINDS, Attention, choose_kind
from paddle_vl_sp.comm.collectives import Group
from paddle_vl_sp.settings import check_choice


@dataclass(frozen=True)
class ContextParallel:
    """How the ranks of a group compute attention over a sequence that they share.

    attention   "gather", "ring", "ulysses", "both" (ring x Ulysses), or "auto": the one that sends least, see `choose`
    group       the ranks that share a sequence; None: fleet's sep axis, looked up when it is used
    groups      the two groups of "both", whose product is the group: `groups_from_ranks`, `groups_from_fleet`
    ids         "whole": every rank gives a model the whole batch; "cut": ids, labels and positions are this rank's part
                already, as `choose(...).layout(...)` cuts

    ::

        chosen = ContextParallel("auto", group).choose(num_heads=32, num_kv_heads=8, seq_len=4096)
        layout = chosen.layout(4096)
        out = chosen.attend(q, k, v, layout=layout)  # [B, S_local, heads, D]
    """

    attention: str = "auto"
    group: Group | None = None
    groups: SequenceGroups | None = None
    ids: str = "whole"

    def __post_init__(self) -> None:
        check_choice("attention", self.attention, ("auto", *KINDS))
        check_choice("ids", self.ids, ("whole", "cut"))
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
