"""A group of one, or none: nobody to talk to, everything is as it came, and errors are raised as they are."""

import functools
from unittest import mock

import paddle
import pytest

import tiny_tower
from paddle_vl_sp import (
    agree,
    all_gather_rows,
    check_replicas,
    complete_grad,
    encode_shared,
    plan_visual,
    plan_visual_local,
    sum_parameter_grads,
    sync_replicas,
)
from paddle_vl_sp.comm import collectives
from paddle_vl_sp.layout import SeqLayout
from paddle_vl_sp.testing import FakeGroup

alone = pytest.mark.parametrize("group", [None, FakeGroup(0, 1)], ids=["no group", "a group of one"])


@alone
def test_gathers_hand_back_what_they_got(group):
    """Identity; wrong counts are refused all the same."""
    x = paddle.ones([3, 2])
    assert all_gather_rows(x, [3], group) is x
    with pytest.raises(ValueError, match="counts must be the rows of each of 1 ranks"):
        all_gather_rows(x, [3, 1], group)
    with pytest.raises(ValueError, match=r"rank 0 has \[3\] rows in x but counts says 2"):
        all_gather_rows(x, [2], group, check=True)


@alone
def test_an_error_is_raised_as_it_is(group):
    """Identity of the error."""
    agree(None, group)
    error = KeyError("mine")
    with pytest.raises(KeyError) as raised:
        agree(error, group)
    assert raised.value is error


@alone
def test_replicas_cannot_differ(group):
    """No drift, and nothing to make equal."""
    model = paddle.nn.Linear(2, 2)
    assert check_replicas(model, group) == []
    sync_replicas(model, group)


def test_no_group_is_nothing_to_tell_in_one_process():
    """No warning."""
    model = paddle.nn.Linear(2, 2)
    with mock.patch.object(collectives, "logger") as logger:
        agree(None, None)
        check_replicas(model, None)
        sync_replicas(model, None)
        sum_parameter_grads(model, None)
    logger.warning.assert_not_called()


@alone
def test_gradients_are_whole_already(group):
    """Exact for parameters, identity for levels."""
    model = paddle.nn.Linear(2, 2)
    model(paddle.ones([1, 2])).sum().backward()
    before = model.weight.grad.numpy()
    sum_parameter_grads(model, group)
    assert (model.weight.grad.numpy() == before).all()
    ids = paddle.to_tensor([[1, 9, 9, 1]])
    plan = plan_visual_local(ids, (9,), SeqLayout(4), group=group, num_features=2, sequence_first=True)
    level = paddle.ones([2, 3])
    level.stop_gradient = False
    assert complete_grad([level], plan, group)[0] is level


@alone
def test_the_tower_encodes_all(group):
    """Exact, the tower's own features; wrong pixels are refused all the same."""
    tower, grid = tiny_tower.tower(), paddle.to_tensor([[1, 4, 4], [1, 2, 4]])
    pixels = tiny_tower.pixels(grid.tolist())
    wanted, got = tower(pixels, grid), encode_shared(tower, pixels, grid, group=group, merge_size=tiny_tower.MERGE)
    assert (got[0].numpy() == wanted[0].numpy()).all()
    with pytest.raises(ValueError, match="grid_thw has 24 patches but pixel_values 23 rows"):
        encode_shared(tower, pixels[:-1], grid, group=group, merge_size=tiny_tower.MERGE)


@alone
def test_by_a_plan_levels_are_those_of_its_rows(group):
    """Exact: of features that enter before the cut all rows, of levels three of six; without levels, features alone."""
    tower, grid = tiny_tower.tower(), paddle.to_tensor([[1, 4, 4], [1, 2, 4]])
    pixels = tiny_tower.pixels(grid.tolist())
    layout = SeqLayout(8, sp_size=2, sp_rank=1)
    plan = plan_visual(paddle.to_tensor([[9, 9, 1, 9, 9, 1, 9, 9]]), (9,), layout, sequence_first=False)
    wanted, by_level = tower(pixels, grid)
    share = functools.partial(encode_shared, group=group, merge_size=tiny_tower.MERGE, grad="whole", plan=plan)
    (features, levels), own = share(tower, pixels, grid)
    assert (features.numpy() == wanted.numpy()).all()
    assert all((x.numpy() == whole.numpy()[3:]).all() for x, whole in zip(levels, by_level, strict=True))
    assert own.gather_indices.tolist() == [0, 1, 2]
    features, _ = share(lambda *given: tower(*given)[0], pixels, grid)
    assert (features.numpy() == wanted.numpy()).all()


def test_levels_of_another_dtype_are_refused():
    """Refused before anything travels."""
    grid = paddle.to_tensor([[1, 4, 4]])

    def encode(pixels, grid):
        return paddle.ones([4, 2]), [paddle.ones([4, 2], "float64")]

    with pytest.raises(ValueError, match="features and levels must have one dtype"):
        encode_shared(encode, tiny_tower.pixels(grid.tolist()), grid, group=None, merge_size=tiny_tower.MERGE)
