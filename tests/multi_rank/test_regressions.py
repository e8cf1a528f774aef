"""What has gone wrong elsewhere, one named test each. Bar: exact, or the error that names the numbers."""

import numpy as np
import paddle
import paddle.distributed as dist
import pytest

from groups import world
from paddle_vl_sp import SeqLayout, add_rows, joint_features, plan_visual, replace_rows
from paddle_vl_sp.comm.gather import all_gather_rows
from paddle_vl_sp.comm.grads import complete_grad, sum_parameter_grads
from paddle_vl_sp.comm.local_plan import plan_visual_local
from paddle_vl_sp.vision.parallel import encode_shared
from paddle_vl_sp.vision.share import share_images
from rank_cases import hold, pairs, same_error_everywhere
from tiny_tower import HIDDEN, MERGE, pixels, tower

IMAGE, VIDEO = 5, 6


def numbered(number, width=3):
    """Feature rows that say their number: [number, width]."""
    return paddle.arange(1, number + 1, dtype="float32").unsqueeze(1).expand([number, width])


def received(mask, layout):
    """[B, S_local]: the number of the feature row that each position of one rank receives, 0 for none."""
    plan = plan_visual(paddle.to_tensor(mask), None, layout, sequence_first=False)
    hidden = paddle.zeros([mask.shape[0], layout.local_len, 3])
    return replace_rows(hidden, numbered(int(mask.sum())), plan)[:, :, 0].numpy()


def due(mask, layout):
    """The same by counting tokens one by one in the whole batch."""
    number = np.cumsum(mask.ravel()).reshape(mask.shape) * mask
    return number[:, layout.positions()]


def test_1_rows_of_samples_do_not_mix():
    """Exact, against counting tokens one by one; the rule that mixes samples gives something else."""
    mask = np.random.default_rng(0).random([3, 16]) < 0.5
    for cut in ({"sp_size": 4}, {"cp_size": 2}, {"cp_size": 2, "sp_size": 2}):
        for rank in range(2):
            layout = SeqLayout(16, **cut, **{name.replace("size", "rank"): rank for name in cut})
            np.testing.assert_array_equal(received(mask, layout), due(mask, layout))
    layout = SeqLayout(16, sp_size=2, sp_rank=1)
    sliced = np.arange(1, mask.sum() + 1)[mask[:, :8].sum() :][: mask[:, 8:].sum()]  # the rule that mixes them
    assert sliced.tolist() != received(mask, layout)[mask[:, 8:]].tolist()


def test_7_packed_boundaries_must_fit_the_ring_and_then_hold():
    """Refused with the length that fits; where they fit, exact."""
    for lengths, segment, length, fits in (([5, 7], 0, 5, 8), ([8, 5], 1, 5, 8)):
        with pytest.raises(ValueError, match=f"segment {segment} of cu_seqlens has length {length}.*fits is {fits}"):
            SeqLayout(sum(lengths), cp_size=2, cu_seqlens=[0, *np.cumsum(lengths).tolist()])
    mask = np.random.default_rng(1).random([1, 20]) < 0.5
    for rank in range(2):
        layout = SeqLayout(20, cp_size=2, cp_rank=rank, cu_seqlens=(0, 8, 20))
        np.testing.assert_array_equal(received(mask, layout), due(mask, layout))
        segments = np.split(np.arange(20), [8])
        own = np.concatenate([np.array_split(segment, 4)[i] for segment in segments for i in (rank, 3 - rank)])
        np.testing.assert_array_equal(layout.positions(), own)


def test_8_few_images_go_to_different_ranks_and_a_huge_one_stays_alone():
    """Exact shares, by both policies."""
    for policy in ("contiguous", "longest"):
        assert sorted(map(len, share_images([4, 1, 2], [4, 1, 2], 8, policy).items)) == [0] * 5 + [1] * 3
        huge = share_images([1, 1, 1000, 1, 1, 1, 1, 1], [1] * 8, 4, policy)
        assert (2,) in huge.items


@pytest.mark.parametrize("number", [0, 3, 5])
def test_10_a_wrong_number_of_features_is_found_before_a_write(number):
    """Refused with both numbers; the hidden states are as they were."""
    mask = np.array([[1, 0, 1, 1], [0, 0, 0, 1]], dtype=bool)
    layout = SeqLayout(4)
    words = f"4 visual tokens but {number} feature rows"
    for tokens in (mask, paddle.to_tensor(mask)):
        with pytest.raises(ValueError, match=words):
            plan_visual(tokens, None, layout, sequence_first=False, num_features=number)
        padded = plan_visual(tokens, None, layout, sequence_first=False, num_features=number, padded=True)
        with pytest.raises(ValueError, match=words):
            padded.check()
    plan = plan_visual(paddle.to_tensor(mask), None, layout, sequence_first=False)
    hidden = paddle.full([2, 4, 3], 7.0)
    for write in (replace_rows, add_rows, lambda *a: add_rows(*a, inplace=True)):
        with pytest.raises(ValueError, match=f"for 4 feature rows, got {number}"):
            write(hidden, numbered(number), plan)
    assert (hidden == 7).all()
    with pytest.raises(ValueError, match=f"4 feature rows, got levels of .{number}"):
        complete_grad([numbered(number)], plan, None)


# cases, run on every rank


def no_2_ranks_and_batches_without_visual_tokens():
    group = world()
    layout = SeqLayout(16, sp_size=group.nranks, sp_rank=group.rank)
    grids = {"first rank only": [[1, 2, 4]], "nothing": []}
    for name, rows in grids.items():
        grid = np.array(rows, dtype=np.int64).reshape(-1, 3)
        model = tower()
        features, levels = encode_shared(model, pixels(grid), grid, group=group, merge_size=MERGE, replicate_below=0)
        mask = np.zeros([2, 16], dtype=bool)
        mask[0, : len(features)] = True
        plan = plan_visual(paddle.to_tensor(mask), None, layout, sequence_first=True)
        hidden = replace_rows(paddle.ones([layout.local_len, 2, HIDDEN]), features, plan)
        for level in levels:
            hidden = add_rows(hidden, level, plan)
        hidden.sum().backward()
        sum_parameter_grads(model, group)
        for parameter in model.parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name


def no_3_a_text_only_batch_does_not_stall_a_sharded_tower():
    """Each call of this tower, forward and backward, is a collective: it hangs if one rank stays away."""
    group, model = world(), tower()
    calls = []

    def meet(_):
        calls.append(dist.all_reduce(paddle.ones([1]), group=group))

    def sharded(x, grid):
        x = x.clone()
        x.stop_gradient = False
        dist.all_reduce(paddle.ones([1]), group=group)  # weights are brought together
        x.register_hook(meet)
        return model(x, grid)

    for rows in ([], [[1, 4, 4]], [[1, 4, 4], [1, 2, 2]]):
        grid = np.array(rows, dtype=np.int64).reshape(-1, 3)
        features, levels = encode_shared(sharded, pixels(grid), grid, group=group, merge_size=MERGE, replicate_below=0)
        (features.sum() + sum(level.sum() for level in levels)).backward()
    assert len(calls) == 3


def no_4_image_and_video_in_one_batch():
    """Also with ids that are cut already, in both orders that features may have."""
    group = world()
    ids = np.random.default_rng(2).choice([1, IMAGE, VIDEO], size=[2, 16])
    number = [int((ids == kind).sum()) for kind in (IMAGE, VIDEO)]
    image, video = numbered(number[0]), -numbered(number[1])  # images count up, videos down
    expected = np.zeros(ids.shape)
    expected[ids == IMAGE] = np.arange(1, number[0] + 1)
    expected[ids == VIDEO] = -np.arange(1, number[1] + 1)
    joint = joint_features(image, video, ids, (IMAGE, VIDEO))
    for cut in ("sp", "cp"):
        layout = SeqLayout(16, **{f"{cut}_size": group.nranks, f"{cut}_rank": group.rank})
        local = paddle.to_tensor(ids[:, layout.positions()])
        options = {"group": group, "num_features": number, "sequence_first": False}
        for features, by_kind in ((joint, False), (paddle.concat([image, video]), True)):
            plan = plan_visual_local(local, (IMAGE, VIDEO), layout, features_by_kind=by_kind, **options)
            got = replace_rows(paddle.zeros([2, layout.local_len, 3]), features, plan)
            np.testing.assert_array_equal(got[:, :, 0].numpy(), expected[:, layout.positions()])


def no_5_the_gradient_of_a_gather_is_the_sum_cut_once():
    group = world()
    for mode in ("max", "sum", "ragged"):
        x = paddle.ones([2, 3])
        x.stop_gradient = False
        whole = all_gather_rows(x.clone(), [2] * group.nranks, group, mode=mode)
        whole.retain_grads()
        (whole * (group.rank + 1)).sum().backward()
        assert (x.grad == sum(range(1, group.nranks + 1))).all()  # neither its own part alone, nor times the ranks
        assert (whole.grad == group.rank + 1).all()  # autograd's own buffer is as it was


def no_6_deepstack_gradients_are_whole_under_sequence_parallel():
    group = world()
    layout = SeqLayout(16, sp_size=group.nranks, sp_rank=group.rank)
    mask = np.ones([1, 16], dtype=bool)
    plan = plan_visual(paddle.to_tensor(mask), None, layout, sequence_first=True)
    for complete, reaching in ((complete_grad, 16), (lambda levels, *_: levels, 16 // group.nranks)):
        levels = [paddle.ones([16, 3]) for _ in range(3)]
        for level in levels:
            level.stop_gradient = False
        hidden = paddle.zeros([layout.local_len, 1, 3])
        for level in complete(levels, plan, group):
            hidden = add_rows(hidden, level, plan)
        hidden.sum().backward()
        assert [int(level.grad[:, 0].sum()) for level in levels] == [reaching] * 3


def no_9_a_dtype_that_differs_between_ranks_is_an_error():
    group = world()
    x = paddle.ones([2, 4], dtype="bfloat16" if group.rank else "float32")
    gather = lambda: all_gather_rows(x, [2] * group.nranks, group, check=True)  # noqa: E731
    same_error_everywhere(gather, group, "rank 1 gathers .*bfloat16 and rank 0 .*float32")


CASES = [
    no_2_ranks_and_batches_without_visual_tokens,
    no_3_a_text_only_batch_does_not_stall_a_sharded_tower,
    no_4_image_and_video_in_one_batch,
    no_5_the_gradient_of_a_gather_is_the_sum_cut_once,
    no_6_deepstack_gradients_are_whole_under_sequence_parallel,
    no_9_a_dtype_that_differs_between_ranks_is_an_error,
]


LAUNCHES = dict.fromkeys((2, 4), CASES)


@pytest.mark.parametrize(("nranks", "case"), pairs(LAUNCHES))
def test_on_all_ranks(nranks, case):
    """Exact on every rank, or the same error on all."""
    hold(__name__, nranks, case)
