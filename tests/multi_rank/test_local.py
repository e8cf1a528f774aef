"""Plans from ids that are cut already. Bar: bit for bit the plan that plan_visual makes from the full ids."""

from dataclasses import replace
from itertools import product

import numpy as np
import paddle
import paddle.distributed as dist
import pytest

from groups import world
from paddle_vl_sp import SeqLayout, plan_visual
from paddle_vl_sp.comm.local_plan import plan_visual_local, wire_bytes
from rank_cases import hold, pairs, same_error_everywhere

IMAGE, VIDEO = 5, 6
IDS = (IMAGE, VIDEO)


def layouts(num_ranks):
    """One layout for every kind of cut over this many ranks, as of rank (0, 0)."""
    for sp_size in (size for size in range(1, num_ranks + 1) if num_ranks % size == 0):
        cp_size = num_ranks // sp_size
        for mode in ("zigzag", "contiguous"):
            cut = {"cp_size": cp_size, "sp_size": sp_size, "cp_mode": mode}
            yield SeqLayout(48, **cut)
            yield SeqLayout(48, **cut, cu_seqlens=(0, 24, 48))
            if num_ranks == 2:
                yield SeqLayout(48, **cut, cu_seqlens=(0, 4, 16, 20, 48))
            if mode == "contiguous" or cp_size == 1:
                yield SeqLayout(47, **cut, remainder="front")
                yield SeqLayout(47, **cut, remainder="front", cu_seqlens=(0, 2, 13, 47))
                yield SeqLayout(1, **cut, remainder="front")


def all_ranks(layout):
    places = product(range(layout.cp_size), range(layout.sp_size))
    return [replace(layout, cp_rank=cp, sp_rank=sp) for cp, sp in places]


def batches(layout):
    """ids [B, S]: mixed kinds, text only, visual only, one early run, one late token."""
    rng = np.random.default_rng(layout.seq_len)
    for batch in (1,) if layout.cu_seqlens else (1, 3):
        shape = [batch, layout.seq_len]
        early, late = np.ones(shape, dtype=np.int64), np.ones(shape, dtype=np.int64)
        early[:, :3] = IMAGE
        late[-1, -1] = VIDEO
        yield from (rng.choice([1, IMAGE, VIDEO], size=shape), np.ones(shape, dtype=np.int64), early, late)
        yield np.full(shape, IMAGE)


def hold_equal(got, expected):
    assert got.row_shape == expected.row_shape
    assert got.num_features == expected.num_features
    for name in ("update_indices", "gather_indices"):
        here, there = np.asarray(getattr(got, name)), getattr(expected, name)
        assert here.dtype == np.int64
        np.testing.assert_array_equal(here, there, name)


# cases, run on every rank


def equal_to_the_plan_of_the_full_ids():
    group = world()
    for first in layouts(group.nranks):
        for turn, ids in enumerate(batches(first)):
            mine = all_ranks(first)[:: -1 if turn % 2 else 1][group.rank]  # any order of the group
            number = int(np.isin(ids, IDS).sum())
            options = {"num_features": number, "sequence_first": turn % 3 == 0}
            expected = plan_visual(ids, IDS, mine, **options)
            local = ids[:, mine.positions()]
            hold_equal(plan_visual_local(local, IDS, mine, group=group, **options), expected)


def masks_and_tensors():
    group = world()
    for first in (SeqLayout(48, cp_size=group.nranks), SeqLayout(48, sp_size=group.nranks)):
        mine = all_ranks(first)[group.rank]
        mask = np.random.default_rng(0).random([2, 48]) < 0.4
        options = {"num_features": int(mask.sum()), "sequence_first": True}
        expected = plan_visual(mask, None, mine, **options)
        local = mask[:, mine.positions()]
        hold_equal(plan_visual_local(local, None, mine, group=group, **options), expected)
        ids = np.where(local, IMAGE, 1).astype(np.int32)
        other_bytes = (local.astype(np.uint8) * 3).view(bool)  # as a mask that was made by a view
        hold_equal(plan_visual_local(other_bytes, None, mine, group=group, **options), expected)
        for tokens, wanted in ((paddle.to_tensor(local), None), (paddle.to_tensor(ids), IDS)):
            plan = plan_visual_local(tokens, wanted, mine, group=group, **options)
            assert not plan.on_host
            hold_equal(plan, expected)


def features_kept_apart_by_kind():
    """Rows of [image; video]: what each token gets is its own kind's next row."""
    group = world()
    for first in (SeqLayout(48, cp_size=group.nranks), SeqLayout(48, sp_size=group.nranks)):
        mine = all_ranks(first)[group.rank]
        ids = np.random.default_rng(1).choice([1, IMAGE, VIDEO], size=[2, 48])
        rows = np.full(ids.size, -1)
        images = np.flatnonzero(ids.ravel() == IMAGE)
        videos = np.flatnonzero(ids.ravel() == VIDEO)
        rows[images] = np.arange(len(images))
        rows[videos] = len(images) + np.arange(len(videos))
        own = rows.reshape(ids.shape)[:, mine.positions()].ravel()
        plan = plan_visual_local(
            ids[:, mine.positions()],
            IDS,
            mine,
            group=group,
            num_features=(len(images), len(videos)),
            sequence_first=False,
            features_by_kind=True,
        )
        in_order = np.argsort(own)[(own < 0).sum() :]  # the rows that take a feature, by feature row
        np.testing.assert_array_equal(plan.update_indices, in_order)
        np.testing.assert_array_equal(plan.gather_indices, own[in_order])


def whatever_plan_visual_accepts():
    group = world()
    mine = all_ranks(SeqLayout(48, sp_size=group.nranks))[group.rank]
    ids = np.random.default_rng(3).choice([1, IMAGE, VIDEO], size=[2, 48])
    local, images = ids[:, mine.positions()], int((ids == IMAGE).sum())
    both = images + int((ids == VIDEO).sum())
    for wanted, number in (
        ((IMAGE, IMAGE), images),
        ((IMAGE, VIDEO, IMAGE), both),
        ([IMAGE, VIDEO], both),
        (np.array(IDS), both),
        (np.array(IDS), np.int64(both)),
        (np.array(IDS), np.array(both)),
        (np.array([IMAGE], dtype="int32"), np.int32(images)),
    ):
        options = {"num_features": number, "sequence_first": True}
        expected = plan_visual(ids, wanted, mine, **options)
        hold_equal(plan_visual_local(local, wanted, mine, group=group, **options), expected)
    options = {"num_features": np.array([images, both - images]), "sequence_first": True}  # one for each kind
    hold_equal(
        plan_visual_local(local, IDS, mine, group=group, **options), plan_visual(ids, IDS, mine, sequence_first=True)
    )


def wrong_numbers_are_everyones_error():
    group = world()
    mine = all_ranks(SeqLayout(48, sp_size=group.nranks))[group.rank]
    ids = np.full([1, 48], IMAGE)
    ids[0, :5] = VIDEO
    local = ids[:, mine.positions()]

    def plan(tokens=local, wanted=IDS, layout=mine, features=48, group=group):
        return lambda: plan_visual_local(
            tokens, wanted, layout, group=group, num_features=features, sequence_first=True
        )

    last = group.rank == group.nranks - 1
    same_error_everywhere(plan(features=47), group, "has 48 visual tokens but 47 feature rows")
    same_error_everywhere(plan(features=(42, 6)), group, "43 placeholder 0 tokens but 42 feature rows")
    same_error_everywhere(plan(features=(48,)[:1] * 3), group, "3 numbers for 2 placeholder ids")
    same_error_everywhere(plan(features=48 + last), group, "must hold the same layout")
    same_error_everywhere(plan(tokens=local[:, 1:] if last else local), group, "rank .* failed", "owns .* of 48")
    same_error_everywhere(plan(tokens=local * 1.0 if last else local), group, "rank .* failed", "int32 or int64")
    same_error_everywhere(plan(tokens=local[0] if last else local), group, "rank .* failed, so all stop", r"\[B, S\]")
    same_error_everywhere(plan(layout=replace(mine, sp_rank=0), tokens=local), group, r"are \[\(0, 0\), \(0, 0\)")
    smaller = SeqLayout(48, sp_size=48)
    same_error_everywhere(plan(layout=smaller, tokens=local[:, :1]), group, "group has . ranks", "sp_size 48")
    other = replace(mine, seq_len=48 + group.nranks * last)
    grown = np.pad(local, ((0, 0), (0, int(last))), constant_values=IMAGE)
    same_error_everywhere(plan(layout=other, tokens=grown), group, "must hold the same layout")


def no_layout_on_one_rank_is_everyones_error():
    """Nor anything else: an error before the first collective would leave the others waiting in it."""
    group = world()
    mine = all_ranks(SeqLayout(8 * group.nranks, cp_size=group.nranks))[group.rank]
    ids = np.full([1, 8], IMAGE)
    for wrong, name in ((None, "NoneType"), (8, "int"), (mine.intervals(), "ndarray")):
        layout = wrong if group.rank == 1 else mine
        plan = lambda layout=layout: plan_visual_local(  # noqa: E731
            ids, IDS, layout, group=group, num_features=8 * group.nranks, sequence_first=True
        )
        same_error_everywhere(plan, group, f"rank 1 says: layout must be a SeqLayout, got {name}")


def each_argument_must_be_the_same():
    """Every one that goes into the fingerprint, by itself; each value alone is allowed."""
    group = world()
    size, last = group.nranks, group.nranks - 1
    odd = group.rank == last
    cut = {"seq_len": 16, "cp_size": size, "cp_rank": group.rank}
    same = {
        "layout": SeqLayout(**cut),
        "batch": 1,
        "placeholder_ids": IDS,
        "sequence_first": True,
        "num_features": [16, 0],
    }
    others = {
        "seq_len": {"layout": SeqLayout(**cut | {"seq_len": 32})},
        "cp_mode": {"layout": SeqLayout(**cut, cp_mode="contiguous")},
        "cut": {"layout": SeqLayout(16, sp_size=size, sp_rank=group.rank)},
        "cu_seqlens": {"layout": SeqLayout(**cut, cu_seqlens=(0, 16))},
        "remainder": {"layout": SeqLayout(**cut, remainder="front")},
        "batch": {"batch": 2},
        "order of ids": {"placeholder_ids": IDS[::-1]},
        "another id": {"placeholder_ids": (IMAGE, VIDEO + 1)},
        "sequence_first": {"sequence_first": False},
        "num_features": {"num_features": [15, 1]},  # as many in all
    }
    for name, other in others.items():
        given = {**same, **other} if odd else dict(same)
        tokens = np.full([given.pop("batch"), given["layout"].local_len], IMAGE)
        plan = lambda tokens=tokens, given=given: plan_visual_local(tokens, group=group, **given)  # noqa: E731
        words = f"must hold the same layout .*: rank {last} .fingerprint"
        try:
            same_error_everywhere(plan, group, words, "differs from rank 0")
        except BaseException as error:
            raise AssertionError(name) from error


def few_bytes_travel():
    group, sent, real = world(), [], dist.stream.all_gather
    layout = SeqLayout(48, cp_size=group.nranks)
    mine = replace(layout, cp_rank=group.rank)

    def all_gather(out, x, **options):
        sent.append(x.size * x.element_size())
        real(out, x, **options)

    dist.stream.all_gather = all_gather
    try:
        ids = np.full([3, mine.local_len], IMAGE)
        plan_visual_local(ids, IDS, mine, group=group, num_features=3 * 48, sequence_first=True)
    finally:
        dist.stream.all_gather = real
    assert len(sent) == 2
    assert sum(sent) == wire_bytes(mine, 3) == 8 * (5 + 3 * 2 * 2)


CASES = [
    equal_to_the_plan_of_the_full_ids,
    masks_and_tensors,
    features_kept_apart_by_kind,
    whatever_plan_visual_accepts,
    wrong_numbers_are_everyones_error,
    no_layout_on_one_rank_is_everyones_error,
    each_argument_must_be_the_same,
    few_bytes_travel,
]


LAUNCHES = dict.fromkeys((2, 4), CASES)


@pytest.mark.parametrize(("nranks", "case"), pairs(LAUNCHES))
def test_on_all_ranks(nranks, case):
    """Exact on every rank, or the same error on all."""
    hold(__name__, nranks, case)


def test_one_rank_needs_no_group():
    """Exact: the plan of plan_visual."""
    ids = np.random.default_rng(0).choice([1, IMAGE], size=[2, 8])
    layout, options = SeqLayout(8), {"num_features": int((ids == IMAGE).sum()), "sequence_first": False}
    hold_equal(plan_visual_local(ids, IDS, layout, group=None, **options), plan_visual(ids, IDS, layout, **options))
