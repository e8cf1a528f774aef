"""What hypothesis draws: cuts of a sequence for all ranks together, and batches with runs of visual tokens."""

from dataclasses import dataclass

import numpy as np
from hypothesis import strategies as st

from paddle_vl_sp import SeqLayout
from paddle_vl_sp.layout import length_multiple

IMAGE, VIDEO, TEXT = 151655, 151656, 7


@dataclass(frozen=True)
class Cut:
    """The arguments of SeqLayout without the ranks."""

    seq_len: int
    cp_size: int
    cp_mode: str
    sp_size: int
    cu_seqlens: tuple[int, ...] | None
    remainder: str

    def layouts(self):
        """Every rank's layout."""
        return [
            SeqLayout(
                self.seq_len,
                cp_size=self.cp_size,
                cp_rank=cp_rank,
                cp_mode=self.cp_mode,
                sp_size=self.sp_size,
                sp_rank=sp_rank,
                cu_seqlens=self.cu_seqlens,
                remainder=self.remainder,
            )
            for cp_rank in range(self.cp_size)
            for sp_rank in range(self.sp_size)
        ]


@st.composite
def cuts(draw, max_units=6):
    cp_size, sp_size = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    cp_mode = draw(st.sampled_from(["zigzag", "contiguous"]))
    remainder = draw(st.sampled_from(["error", "front"]))
    packed = draw(st.booleans())
    zigzag = cp_mode == "zigzag" and cp_size > 1
    if remainder == "front":
        segment_unit = total_unit = 2 * cp_size if zigzag else 1
    else:
        segment_unit = length_multiple(cp_size=cp_size, cp_mode=cp_mode)
        total_unit = length_multiple(cp_size=cp_size, cp_mode=cp_mode, sp_size=sp_size)
    if not packed:
        return Cut(total_unit * draw(st.integers(0, max_units)), cp_size, cp_mode, sp_size, None, remainder)
    lengths = [segment_unit * draw(st.integers(1, max_units)) for _ in range(draw(st.integers(1, 12)))]
    missing = -sum(lengths) % total_unit
    lengths += [missing] if missing else []
    cu_seqlens = (0, *(int(end) for end in np.cumsum(lengths)))
    return Cut(cu_seqlens[-1], cp_size, cp_mode, sp_size, cu_seqlens, remainder)


@st.composite
def batches(draw, cut):
    """ids [B, S] with runs of text, image and video tokens; B = 1 where the row is packed."""
    batch = 1 if cut.cu_seqlens else draw(st.integers(1, 3))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    kinds = draw(st.sampled_from([(TEXT,), (IMAGE,), (TEXT, IMAGE), (TEXT, IMAGE, VIDEO)]))
    ids = np.full((batch, cut.seq_len), TEXT)
    place = 0
    while place < ids.size:
        run = int(rng.geometric(0.2))
        ids.flat[place : place + run] = rng.choice(kinds)
        place += run
    return ids.astype(draw(st.sampled_from([np.int32, np.int64])))
