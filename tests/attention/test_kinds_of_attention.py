"""The setting of context parallelism: what it refuses, which kind "auto" takes and why, the layouts of each kind."""

import re
from types import SimpleNamespace
from unittest import mock

import numpy as np
import paddle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paddle_vl_sp import SeqLayout
from paddle_vl_sp.attention import ContextParallel, SequenceGroups
from paddle_vl_sp.attention.groups import sep_group
from paddle_vl_sp.attention.kinds import Attention
from paddle_vl_sp.attention.reference import full_attention
from paddle_vl_sp.testing import FakeGroup


def groups(ulysses=2, ring=2, rank=0):
    return SequenceGroups(FakeGroup(rank % ulysses, ulysses), FakeGroup(rank // ulysses, ring))


def chosen(kind, size=2, rank=0, heads=(8, 8), length=64, **options):
    more = {"groups": groups(2, size // 2, rank)} if kind == "both" else {}
    return ContextParallel(kind, FakeGroup(rank, size), **more).choose(*heads, length, **options)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"attention": "flash"}, "attention must be one of 'auto', 'gather', 'ring', 'ulysses', 'both', got 'flash'"),
        ({"group": [0, 1]}, "group must be a process group .* got list"),
        ({"groups": (1, 2)}, "groups must be SequenceGroups.* got tuple"),
        ({"attention": "both"}, 'attention="both" needs groups=SequenceGroups'),
        ({"attention": "ring", "groups": groups()}, 'groups are those of ring x Ulysses, got attention="ring"'),
    ],
)
def test_a_wrong_setting_is_refused_when_it_is_made(arguments, words):
    """The message names what was got and what was expected."""
    with pytest.raises(ValueError, match=words):
        ContextParallel(**arguments)


def test_the_setting_is_a_value():
    """Frozen, compared and hashed by what it says."""
    assert ContextParallel("ring") == ContextParallel(attention="ring") != ContextParallel()
    assert len({ContextParallel("ring"), ContextParallel("ring")}) == 1
    with pytest.raises(AttributeError):
        ContextParallel().attention = "ring"


@pytest.mark.parametrize("arguments", [(), ("both", None, groups())])
def test_the_group_is_looked_up_at_the_first_use(arguments):
    """Making the setting looks up no group; using it before fleet.init is refused by name."""
    setting = ContextParallel(*arguments)
    with pytest.raises(ValueError, match=r"no group shares the sequence: fleet has no hybrid topology yet.*sep_degree"):
        setting.choose(4, 4, 64)


def test_a_sep_axis_of_one_is_a_group_of_one():
    """Exact: Paddle asserts when asked for the group of such an axis; it is not asked."""
    topology = SimpleNamespace(get_sep_parallel_world_size=lambda: 1, global_rank=3)
    with mock.patch("paddle.distributed.fleet.get_hybrid_communicate_group", return_value=topology):
        group = sep_group()
    assert (group.nranks, group.rank, group.ranks) == (1, 0, [3])


def test_the_groups_of_both_must_make_the_group():
    """Refused with both numbers of ranks, or with this rank's two numbers."""
    for group in (FakeGroup(0, 8), FakeGroup(1, 4)):
        with pytest.raises(ValueError, match=f"2 x 2 ranks, .* as rank 0; .* rank {group.rank} of {group.nranks}"):
            ContextParallel("both", group, groups()).choose(4, 4, 64)


@pytest.mark.parametrize(
    ("size", "heads", "length", "kind", "reason"),
    [
        (1, (32, 8), 2**20, "gather", "one rank holds the whole sequence"),
        (2, (32, 8), 8192, "gather", "gather 8192, ulysses 10240; .* 32.0 MiB for the whole sequence"),
        (4, (32, 8), 8192, "ulysses", "ulysses 15360, gather 24576"),
        (4, (32, 8), 2**20, "ulysses", "4.0 GiB .*too much to gather"),
        (2, (32, 8), 2**20, "ulysses", "^numbers sent .*: ulysses 10240; .* 4.0 GiB .*too much to gather"),
        (3, (32, 8), 8192, "gather", "no ulysses, 32 query heads do not divide over 3 ranks"),
        (
            3,
            (32, 8),
            2**20,
            "ring",
            r"4\.0 GiB .*too much to gather \(over 1\.0 GiB\), and 32 query heads do not divide",
        ),
        (6, (12, 4), 2**20, "ring", "4 key heads and 6 ranks: neither is a multiple"),
        (16, (32, 2), 4096, "ulysses", "ulysses 23040, gather 30720"),
    ],
)
def test_auto_takes_what_sends_least(size, heads, length, kind, reason):
    """Exact kind; the reason has the numbers that decided."""
    got = chosen("auto", size, heads=heads, length=length)
    assert got.kind == kind
    assert re.search(reason, got.reason), got.reason
    assert str(got) == f"{kind} over {size} ranks: {got.reason}"


def test_auto_takes_both_where_groups_are_given():
    """Exact: eight ranks, four key heads, twelve query heads; without groups the ring or gather remains."""
    setting = ContextParallel("auto", FakeGroup(0, 8), groups(4, 2))
    assert setting.choose(12, 4, 2**20).kind == "both"
    assert ContextParallel("auto", FakeGroup(0, 8)).choose(12, 4, 2**20).kind == "ring"
    assert setting.choose(12, 4, 2**20, any_mask=True).kind == "gather"


def test_any_mask():
    """Exact: gather or Ulysses, also where the whole keys are large; ring and both refuse."""
    assert chosen("auto", 3, length=2**20, heads=(8, 8), any_mask=True).kind == "gather"
    assert chosen("auto", 8, length=2**20, heads=(8, 8), any_mask=True).kind == "ulysses"
    for kind in ("ring", "both"):
        with pytest.raises(ValueError, match=f"{kind} takes packed segments only"):
            chosen(kind, 4, any_mask=True)


def test_an_explicit_kind_must_succeed():
    """Refused with the heads and the ranks."""
    assert chosen("ulysses", 4, heads=(8, 2)).reason == "as the setting says"
    with pytest.raises(ValueError, match='"ulysses" is impossible, 6 query heads do not divide over 4 ranks'):
        chosen("ulysses", 4, heads=(6, 2))
    with pytest.raises(ValueError, match='"both" is impossible, 3 query heads do not divide over 2 ranks'):
        chosen("both", 4, heads=(3, 3))
    with pytest.raises(ValueError, match="6 query heads cannot share 4 key heads evenly"):
        chosen("ring", 2, heads=(6, 4))


def test_what_is_sent_is_that_of_the_formulas():
    """Exact, as in docs/attention-costs.md: 8192 positions a rank, 32 and 8 heads of 128, MiB forward and backward."""
    attention = Attention(32, 8, 8192)
    for ranks, ring, ulysses in ((2, 32 + 96, 80 + 80), (4, 96 + 288, 120 + 120), (16, 480 + 1440, 180 + 180)):
        assert attention.sent("ring", 1, ranks) * 8192 * 2 == ring * 2**20
        assert attention.sent("gather", 1, ranks) == attention.sent("ring", 1, ranks)
        assert attention.sent("ulysses", ranks, 1) * 8192 * 2 == ulysses * 2**20
    assert attention.sent("both", 8, 2) * 8192 * 2 == (172 + 236) * 2**20
    assert attention.gathered_bytes == 2 * 8192 * 8 * 128 * 2


@pytest.mark.parametrize("kind", ["gather", "ring", "ulysses", "both"])
def test_layouts_of_each_kind(kind):
    """Exact cuts: gather and ulysses cut the row, ring and both every segment; padded to the multiple."""
    one = chosen(kind, 4, rank=1)
    expected = {"gather": (8, 40), "ring": (8, 48), "ulysses": (4, 36), "both": (4, 40)}[kind]
    layout = one.layout(35, (0, 9, 35))
    assert (one.multiple(), layout.seq_len) == expected
    cut = (layout.cp_size, layout.cp_rank, layout.cp_mode, layout.sp_size, layout.sp_rank)
    zigzag = (4, 1, "zigzag", 1, 0)
    contiguous = (4, 1, "contiguous", 1, 0)
    assert cut == {"gather": zigzag, "ring": zigzag, "ulysses": contiguous, "both": (2, 0, "zigzag", 2, 1)}[kind]
    assert (layout.cu_seqlens is not None) == one.cuts_segments == (kind in ("ring", "both"))
    assert one.bounds_of_batch(35, (0, 9, 35)) == ((0, 9, 35) if one.cuts_segments else (0, 35))
    assert one.bounds_of_batch(35) == (0, 35)
    with pytest.raises(ValueError, match="cu_seqlens ends at 9, but seq_len is 35"):
        one.layout(35, (0, 9))


@settings(max_examples=50, deadline=None)
@given(
    st.sampled_from(["gather", "ring", "ulysses"]), st.integers(1, 4), st.integers(1, 3),
    st.lists(st.integers(1, 9), min_size=1, max_size=4), st.booleans(),
)  # fmt: skip
def test_every_position_has_one_owner(kind, size, sp_size, lengths, packed):
    """Exact, over context and tensor-parallel ranks together; padding is less than a multiple a segment."""
    length, bounds = sum(lengths), tuple(np.cumsum([0, *lengths]).tolist()) if packed else None
    owned = []
    for rank in range(size):
        one = ContextParallel(kind, FakeGroup(rank, size)).choose(12, 12, length)
        for sp_rank in range(sp_size):
            layout = one.layout(length, bounds, sp_size=sp_size, sp_rank=sp_rank)
            owned += layout.positions().tolist()
            assert layout.seq_len % one.multiple(sp_size=sp_size) == 0
    assert sorted(owned) == list(range(layout.seq_len))
    parts = len(lengths) if packed and one.cuts_segments else 1
    assert layout.seq_len < length + parts * one.multiple() + one.multiple(sp_size=sp_size)


def test_three_cuts_are_refused():
    """Ring x Ulysses x tensor-parallel sequence parallelism."""
    with pytest.raises(ValueError, match="over 2 ranks would be a third"):
        chosen("both", 4).layout(64, sp_size=2)


def test_a_ring_layout_must_be_that_of_the_boundaries():
    """Refused with the lengths of both, before anything is sent."""
    one = chosen("ring", 2)
    x = paddle.zeros([1, 8, 8, 4])
    layout = one.layout(12, (0, 4, 12))  # padded to 4 and 8
    for boundaries in ((0, 12), (0, 5, 12), (0, 4, 8, 12)):
        with pytest.raises(
            ValueError, match=r"ring cuts every segment by itself: segments of .* the layout's \[4, 8\]"
        ):
            one.attend(x, x, x, layout=layout, boundaries=boundaries)
    with pytest.raises(ValueError, match="ring takes no startend_row_indices"):
        one.attend(x, x, x, layout=layout, startend_row_indices=paddle.zeros([1, 1, 12, 1], "int32"))
    with pytest.raises(ValueError, match="ring takes one packed row"):
        one.attend(x, x, x, layout=layout, boundaries=[(0, 4, 12), (0, 12)])


@pytest.mark.parametrize("kind", ["gather", "ring", "ulysses"])
def test_one_rank_needs_no_process_group(kind):
    """1e-6 against the layout's own whole: nothing is sent in a group of one."""
    q, k, v = (paddle.rand([1, 12, heads, 8]) for heads in (4, 2, 2))
    one = ContextParallel(kind, FakeGroup(0, 1)).choose(4, 2, 12)
    layout = one.layout(12, (0, 5, 12))
    assert layout == SeqLayout(12, cu_seqlens=layout.cu_seqlens, cp_mode=layout.cp_mode)
    out = one.attend(q, k, v, layout=layout, boundaries=(0, 5, 12))
    np.testing.assert_allclose(out.numpy(), full_attention(q, k, v, cu_seqlens=(0, 5, 12)).numpy(), atol=1e-6)
