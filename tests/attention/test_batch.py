"""The other arrays of a sequence, cut like it: against the slow way; pure movement, bit-exact."""

import numpy as np
import paddle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paddle_vl_sp import SeqLayout
from paddle_vl_sp.attention import pad_batch, padded_layout, shard_batch, token_losses, unshard
from paddle_vl_sp.testing import FakeGroup

LENGTHS = st.lists(st.integers(1, 12), min_size=1, max_size=5)
CUTS = st.fixed_dictionaries(
    {"cp_size": st.integers(1, 4), "cp_mode": st.sampled_from(["zigzag", "contiguous"]), "sp_size": st.integers(1, 3)}
)


def bounds_of(lengths):
    return tuple(np.cumsum([0, *lengths]).tolist())


def ranks_of(length, bounds, cut):
    for cp_rank in range(cut["cp_size"]):
        for sp_rank in range(cut["sp_size"]):
            yield padded_layout(length, cu_seqlens=bounds, cp_rank=cp_rank, sp_rank=sp_rank, **cut)


@settings(max_examples=100, deadline=None)
@given(LENGTHS, CUTS)
def test_the_padded_layout_is_the_shortest(lengths, cut):
    """Exact: each segment grows to the next multiple that the cp cut takes, and only the last grows further, for sp."""
    layout = padded_layout(sum(lengths), cu_seqlens=bounds_of(lengths), **cut)
    chunks = 2 if cut["cp_mode"] == "zigzag" and cut["cp_size"] > 1 else 1
    multiple = chunks * cut["cp_size"]
    padded = layout.segments()[:, 1].tolist()
    assert padded[:-1] == [-(-n // multiple) * multiple for n in lengths[:-1]]
    assert padded[-1] >= lengths[-1]
    total_multiple = cut["cp_size"] * np.lcm(chunks, cut["sp_size"])
    assert layout.seq_len - sum(padded[:-1]) - lengths[-1] < multiple + total_multiple
    assert padded_layout(sum(lengths), **cut).seq_len == -(-sum(lengths) // total_multiple) * total_multiple


@settings(max_examples=60, deadline=None)
@given(LENGTHS, CUTS, st.booleans(), st.booleans())
def test_shares_equal_the_slow_way(lengths, cut, shift, on_paddle):
    """Exact: pad every segment by hand, shift inside each, then take the rank's positions; numpy and Paddle alike."""
    length, bounds = sum(lengths), bounds_of(lengths)
    ids = np.arange(100, 100 + length)[None]
    batch = {"input_ids": ids, "position_ids": np.stack([ids, -ids, 2 * ids]), "labels": ids, "loss_weights": ids / 3}
    layouts = list(ranks_of(length, bounds, cut))
    padded = {
        name: np.full((*x.shape[:-1], layouts[0].seq_len), {"labels": -100}.get(name, 0), x.dtype)
        for name, x in batch.items()
    }
    for (start, _), first, end in zip(layouts[0].segments().tolist(), bounds, bounds[1:], strict=False):
        for name, x in batch.items():
            values = x[..., first:end]
            if name in ("labels", "loss_weights") and shift:
                values = np.append(values[..., 1:], [[-100 if name == "labels" else 0]], axis=-1)
            padded[name][..., start : start + end - first] = values
    given_batch = {name: paddle.to_tensor(x) for name, x in batch.items()} if on_paddle else batch
    for layout in layouts:
        share = shard_batch(given_batch, layout, cu_seqlens=bounds, shift_labels=shift)
        for name, whole in padded.items():
            assert isinstance(share[name], paddle.Tensor if on_paddle else np.ndarray)
            np.testing.assert_array_equal(np.asarray(share[name]), whole[..., layout.positions()])


def test_worked_example():
    """The example of the docstring, for rank 1."""
    layout = padded_layout(5, cu_seqlens=(0, 3, 5), cp_size=2, cp_rank=1)
    assert layout.cu_seqlens == (0, 4, 8)
    share = shard_batch({"input_ids": np.array([[1, 2, 3, 4, 5]])}, layout, cu_seqlens=(0, 3, 5))
    assert share["input_ids"].tolist() == [[2, 3, 5, 0]]


def test_a_known_name_is_padded_with_what_is_asked_for():
    """Exact: padding= goes before the table of known names, and touches no other."""
    batch = {"input_ids": np.arange(1, 6)[None], "position_ids": np.arange(1, 6)[None]}
    for each in (batch, {name: paddle.to_tensor(x) for name, x in batch.items()}):
        share = shard_batch(each, padded_layout(5, cp_size=2), padding={"input_ids": 9})
        assert share["input_ids"].tolist() == [[1, 2, 9, 9]]
        assert share["position_ids"].tolist() == [[1, 2, 0, 0]]


@settings(max_examples=30, deadline=None)
@given(LENGTHS, CUTS, st.booleans())
def test_padded_first_and_cut_then_is_the_same(lengths, cut, shift):
    """Exact, on every rank; the padded batch is the same on all, and its real tokens are in their order."""
    length, bounds = sum(lengths), bounds_of(lengths)
    ids = np.arange(1, length + 1)[None]
    batch = {"input_ids": ids, "labels": ids, "pixel_values": np.zeros((3, 2))}
    for layout in ranks_of(length, bounds, cut):
        padded = pad_batch(batch, layout, cu_seqlens=bounds, shift_labels=shift)
        assert padded["input_ids"].shape == (1, layout.seq_len)
        assert padded["input_ids"][padded["input_ids"] > 0].tolist() == ids[0].tolist()
        at_once = shard_batch(batch, layout, cu_seqlens=bounds, shift_labels=shift)
        for name, share in shard_batch(padded, layout).items():
            np.testing.assert_array_equal(share, at_once[name])


def test_batch_of_more_than_one_and_padding_at_the_end():
    """Exact: without cu_seqlens the arrays are padded at their end, for each sample alike."""
    layout = padded_layout(5, cp_size=2, cp_rank=0)
    share = shard_batch({"input_ids": np.arange(1, 11).reshape(2, 5), "attention_mask": np.ones((2, 5), bool)}, layout)
    assert share["input_ids"].tolist() == [[1, 2, 0, 0], [6, 7, 0, 0]]
    assert share["attention_mask"].tolist() == [[True, True, False, False]] * 2


def test_what_has_no_sequence_is_whole_and_the_rest_must_be_named():
    """Identity for what is whole, exact for what is cut, and an error that names what is neither."""
    layout = SeqLayout(4, cp_size=2)
    pixels = np.zeros((7, 3))
    batch = {"input_ids": np.arange(4)[None], "pixel_values": pixels, "note": "text", "nothing": None}
    share = shard_batch(batch, layout)
    assert share["pixel_values"] is pixels
    assert (share["note"], share["nothing"]) == ("text", None)
    with pytest.raises(ValueError, match=r"does not know 'domain' \[1, 4\]: name it in whole=.*padding="):
        shard_batch({**batch, "domain": np.ones((1, 4))}, layout)
    named = shard_batch(
        {"domain": np.arange(4)[None], "table": pixels}, layout, padding={"domain": -1}, whole=["table"]
    )
    assert named["domain"].tolist() == [[0, 3]]
    assert named["table"] is pixels
    with pytest.raises(ValueError, match=r"attention_mask \[1, 1, 4, 4\] cannot be cut, only .B, S. can: leave it out"):
        shard_batch({"attention_mask": np.ones((1, 1, 4, 4))}, layout)


@pytest.mark.parametrize("name", ["loss_mask", "loss_weights"])
def test_what_says_which_labels_count_is_shifted_with_them(name):
    """A prompt 5 6 and its answer 7 8, packed behind another sample: trained on 7 and 8, predicted from 6 and 7."""
    batch = {"input_ids": np.array([[1, 2, 5, 6, 7, 8]]), name: np.array([[0, 1, 0, 0, 1, 1]])}
    batch["labels"] = batch["input_ids"]
    share = shard_batch(batch, SeqLayout(6, cu_seqlens=(0, 2, 6)), shift_labels=True)
    assert share["labels"].tolist() == [[2, -100, 6, 7, 8, -100]]
    assert share[name].tolist() == [[1, 0, 0, 1, 1, 0]]
    assert shard_batch(batch, SeqLayout(6, cu_seqlens=(0, 2, 6)))[name].tolist() == batch[name].tolist()
    assert batch[name].tolist() == [[0, 1, 0, 0, 1, 1]]


def test_a_known_name_that_is_named_whole_is_whole():
    """Identity: the very arrays that were given."""
    layout = SeqLayout(4, sp_size=2, sp_rank=1)
    table, mask = np.arange(7), np.ones((1, 1, 4, 4))
    batch = {"input_ids": np.arange(4)[None], "token_type_ids": table, "attention_mask": mask, "loss_mask": [1, 2]}
    share = shard_batch(batch, layout, whole=["token_type_ids", "attention_mask", "loss_mask"])
    assert share["input_ids"].tolist() == [[2, 3]]
    assert share["token_type_ids"] is table
    assert share["attention_mask"] is mask
    assert share["loss_mask"] == [1, 2]


@pytest.mark.parametrize("value", [[[1, 2, 3, 4]], ((1, 2, 3, 4),), "1 2 3 4"])
def test_a_known_name_must_hold_an_array(value):
    """A list that is passed on uncut gives every rank the whole of it."""
    layout = SeqLayout(4, sp_size=2, sp_rank=1)
    with pytest.raises(ValueError, match=f"'labels' is a {type(value).__name__}, .*array or a tensor.*whole="):
        shard_batch({"input_ids": np.arange(4)[None], "labels": value}, layout)
    with pytest.raises(ValueError, match="'domain' is a "):
        shard_batch({"input_ids": np.arange(4)[None], "domain": value}, layout, padding={"domain": 0})
    assert shard_batch({"input_ids": np.arange(4)[None], "labels": None}, layout)["labels"] is None


def test_float16_arrays_on_the_cpu():
    """Exact: Paddle's CPU has no gather for float16."""
    x = paddle.to_tensor([[0.5, 65504.0, -3.0]], dtype="float16", stop_gradient=False)
    share = shard_batch({"loss_weights": x}, SeqLayout(4, sp_size=2, sp_rank=1))["loss_weights"]
    assert share.dtype == paddle.float16
    assert share.tolist() == [[-3.0, 0.0]]
    joined = unshard(x, SeqLayout(3), FakeGroup(0, 1), axis=1)
    assert joined.dtype == paddle.float16
    np.testing.assert_array_equal(joined.numpy(), x.numpy())
    assert paddle.grad((joined * 2).sum(), x)[0].tolist() == [[2, 2, 2]]


def test_the_input_is_not_written():
    """Exact: the caller's array after a shift that pads."""
    ids = np.arange(5)[None]
    shard_batch({"labels": ids, "input_ids": ids}, padded_layout(5, cp_size=2), shift_labels=True)
    assert ids.tolist() == [[0, 1, 2, 3, 4]]


def test_refused_boundaries():
    """Refused before anything is cut, with both numbers."""
    layout = padded_layout(12, cu_seqlens=(0, 5, 12), cp_size=2)
    ids = np.zeros((1, 12), "int64")
    with pytest.raises(
        ValueError, match="cu_seqlens ends at 16, but the arrays are 12 long: pass the boundaries before"
    ):
        shard_batch({"input_ids": ids}, layout)
    with pytest.raises(ValueError, match=r"through the layout's 2 segments, got \[0, 12\]: make the layout from it"):
        shard_batch({"input_ids": ids}, layout, cu_seqlens=(0, 12))
    with pytest.raises(ValueError, match="segment 0 of cu_seqlens has length 9, the layout has room for 1 to 8"):
        shard_batch({"input_ids": ids}, layout, cu_seqlens=(0, 9, 12))
    with pytest.raises(ValueError, match=r"one sequence length, got \{'input_ids': 12, 'labels': 11\}"):
        shard_batch({"input_ids": ids, "labels": ids[:, 1:]}, layout, cu_seqlens=(0, 5, 12))


def test_unshard_of_one_rank_takes_padding_out():
    """Exact, on a group of one; the gradient of padding is zero."""
    layout = padded_layout(5, cu_seqlens=(0, 3, 5), sp_size=1)
    wide = SeqLayout(8, cu_seqlens=(0, 4, 8))
    x = paddle.arange(8, dtype="float32").unsqueeze(0)
    x.stop_gradient = False
    joined = unshard(x, wide, FakeGroup(0, 1), axis=1, cu_seqlens=(0, 3, 5))
    assert joined.tolist() == [[0, 1, 2, 4, 5]]
    assert paddle.grad(joined.sum(), x)[0].tolist() == [[1, 1, 1, 0, 1, 1, 0, 0]]
    assert unshard(joined, layout, FakeGroup(0, 1), axis=-1).tolist() == joined.tolist()


def test_refused_unshard():
    """Refused before anything is sent: FakeGroup cannot send."""
    layout = SeqLayout(8, cp_size=2, cp_rank=1)
    x = paddle.zeros([1, 4])
    with pytest.raises(
        ValueError, match="all 2 x 1 ranks of the layout, and this rank as rank 1; the group says rank 0 of 2"
    ):
        unshard(x, layout, FakeGroup(0, 2), axis=1)
    with pytest.raises(ValueError, match=r"axis 0 of x \[1, 4\] must be this rank's 4 positions"):
        unshard(x, layout, FakeGroup(1, 2), axis=0)
    with pytest.raises(ValueError, match="grad must be one of 'partial', 'whole', got 'sum'"):
        unshard(x, layout, FakeGroup(1, 2), axis=1, grad="sum")


@pytest.mark.parametrize("on_paddle", [False, True])
def test_a_rank_without_positions_gets_empty_arrays(on_paddle):
    """remainder="front": three positions for four ranks."""
    layout = SeqLayout(3, sp_size=4, sp_rank=3, remainder="front")
    ids = np.arange(6).reshape(2, 3)
    share = shard_batch({"input_ids": paddle.to_tensor(ids) if on_paddle else ids}, layout)
    assert list(share["input_ids"].shape) == [2, 0]
    assert str(share["input_ids"].dtype).endswith("int64")


def test_a_rank_without_positions_has_no_loss_but_a_graph():
    """Shapes: the gradient is empty, not missing."""
    logits = paddle.zeros([2, 0, 5])
    logits.stop_gradient = False
    losses = token_losses(logits, paddle.zeros([2, 0], "int64"))
    assert losses.shape == [2, 0]
    losses.sum().backward()
    assert logits.grad.shape == [2, 0, 5]
