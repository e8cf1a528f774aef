"""SeqLayout against list splitting: exact, for every rank together."""

import numpy as np
import pytest
from hypothesis import given, settings

from oracle import cut_positions
from paddle_vl_sp import SeqLayout
from paddle_vl_sp.layout import length_multiple
from strategies import cuts


@settings(max_examples=2000, deadline=None)
@given(cuts())
def test_every_position_is_owned_once_and_by_the_rank_the_rule_names(cut):
    """Exact: equal to the oracle rank by rank; all ranks together own 0 .. S-1 once."""
    layouts = cut.layouts()
    for layout in layouts:
        expected = cut_positions(
            cut.seq_len, cut.cp_size, layout.cp_rank, cut.cp_mode, cut.sp_size, layout.sp_rank, cut.cu_seqlens
        )
        assert layout.positions().tolist() == expected
        assert layout.local_len == len(expected)
    together = np.concatenate([layout.positions() for layout in layouts])
    assert sorted(together.tolist()) == list(range(cut.seq_len))


@settings(max_examples=500, deadline=None)
@given(cuts())
def test_intervals_concatenate_to_positions_and_cannot_be_fewer(cut):
    """Exact: in order, never empty, and no two that touch."""
    for layout in cut.layouts():
        intervals = layout.intervals()
        assert intervals.dtype == np.int64
        assert intervals.shape == (len(intervals), 2)
        assert [p for start, length in intervals for p in range(start, start + length)] == layout.positions().tolist()
        assert (intervals[:, 1] > 0).all()
        assert (intervals[1:, 0] > intervals[:-1].sum(axis=1)).all()


def test_equal_lengths_where_nothing_remains():
    """Exact, on every rank."""
    for layout in (SeqLayout(48, cp_size=2, cp_rank=r, sp_size=3, sp_rank=s) for r in range(2) for s in range(3)):
        assert layout.local_len == 8


def test_layouts_are_values():
    """Equal and hashed alike whatever the types of the numbers; nothing in them can be written."""
    first = SeqLayout(8, cp_size=2, cu_seqlens=[0, 4, 8])
    second = SeqLayout(np.int64(8), cp_size=2, cu_seqlens=np.array([0, 4, 8]))
    assert first == second
    assert hash(first) == hash(second)
    assert first != SeqLayout(8, cp_size=2)
    assert first.cu_seqlens == (0, 4, 8)
    with pytest.raises(AttributeError):
        first.seq_len = 9
    with pytest.raises(ValueError, match="read-only"):
        first.intervals()[0, 0] = 1


def test_one_cp_rank_makes_no_cp_cut_whatever_the_mode():
    """Exact: all positions in order."""
    for mode in ("zigzag", "contiguous"):
        assert SeqLayout(7, cp_mode=mode, cu_seqlens=(0, 3, 7)).positions().tolist() == list(range(7))


def test_the_worked_example_of_the_docstring():
    """Exact."""
    owned = [
        SeqLayout(8, cp_size=2, cp_rank=cp, sp_size=2, sp_rank=sp).positions().tolist()
        for cp in range(2)
        for sp in range(2)
    ]
    assert owned == [[0, 1], [6, 7], [2, 3], [4, 5]]


@pytest.mark.parametrize(
    ("kwargs", "multiple"),
    [
        ({"cp_size": 2}, 4),
        ({"cp_size": 2, "sp_size": 4}, 8),
        ({"cp_size": 2, "cp_mode": "contiguous", "sp_size": 3}, 6),
        ({"cp_size": 1, "sp_size": 5}, 5),
        ({"cp_size": 3, "sp_size": 2}, 6),
    ],
)
def test_length_multiple_is_the_smallest_length_that_fits(kwargs, multiple):
    """Exact, against trying every length."""
    assert length_multiple(**kwargs) == multiple
    fits = [n for n in range(1, 2 * multiple) if _fits(n, kwargs)]
    assert fits == [multiple]


def _fits(seq_len, kwargs):
    try:
        SeqLayout(seq_len, **kwargs)
    except ValueError:
        return False
    return True


@pytest.mark.parametrize(
    ("seq_len", "kwargs", "message"),
    [
        (10, {"sp_size": 4}, r"10, which is not divisible by 4 .*next length that fits is 12.*remainder='front'"),
        (10, {"cp_size": 2}, r"10, which is not divisible by 4 \(cp_size 2 \(zigzag\), sp_size 1\).* 12: pad to it$"),
        (12, {"cp_size": 2, "sp_size": 4}, "12, which is not divisible by 8 .*fits is 16"),
        (9, {"cp_size": 2, "cp_mode": "contiguous"}, "9, which is not divisible by 2 .*fits is 10.*remainder='front'"),
        (10, {"cp_size": 2, "remainder": "front"}, "10, which is not divisible by 4 .*fits is 12"),
        (8, {"sp_size": 2, "sp_rank": 2}, "sp_rank 2 is out of range for sp_size 2: expected 0 to 1"),
        (8, {"cp_size": 2, "cp_rank": -1}, "cp_rank -1 is out of range for cp_size 2"),
        (8, {"sp_size": 0}, "sp_size must be at least 1, got 0"),
        (-1, {}, "seq_len must not be negative, got -1"),
        (8.0, {}, "seq_len must be an integer, got 8.0"),
        (8, {"sp_size": True}, "sp_size must be an integer, got True"),
        (8, {"cp_mode": "ring"}, "cp_mode must be one of 'zigzag', 'contiguous', got 'ring'"),
        (8, {"remainder": "drop"}, "remainder must be one of 'error', 'front', got 'drop'"),
        (8, {"cu_seqlens": (0, 6, 4, 8)}, "strictly increasing, got 6 then 4 at 1"),
        (8, {"cu_seqlens": (0, 4, 4, 8)}, "strictly increasing, got 4 then 4 at 1"),
        (8, {"cu_seqlens": (0, 4, 9)}, "cu_seqlens ends at 9, but seq_len is 8"),
        (8, {"cu_seqlens": (1, 8)}, "cu_seqlens must start at 0"),
        (8, {"cu_seqlens": ()}, "cu_seqlens must start at 0"),
        (8, {"cu_seqlens": (0, 2.5, 8)}, r"cu_seqlens\[1\] must be an integer, got 2.5"),
        (10, {"cu_seqlens": (0, 4, 10), "cp_size": 2}, "segment 1 of cu_seqlens has length 6, .* 4 .*fits is 8"),
        (12, {"cu_seqlens": (0, 4, 12), "cp_size": 2, "sp_size": 4}, "seq_len is 12, .* 8 .*fits is 16"),
    ],
)
def test_refusals_name_what_was_got_and_what_fits(seq_len, kwargs, message):
    """Refused when it is made, with the numbers."""
    with pytest.raises(ValueError, match=message):
        SeqLayout(seq_len, **kwargs)
