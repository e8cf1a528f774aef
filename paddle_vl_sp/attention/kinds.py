"""The kinds of attention over a shared sequence: what each sends and needs, and which one "auto" takes, and why."""

from __future__ import annotations

from dataclasses import dataclass

KINDS = ("gather", "ring", "ulysses", "both")
GATHERED_BYTES = 2**30  # "auto" gathers up to this much: the keys and values of one layer, for the whole sequence


@dataclass(frozen=True)
class Attention:
    """The attention of one model on one batch: what decides between the kinds."""

    num_heads: int
    num_kv_heads: int
    seq_len: int
    head_size: int = 128
    batch: int = 1

    def __post_init__(self) -> None:
        if min(self.num_heads, self.num_kv_heads) < 1 or self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"{self.num_heads} query heads cannot share {self.num_kv_heads} key heads evenly: q heads must be a "
                "multiple"
            )

    @property
    def gathered_bytes(self) -> int:
        """The keys and values of one layer and the whole sequence, in 16 bits."""
        return self.batch * self.seq_len * 2 * self.num_kv_heads * self.head_size * 2

    def sent(self, kind: str, ulysses: int, ring: int) -> float:
        """16-bit numbers that a rank sends for each of its positions in one layer, forward and backward.

        Keys and values travel (ranks - 1) times in the forward and again in the backward, with their gradients in fp32:
        gathered or around a ring. Ulysses exchanges q, k, v and the output, and their gradients.
        """
        if kind in ("gather", "ring"):
            ulysses, ring = 1, ulysses * ring
        elif kind == "ulysses":
            ulysses, ring = ulysses * ring, 1
        exchanged = 2 * self.num_heads + 2 * max(self.num_kv_heads, ulysses)
        heads = 2 * (ulysses - 1) / ulysses * exchanged + (ring - 1) * 4 * 2 * max(self.num_kv_heads, ulysses)
        return heads * self.head_size

    def obstacle(self, ulysses: int) -> str:
        """Why a Ulysses group of this size is impossible; empty if it is possible."""
        if self.num_heads % ulysses:
            return f"{self.num_heads} query heads do not divide over {ulysses} ranks"
        if self.num_kv_heads % ulysses and ulysses % self.num_kv_heads:
            return f"{self.num_kv_heads} key heads and {ulysses} ranks: neither is a multiple of the other"
        return ""


def choose_kind(attention: Attention, size: int, ulysses: int | None, any_mask: bool) -> tuple[str, str]:
    """The kind that "auto" takes over `size` ranks, and the reason.

    ulysses    the size of the Ulysses group where there are groups for "both"
    any_mask   there is a mask that is no packed segments
    """
    if size == 1:
        return "gather", "one rank holds the whole sequence, nothing is sent"
    out = attention.obstacle(size)
    fits = attention.gathered_bytes <= GATHERED_BYTES
    degrees = {"ulysses": (size, 1)} if not out else {}
    if fits or (any_mask and out):
        degrees["gather"] = (1, size)
    if ulysses is not None and not any_mask and not attention.obstacle(ulysses):
        degrees["both"] = (ulysses, size // ulysses)
    gathered = f"keys and values of a layer are {_in_bytes(attention.gathered_bytes)} for the whole sequence"
    if not degrees:
        return "ring", f"{gathered}, too much to gather (over {_in_bytes(GATHERED_BYTES)}), and {out}"
    sent = {kind: attention.sent(kind, *degree) for kind, degree in degrees.items()}
    kind = min(sent, key=lambda name: sent[name])
    costs = ", ".join(f"{name} {number:.0f}" for name, number in sorted(sent.items(), key=lambda item: item[1]))
    reasons = [f"numbers sent for each position and layer, forward and backward: {costs}"]
    reasons += [f"no ulysses, {out}"] if out else []
    reasons += ["the mask is no packed segments, so neither ring nor both"] if any_mask else []
    reasons += [gathered if fits or kind == "gather" else f"{gathered}, too much to gather"]
    return kind, "; ".join(reasons)


def _in_bytes(number: int) -> str:
    return f"{number / 2**30:.1f} GiB" if number >= 2**30 else f"{number / 2**20:.1f} MiB"
