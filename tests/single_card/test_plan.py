"""plan_visual against a loop over tokens: exact, for every implementation, every rank together."""

from unittest import mock

import numpy as np
import paddle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import oracle
from paddle_vl_sp import SeqLayout, VisualPlan, plan_visual
from paddle_vl_sp.backends import host, plain
from strategies import IMAGE, VIDEO, batches, cuts

KINDS = (IMAGE, VIDEO)


def plain_paddle_plans(ids, placeholder_ids, layout, sequence_first, padded=False, num_features=-1):
    """As on a CPU, where the host reads tensors, and as on a device."""
    arguments = paddle.to_tensor(ids), placeholder_ids, layout, sequence_first, num_features, padded
    yield plain.build_plan(*arguments)
    with mock.patch.object(plain, "is_on_host", return_value=False):
        yield plain.build_plan(*arguments)


@settings(max_examples=2000, deadline=None)
@given(st.data())
def test_every_visual_token_is_owned_once_by_the_rank_that_holds_it(data):
    """Exact: numpy plan = plan of tensors (custom operator where there is one) = token by token, on every rank."""
    cut = data.draw(cuts())
    ids = data.draw(batches(cut))
    visual = np.isin(ids, KINDS)
    sequence_first = data.draw(st.booleans())
    tensor = paddle.to_tensor(ids)
    owned = []
    for layout in cut.layouts():
        update, gather = oracle.pairs(visual, layout.positions().tolist(), sequence_first)
        for tokens, long in ((ids, 0), (ids, ids.size + 1), (tensor, 0)):  # numpy has a way for few intervals
            options = {"sequence_first": sequence_first, "num_features": int(visual.sum())}
            with mock.patch.object(host, "LONG", long):
                plan = plan_visual(tokens, KINDS, layout, **options)
            assert plan.update_indices.tolist() == update
            assert plan.gather_indices.tolist() == gather
            assert plan.counts.tolist() == [len(update), visual.sum()]
            batch = ids.shape[0]
            assert plan.row_shape == ((layout.local_len, batch) if sequence_first else (batch, layout.local_len))
        owned += gather
    assert sorted(owned) == list(range(visual.sum()))


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_all_forms_give_the_same_plan(data):
    """Exact: plain Paddle, mask for ids, padded with and without a known number of features."""
    cut = data.draw(cuts())
    ids = data.draw(batches(cut))
    mask = np.isin(ids, KINDS)
    sequence_first = data.draw(st.booleans())
    for layout in cut.layouts():
        exact = plan_visual(ids, KINDS, layout, sequence_first=sequence_first)
        update, gather = exact.update_indices.tolist(), exact.gather_indices.tolist()
        for found in plain_paddle_plans(ids, KINDS, layout, sequence_first):
            assert [x.tolist() for x in found] == [update, gather, exact.counts.tolist()]
        for tokens in (mask, paddle.to_tensor(mask)):
            plan = plan_visual(tokens, None, layout, sequence_first=sequence_first)
            assert (plan.update_indices.tolist(), plan.gather_indices.tolist()) == (update, gather)
        for announced in (None, int(mask.sum()), max(int(mask.sum()) - 2, 0), int(mask.sum()) + 3):
            expected = padded_form(update, gather, exact.num_rows, announced)
            for tokens in (ids, paddle.to_tensor(ids)):
                plan = plan_visual(
                    tokens, KINDS, layout, sequence_first=sequence_first, num_features=announced, padded=True
                )
                assert [plan.update_indices.tolist(), plan.gather_indices.tolist()] == expected
                assert plan.counts.tolist() == [len(update), mask.sum()]
                assert plan.num_features == announced
            limit = -1 if announced is None else announced
            for found in plain_paddle_plans(ids, KINDS, layout, sequence_first, True, limit):
                assert [x.tolist() for x in found] == [*expected, exact.counts.tolist()]


def padded_form(update, gather, num_rows, announced):
    size = num_rows if announced is None else min(num_rows, announced)
    pairs = [(u, g) for u, g in zip(update, gather, strict=True) if announced is None or g < announced]
    pairs += [(-1, -1)] * (size - len(pairs))
    return [list(column) for column in zip(*pairs, strict=True)] or [[], []]


def test_the_worked_example_of_the_docstring():
    """Exact."""
    visual = np.array([[0, 1, 1, 1, 0, 0], [1, 1, 0, 0, 1, 0]], dtype=bool)
    plan = plan_visual(visual, None, SeqLayout(6, sp_size=2, sp_rank=1), sequence_first=False)
    assert plan.update_indices.tolist() == [0, 4]
    assert plan.gather_indices.tolist() == [2, 5]


@pytest.mark.parametrize("num_ids", [1, 2, 3, 8, 9, 40])
def test_any_number_of_placeholder_ids(num_ids):
    """Exact against numpy, also of more ids than the operator takes."""
    ids = np.arange(120).reshape(2, 60) % 50
    wanted = tuple(range(3, 3 + num_ids))
    expected = np.flatnonzero(np.isin(ids, wanted))
    for tokens in (ids, paddle.to_tensor(ids)):
        plan = plan_visual(tokens, wanted, SeqLayout(60), sequence_first=False)
        assert plan.update_indices.tolist() == expected.tolist()


def every_way_to_plan(tokens, placeholders):
    """The update indices by numpy, by what is in use, by plain Paddle on a CPU and on a device, and in a graph."""
    layout, tensor = SeqLayout(tokens.shape[1]), paddle.to_tensor(tokens)
    for source, long in ((tokens, 0), (tokens, tokens.size + 1), (tensor, 0)):
        with mock.patch.object(host, "LONG", long):
            yield plan_visual(source, placeholders, layout, sequence_first=False).update_indices.tolist()
    for found in plain_paddle_plans(tokens, placeholders, layout, False):
        yield found[0].tolist()
    yield plain.build_plan_of_any_length(tensor, None, placeholders, layout, False, False)[0].tolist()


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_an_id_that_tokens_cannot_hold_equals_none(dtype):
    """Exact: 2**32 + 7 is no 7, alone and beside an id that is there, in every implementation."""
    tokens = np.array([[7, 5, 0, 7]], dtype)
    for placeholders, expected in (((2**32 + 7,), []), ((2**32 + 7, 5), [1]), ((-(2**32) + 7, 2**32), [])):
        for found in every_way_to_plan(tokens, placeholders):
            assert found == expected
    counts = plain.joint_order(paddle.to_tensor(tokens), (2**32 + 7, 5), 0, 1)[1]
    assert counts.tolist() == [0, 1]


@pytest.mark.parametrize("length", [5, 64, 1000])
@pytest.mark.parametrize("byte", [2, 128, 255])
def test_any_byte_of_a_mask_but_0_is_a_visual_token(byte, length):
    """Exact, in every implementation, for every rank: a mask that was made by a view may hold any byte."""
    drawn = np.random.default_rng(0).random((2, 3 * length)) < 0.6
    mask = (drawn * np.array([1, byte] * 3 * length, np.uint8)[: 3 * length]).view(bool)
    for found in every_way_to_plan(mask, None):
        assert found == np.flatnonzero(drawn).tolist()
    for rank in range(3):
        layout = SeqLayout(3 * length, sp_size=3, sp_rank=rank)
        update, gather = oracle.pairs(drawn, layout.positions().tolist(), True)
        for tokens in (mask, paddle.to_tensor(mask)):
            plan = plan_visual(tokens, None, layout, sequence_first=True, num_features=int(drawn.sum()))
            assert [plan.update_indices.tolist(), plan.gather_indices.tolist()] == [update, gather]


@pytest.mark.parametrize("batch", [0, 1, 5])
@pytest.mark.parametrize("seq_len", [0, 6])
@pytest.mark.parametrize("padded", [False, True])
def test_a_batch_without_visual_tokens_is_a_plan_like_any_other(batch, seq_len, padded):
    """Exact: empty arrays, counts of zero, no batch or no sequence at all included."""
    ids = np.zeros((batch, seq_len), dtype=np.int64)
    for tokens in (ids, paddle.to_tensor(ids)):
        layout = SeqLayout(seq_len, sp_size=2, sp_rank=1)
        plan = plan_visual(tokens, KINDS, layout, sequence_first=True, num_features=0, padded=padded)
        assert tuple(plan.update_indices.shape) == tuple(plan.gather_indices.shape) == (0,)
        assert plan.counts.tolist() == [0, 0]
        plan.check()


def test_a_view_that_is_not_contiguous_is_read_right():
    """Exact."""
    mask = paddle.to_tensor(np.array([[1, 0], [0, 1], [1, 1]], dtype=bool)).t()
    assert not mask.is_contiguous()
    plan = plan_visual(mask, None, SeqLayout(3), sequence_first=False)
    assert plan.update_indices.tolist() == [0, 2, 4, 5]


@pytest.mark.parametrize("tensor", [False, True])
def test_a_padded_plan_tells_a_mismatch_when_asked(tensor):
    """Cut to the rows that there are, and an error with both numbers only when asked."""
    ids = np.array([[IMAGE, 0, IMAGE, IMAGE]])
    plan = plan_visual(
        paddle.to_tensor(ids) if tensor else ids, KINDS, SeqLayout(4), sequence_first=False, num_features=2, padded=True
    )
    assert plan.gather_indices.tolist() == [0, 1]
    with pytest.raises(ValueError, match="the batch has 3 visual tokens but 2 feature rows"):
        plan.check()


def test_a_plan_on_the_host_goes_to_a_device():
    """Exact: arrays, shape and counts, also counts that the arrays alone do not tell."""
    ids = np.array([[0, IMAGE, IMAGE, 0]])
    for padded, number in ((False, 2), (True, 2), (True, 1), (True, 5), (True, None)):
        plan = plan_visual(ids, KINDS, SeqLayout(4), sequence_first=False, num_features=number, padded=padded)
        moved = plan.to("cpu")
        assert plan.on_host
        assert not moved.on_host
        assert moved.update_indices.tolist() == plan.update_indices.tolist()
        assert moved.counts.tolist() == plan.counts.tolist() == [2, 2]
        assert moved.row_shape == plan.row_shape
        if number == 2:
            moved.check()
            continue
        with pytest.raises(ValueError, match="2 visual tokens"):
            moved.check()


@pytest.mark.parametrize("make", [np.array, paddle.to_tensor])
def test_a_plan_that_travelled_as_arrays(make):
    """Exact shape and counts; arrays that are not 1-D are refused."""
    plan = VisualPlan.from_indices(make([1, 3, -1]), make([0, 2, -1]), [2, 3], 4)
    assert plan.row_shape == (2, 3)
    assert plan.num_rows == 6
    assert plan.counts.tolist() == [2, 4]
    with pytest.raises(ValueError, match=r"1-D and of one length, got \[2, 1\] and \[2, 1\]; squeeze"):
        VisualPlan.from_indices(make([[1], [3]]), make([[0], [2]]), [2, 3], 4)


def test_a_list_is_no_array():
    """Refused with the type that was got."""
    with pytest.raises(ValueError, match=r"numpy array or a Paddle tensor .* got list"):
        plan_visual([[0, IMAGE]], KINDS, SeqLayout(2), sequence_first=False)


def test_plans_compare_by_identity():
    """Equal content is not the same plan; plans can be in sets."""
    plans = [plan_visual(np.ones((1, 4), dtype=bool), None, SeqLayout(4), sequence_first=False) for _ in range(2)]
    assert plans[0] != plans[1]
    assert len({*plans, plans[0]}) == 2


IDS = np.array([[0, IMAGE, IMAGE, 0]])


@pytest.mark.parametrize("tensor", [False, True])
@pytest.mark.parametrize(
    ("tokens", "placeholders", "layout", "num_features", "message"),
    [
        (IDS, IMAGE, SeqLayout(4), None, "one or more integers, .* got 151655"),
        (IDS[0], KINDS, SeqLayout(4), None, r"tokens must be \[B, S\], got shape \[4\]"),
        (IDS.astype(np.float32), KINDS, SeqLayout(4), None, "must be int32 or int64 ids, got float32"),
        (IDS, None, SeqLayout(4), None, "without placeholder_ids, tokens must be a bool mask, got int64"),
        (IDS == IMAGE, KINDS, SeqLayout(4), None, "must be int32 or int64 ids, got bool"),
        (IDS, (), SeqLayout(4), None, "one or more integers"),
        (IDS, (IMAGE, None), SeqLayout(4), None, "one or more integers"),
        (IDS, KINDS, SeqLayout(8), None, r"tokens are \[1, 4\] but the layout is for seq_len 8"),
        (np.tile(IDS, (2, 1)), KINDS, SeqLayout(4, cu_seqlens=(0, 4)), None, "B = 1, got tokens with B = 2"),
        (IDS, KINDS, SeqLayout(4), 1, "the batch has 2 visual tokens but 1 feature rows"),
        (IDS, KINDS, SeqLayout(4), 3, "the batch has 2 visual tokens but 3 feature rows"),
        (IDS, KINDS, SeqLayout(4), -2, "num_features must not be negative, got -2"),
    ],
)
def test_refusals_say_what_was_got_and_what_was_expected(tensor, tokens, placeholders, layout, num_features, message):
    """Refused alike on the host and on a device."""
    if tensor:
        tokens = paddle.to_tensor(tokens)
    with pytest.raises(ValueError, match=message):
        plan_visual(tokens, placeholders, layout, sequence_first=False, num_features=num_features)


def test_a_padded_plan_that_was_not_told_cannot_be_checked():
    """An error with the count and the argument that was left out."""
    plan = plan_visual(np.array([[IMAGE, 0]]), KINDS, SeqLayout(2), sequence_first=False, padded=True)
    with pytest.raises(
        ValueError,
        match="not given the number of feature rows, so its 1 visual tokens cannot be",
    ):
        plan.check()


@pytest.mark.parametrize("make", [np.array, paddle.to_tensor])
def test_a_travelled_plan_is_held_against_the_features_that_are_there(make):
    """Exact, or an error with both numbers."""
    arrays = make([1, 3]), make([0, 1])
    assert VisualPlan.from_indices(*arrays, (1, 4), 2, visual=2).num_features == 2
    for rows in (1, 5):
        with pytest.raises(ValueError, match=f"the batch has 2 visual tokens but {rows} feature rows"):
            VisualPlan.from_indices(*arrays, (1, 4), rows, visual=2)


def test_what_travelled_without_a_kind_of_its_own():
    """An empty array of a batch of text, and unsigned indices."""
    assert VisualPlan.from_indices(np.array([]), np.array([]), (1, 4), 0).counts.tolist() == [0, 0]
    unsigned = np.array([1, 2], np.uint64)
    assert VisualPlan.from_indices(unsigned, unsigned - np.uint64(1), (1, 4), 2).counts.tolist() == [2, 2]


@pytest.mark.parametrize(
    ("update", "gather"),
    [([1, 1], [0, 1]), ([1, 2], [1, 1]), ([1, 2], [1, 0]), ([1, 4], [0, 1]), ([1, 2], [0, 2]), ([1, 2], [-1, 0])],
)
def test_pairs_on_the_host_that_are_no_plan_are_refused(update, gather):
    """Refused before a device is asked, one for each thing that row functions take for granted."""
    with pytest.raises(ValueError, match="not a plan for 4 rows and 2 feature rows"):
        VisualPlan.from_indices(np.array(update), np.array(gather), (1, 4), 2)
