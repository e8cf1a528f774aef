"""The replaced _deepstack_process, called with a mask, or with columns of another width."""

from types import SimpleNamespace

import numpy as np
import paddle
import pytest
from paddleformers.transformers.qwen3_vl.modeling import Qwen3VLTextModel

from paddle_vl_sp import SeqLayout, plan_visual
from paddle_vl_sp.formers import DiffersFromUpstream, apply_to_qwen3_vl, deepstack, norms
from paddle_vl_sp.formers.deepstack import OWN_ROWS, OwnRows
from paddle_vl_sp.verify import check_result

MASK = np.random.default_rng(0).random((2, 8)) < 0.5
MODEL = SimpleNamespace(config=SimpleNamespace(sequence_parallel=False))


def called(mask, hidden, embeds):
    return Qwen3VLTextModel._deepstack_process(MODEL, hidden, mask, embeds).numpy()


def test_a_mask_goes_to_the_original():
    """Bit-exact: somebody's own loop over the layers hands on a mask."""
    hidden, embeds = paddle.randn([2, 8, 4]), paddle.randn([int(MASK.sum()), 4])
    mask = paddle.to_tensor(MASK)
    upstream = called(mask, hidden.clone(), embeds)
    with apply_to_qwen3_vl():
        assert (called(mask, hidden.clone(), embeds) == upstream).all()
        plan = plan_visual(mask, None, SeqLayout(8), sequence_first=False)
        with OWN_ROWS.given(OwnRows(mask, plan)):
            assert (called(mask, hidden.clone(), embeds) == upstream).all()
            assert (called(mask.detach(), hidden.clone(), embeds) == upstream).all()


def test_columns_of_another_width_are_the_originals_affair():
    """Of hidden states that are cut along H the original takes its columns, and ours asks it to."""
    plan = plan_visual(MASK, None, SeqLayout(8), sequence_first=False)
    seen = []
    ours = deepstack.deepstack(lambda _self, hidden, mask, embeds: seen.append(mask) or hidden)
    mask = paddle.to_tensor(MASK)
    with OWN_ROWS.given(OwnRows(mask, plan)):
        ours(None, paddle.zeros([2, 8, 4]), mask, paddle.zeros([int(MASK.sum()), 8]))
    assert seen[0] is mask


def test_another_mask_than_the_planned_one_goes_to_the_original():
    """The plan belongs to one mask: an equal copy of it elsewhere in memory is not it."""
    mask, seen = paddle.to_tensor(MASK), []
    ours = deepstack.deepstack(lambda _self, hidden, mask, embeds: seen.append(mask) or hidden)
    with OWN_ROWS.given(OwnRows(mask, plan_visual(mask, None, SeqLayout(8), sequence_first=False))):
        ours(None, paddle.zeros([2, 8, 4]), mask.clone(), paddle.ones([int(MASK.sum()), 4]))
    assert len(seen) == 1


def test_a_check_that_fails_says_by_how_much():
    """Exact numbers, or both shapes and dtypes."""
    one = paddle.ones([2, 3])
    with pytest.raises(DiffersFromUpstream, match=r"1 of 6 values differ, by 0\.5 at most"):
        check_result("it", one, paddle.to_tensor([[1, 1, 1], [1, 1.5, 1]], "float32"), "")
    with pytest.raises(DiffersFromUpstream, match=r"float32 \[2, 3\] against paddle\.float32 \[3, 2\]"):
        check_result("it", one, one.reshape([3, 2]), "")


def test_the_check_takes_nan_for_equal_to_nan():
    """In the same place: a model that has diverged does not blame this package."""
    x = paddle.to_tensor([float("nan"), 1.0, float("inf")])
    check_result("it", x, x.clone(), "")
    with pytest.raises(DiffersFromUpstream, match="2 of 3 values differ"):
        check_result("it", x, x[[1, 0, 2]], "")


def test_a_model_without_head_norms_is_a_line():
    """One line of the report, which says why."""
    (line,) = norms.mark_head_norms(paddle.nn.Linear(2, 2))
    assert line.why == "Linear has none of the plain classes'"
