"""The deepstack layers against PaddleFormers' own: the same bits where it is right, and right where it is not."""

import contextlib
from unittest import mock

import numpy as np
import paddle
import pytest
from fleet_cases import GATHER, LEVELS, MASK, UPDATE
from formers_layer import formers_layer

import oracle
from arrays import drawn, same_bits
from fleet_parts import FULL_RECOMPUTE, WIDTH, build_layer, fleet_config
from groups import topology_of
from paddle_vl_sp import SeqLayout, plan_visual
from paddle_vl_sp.testing import FakeGroup

DTYPES = ["float32", "float16", "bfloat16"]


@contextlib.contextmanager
def as_rank(rank, size):
    """One rank of a tensor-parallel group as both see it: parallel_state for us, the hybrid group for PaddleFormers."""
    from paddlefleet import parallel_state

    group = FakeGroup(rank, size)
    with (
        mock.patch.object(parallel_state, "get_tensor_model_parallel_group", return_value=group),
        mock.patch("paddle.distributed.fleet.get_hybrid_communicate_group", return_value=topology_of(group)),
        mock.patch("paddle.distributed.is_initialized", return_value=True),
    ):
        yield group


def made_layer(cls=None, layer_number=0, **given):
    from paddle_vl_sp.fleet import deepstack_layer

    return build_layer(cls or deepstack_layer(formers_layer()), fleet_config(**given), layer_number)


def some_mask(batch, seq_len, density, seed):
    return np.random.default_rng(seed).random((batch, seq_len)) < density


@pytest.mark.parametrize("size", [1, 2, 4, 8])
@pytest.mark.parametrize("batch", [1, 2, 3, 8])
def test_deepstack_process_has_formers_bits(size, batch):
    """Equal bits on every rank, all text, all visual, few and many: PaddleFormers' method against ours, fp32."""
    upstream, layer = formers_layer(), made_layer(sequence_parallel=True)
    theirs = build_layer(upstream, fleet_config(sequence_parallel=True))
    seen_empty = False
    for density in (0.0, 0.1, 0.5, 1.0):
        mask = some_mask(batch, 16, density, seed=batch)
        levels = drawn([int(mask.sum()), WIDTH], seed=1)
        hidden = drawn([batch, 16, WIDTH], seed=2)
        for rank in range(size):
            positions = oracle.cut_positions(16, 1, 0, "zigzag", size, rank)
            seen_empty |= not mask[:, positions].any()
            part = paddle.to_tensor(oracle.cut(hidden.numpy(), positions, True))
            with as_rank(rank, size):
                got = layer._deepstack_process(part, paddle.to_tensor(mask), levels)
                expected = theirs._deepstack_process(part, paddle.to_tensor(mask), levels)
            assert same_bits(got, expected)
    assert seen_empty


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("flat", [False, True])
def test_deepstack_process_without_sp_has_formers_bits(flat, dtype):
    """Equal bits for [B, S, H] and for flattened hidden states, and for features of another dtype."""
    mask = some_mask(3, 8, 0.4, seed=5)
    hidden = drawn([24, WIDTH] if flat else [3, 8, WIDTH])
    levels = drawn([int(mask.sum()), WIDTH], dtype, seed=1)
    theirs = build_layer(formers_layer(), fleet_config(), 0)
    expected = theirs._deepstack_process(hidden, paddle.to_tensor(mask), levels)
    assert same_bits(made_layer()._deepstack_process(hidden, paddle.to_tensor(mask), levels), expected)


@pytest.mark.parametrize("size", [2, 4])
def test_flattened_hidden_states_under_sp_have_formers_bits(size):
    """Equal bits: flattened hidden states of a rank go sample by sample."""
    mask = some_mask(3, 8, 0.4, seed=5)
    levels = drawn([int(mask.sum()), WIDTH], seed=1)
    theirs = build_layer(formers_layer(), fleet_config(sequence_parallel=True), 0)
    for rank in range(size):
        hidden = drawn([24 // size, WIDTH], seed=rank)
        with as_rank(rank, size):
            expected = theirs._deepstack_process(hidden, paddle.to_tensor(mask), levels)
            got = made_layer(sequence_parallel=True)._deepstack_process(hidden, paddle.to_tensor(mask), levels)
        assert same_bits(got, expected)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_sixteen_bit_sums_are_rounded_once(dtype):
    """Exact sum in fp32, one rounding; PaddleFormers' own method has no CPU kernel for these."""
    mask = some_mask(2, 8, 0.5, seed=1)
    hidden, levels = drawn([2, 8, WIDTH], dtype), drawn([int(mask.sum()), WIDTH], dtype, seed=1)
    expected = hidden.astype("float32").numpy()
    expected[mask] += levels.astype("float32").numpy()
    got = made_layer()._deepstack_process(hidden, paddle.to_tensor(mask), levels)
    assert same_bits(got, paddle.to_tensor(expected).astype(dtype))


@pytest.mark.parametrize("size", [2, 4])
def test_column_slices_as_formers(size):
    """Equal bits where hidden states are cut along H: each rank adds its own columns."""
    mask = some_mask(2, 6, 0.5, seed=2)
    levels = drawn([int(mask.sum()), 8], seed=1)
    hidden = drawn([2, 6, 8 // size])
    theirs = build_layer(formers_layer(), fleet_config(), 0)
    for rank in range(size):
        with as_rank(rank, size):
            expected = theirs._deepstack_process(hidden, paddle.to_tensor(mask), levels)
            assert same_bits(made_layer()._deepstack_process(hidden, paddle.to_tensor(mask), levels), expected)
    with pytest.raises(ValueError, match=r"8 wide and hidden states 4: not the columns .*\(no group\)"):
        made_layer()._deepstack_process(drawn([2, 6, 4]), paddle.to_tensor(mask), levels)


def a_dict(mask, num_levels, rank=0, size=1, sequence_first=False, with_indices=True, seed=0):
    """What the embedding of one rank returns, and the level list."""
    positions = oracle.cut_positions(mask.shape[1], 1, 0, "zigzag", size, rank)
    hidden = np.random.default_rng(seed).standard_normal((*mask.shape, WIDTH)).astype(np.float32)
    levels = [drawn([int(mask.sum()), WIDTH], seed=10 + i, stop_gradient=False) for i in range(num_levels)]
    given = {"hidden_states": paddle.to_tensor(oracle.cut(hidden, positions, sequence_first), stop_gradient=False)}
    given |= {MASK: paddle.to_tensor(mask), LEVELS: levels, "attention_mask": paddle.ones([1])}
    if with_indices:
        layout = SeqLayout(mask.shape[1], sp_size=size, sp_rank=rank)
        plan = plan_visual(paddle.to_tensor(mask), None, layout, sequence_first=sequence_first)
        given |= {UPDATE: plan.update_indices, GATHER: plan.gather_indices}
    return given, levels, hidden


def through(layers, dict_args):
    for layer in layers:
        dict_args = layer(dict_args)
    return dict_args


@pytest.mark.parametrize("full_recompute", [False, True])
@pytest.mark.parametrize("with_indices", [True, False], ids=["indices", "mask only"])
@pytest.mark.parametrize("num_empty", [0, 1, 2])
def test_a_stack_of_layers_adds_every_level_once(num_empty, with_indices, full_recompute):
    """Sums of three levels on their own layers; bit-exact against PaddleFormers' layers where no empty layer shifts."""
    mask = some_mask(2, 8, 0.5, seed=3)
    given, levels, hidden = a_dict(mask, 3, with_indices=with_indices)
    given["hidden_states"] = given["hidden_states"] * 1.0  # recompute of a layer that does nothing takes no leaf
    more = {"num_empty_layers_add_in_head": num_empty, **(FULL_RECOMPUTE if full_recompute else {})}
    layers = [made_layer(None, i + num_empty, **more) for i in range(5)]
    out = through(layers, dict(given))
    expected = hidden.copy()
    for level in levels:
        expected[mask] += level.numpy()
    assert same_bits(out["hidden_states"], expected)
    theirs = [build_layer(formers_layer(), fleet_config(**more), i + num_empty) for i in range(5)]
    upstream = through(theirs, {key: value for key, value in given.items() if key not in (UPDATE, GATHER)})
    assert same_bits(upstream["hidden_states"], expected) == (num_empty == 0)
    out["hidden_states"].sum().backward()
    assert all(same_bits(level.grad, np.ones_like(level.numpy())) for level in levels)


class Keeping(paddle.nn.Layer):
    """A layer that remembers its output: the hidden states themselves, or their double."""

    def __init__(self, config, sublayers_spec, layer_number):
        super().__init__()
        self.config, self.layer_number = config, layer_number

    def forward(self, dict_args):
        hidden = dict_args["hidden_states"]
        self.kept = hidden * 2 if self.layer_number else hidden
        return dict_args | {"hidden_states": self.kept}


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("is_leaf", [False, True])
def test_in_place_writes_the_layers_output_and_no_leaf(inplace, is_leaf):
    """Bit-exact sum and gradients; what the layer keeps is written only where that was asked for, and never a leaf."""
    from paddle_vl_sp.fleet import VisualDeepstack

    cls = type("KeepingTransformerLayer", (VisualDeepstack, Keeping), {"inplace": inplace})
    mask = some_mask(2, 8, 0.5, seed=3)
    given, levels, hidden = a_dict(mask, 2)
    layer = made_layer(cls, 0 if is_leaf else 1)
    out = layer(given)["hidden_states"]
    before = hidden if is_leaf else 2 * hidden
    expected = before.copy()
    expected[mask] += levels[layer.layer_number].numpy()
    assert same_bits(out, expected)
    assert (out is layer.kept) == (inplace and not is_leaf)
    assert same_bits(layer.kept, expected if inplace and not is_leaf else before)
    out.sum().backward()
    assert same_bits(levels[layer.layer_number].grad, np.ones_like(levels[0].numpy()))
    assert same_bits(given["hidden_states"].grad, np.full_like(hidden, 1 if is_leaf else 2))


def test_everything_visual_leaves_with_the_last_level_and_nothing_before():
    """The caller's dict stays as it was; the last deepstack layer drops all four keys, or the first where none is."""
    mask = some_mask(2, 8, 0.5, seed=3)
    given, _, _ = a_dict(mask, 2)
    before = dict(given)
    first = made_layer(None, 0)(given)
    assert given == before
    assert set(first) == set(given)
    assert first[UPDATE] is given[UPDATE]
    assert [level.stop_gradient for level in first[LEVELS]] == [True, False]  # what is added owes no gradient any more
    last = made_layer(None, 1)(first)
    assert set(last) == {"hidden_states", "attention_mask"}
    without_levels = {key: value for key, value in given.items() if key != LEVELS}
    assert set(made_layer(None, 0)(without_levels)) == {"hidden_states", "attention_mask"}


@pytest.mark.parametrize("stages", [1, 2])
def test_where_only_the_mask_arrives_the_first_layer_plans(monkeypatch, stages):
    """One index build for all layers, and bit-exact sums; in pipelines with arrays of one length."""
    from paddle_vl_sp.fleet import deepstack

    built = []
    real = deepstack.plan_visual
    monkeypatch.setattr(deepstack, "plan_visual", lambda *args, **kwargs: built.append(1) or real(*args, **kwargs))
    mask = some_mask(2, 8, 0.5, seed=3)
    given, levels, hidden = a_dict(mask, 3, with_indices=False)
    layers = [made_layer(None, i, pipeline_model_parallel_size=stages) for i in range(3)]
    out = through(layers, given)
    assert len(built) == 1
    for level in levels:
        hidden[mask] += level.numpy()
    assert same_bits(out["hidden_states"], hidden)
    carried = layers[0](given)
    assert {carried[key].shape[0] for key in (UPDATE, GATHER)} == {int(mask.sum()) if stages == 1 else 16}


@pytest.mark.parametrize("with_indices", [True, False], ids=["indices", "mask only"])
@pytest.mark.parametrize("size", [2, 8])
def test_a_stack_under_sp_has_formers_bits_and_every_gradient(monkeypatch, size, with_indices):
    """Bit-exact forward on every rank, [S_local, B, H]; the ranks' level gradients sum to the whole, exactly.

    With the mask only, the layers sum over the ranks by themselves: here by a group that adds nothing.
    """
    monkeypatch.setattr("paddle_vl_sp.comm.collectives.all_reduce_sum", lambda x, _: x)
    mask = some_mask(3, 16, 0.3, seed=7)
    slope = drawn([16, 3, WIDTH], seed=9).numpy()
    total = [0, 0]
    for rank in range(size):
        given, levels, _ = a_dict(mask, 2, rank, size, True, with_indices)
        part = slice(rank * 16 // size, (rank + 1) * 16 // size)
        with as_rank(rank, size):
            out = through([made_layer(None, i, sequence_parallel=True) for i in range(3)], dict(given))
            theirs = [build_layer(formers_layer(), fleet_config(sequence_parallel=True), i) for i in range(3)]
            upstream = through(theirs, {key: value for key, value in given.items() if key not in (UPDATE, GATHER)})
        assert same_bits(out["hidden_states"], upstream["hidden_states"])
        (out["hidden_states"] * paddle.to_tensor(slope[part])).sum().backward()
        total = [so_far + level.grad.numpy() for so_far, level in zip(total, levels, strict=True)]
    for gradient in total:
        assert same_bits(gradient, slope.transpose(1, 0, 2)[mask])


def test_a_plan_for_other_hidden_states_is_refused():
    """Refused before anything is added, with both shapes or numbers."""
    given, levels, _ = a_dict(some_mask(2, 8, 0.5, seed=3), 1)
    with pytest.raises(ValueError, match=r"visual tokens but \d+ feature rows"):
        made_layer()(given | {LEVELS: [levels[0][:-1]], UPDATE: None, GATHER: None})
    with pytest.raises(ValueError, match=f"without {UPDATE} and {GATHER} and without {MASK}"):
        made_layer()({key: value for key, value in given.items() if key not in (UPDATE, GATHER, MASK)})
    with pytest.raises(ValueError, match=r"the plan is for hidden states \[2, 2\] .* got \[2, 8, 6\]"):
        made_layer(sequence_parallel=True)(given)
    with as_rank(0, 2), pytest.raises(ValueError, match=r"the plan is for hidden states \[4, 2\]"):
        made_layer(sequence_parallel=True)(given | {UPDATE: None, GATHER: None})


def test_the_ready_classes_and_their_names():
    """Pipelines cut at names with TransformerLayer in them; the same base gives the same class."""
    from paddlefleet.transformer.transformer_layer import TransformerLayer

    from paddle_vl_sp import fleet

    assert issubclass(fleet.VisualTransformerLayer, TransformerLayer)
    assert fleet.VisualTransformerLayer is fleet.deepstack_layer(TransformerLayer)
    assert fleet.VisualTransformerLayer.__name__ == "VisualTransformerLayer"
    assert fleet.deepstack_layer(formers_layer()).__name__ == "VisualQwen3VLTextTransformerLayer"
    with pytest.raises(ValueError, match="TransformerLayer' in the class name"):
        fleet.deepstack_layer(type("Block", (TransformerLayer,), {}))


def test_the_layer_of_paddlefleet_itself():
    """Bit-exact: the copy of the Qwen3-VL layer that newer PaddleFleets have, as a base."""
    from paddle_vl_sp import fleet

    try:
        cls = fleet.VisualQwen3VLTextTransformerLayer
    except ImportError as error:
        pytest.skip(str(error))
    mask = some_mask(2, 8, 0.5, seed=3)
    given, levels, hidden = a_dict(mask, 2)
    out = through([made_layer(cls, i) for i in range(3)], given)
    for level in levels:
        hidden[mask] += level.numpy()
    assert same_bits(out["hidden_states"], hidden)
