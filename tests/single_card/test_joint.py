"""joint_features against a loop over tokens: pure movement, bit-exact."""

import numpy as np
import paddle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paddle_vl_sp import joint_features
from strategies import IMAGE, TEXT, VIDEO

KINDS = (IMAGE, VIDEO)


def features(kind, count, level=0, width=3, stop_gradient=True):
    rows = kind * 1000.0 + level * 100 + np.arange(count)[:, None] + np.arange(width) / 10
    return paddle.to_tensor(rows.astype(np.float32), stop_gradient=stop_gradient)


def in_reading_order(image, video, ids):
    rows = {IMAGE: iter(image.numpy()), VIDEO: iter(video.numpy())}
    found = [next(rows[token]) for token in ids.ravel().tolist() if token in rows]
    return np.array(found, np.float32).reshape(-1, image.shape[1])


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_rows_of_both_kinds_come_in_reading_order(data):
    """Bit-exact, for ids on the host and on a device, for levels and for one tensor."""
    shape = data.draw(st.integers(1, 3)), data.draw(st.integers(0, 20))
    ids = np.random.default_rng(data.draw(st.integers(0, 999))).choice([TEXT, IMAGE, VIDEO], shape)
    counts = [(ids == kind).sum() for kind in KINDS]
    levels = [[features(kind, count, level) for level in range(3)] for kind, count in enumerate(counts)]
    for tokens in (ids, paddle.to_tensor(ids)):
        joined = joint_features(*levels, tokens, KINDS)
        assert isinstance(joined, list)
        for level, found in enumerate(joined):
            assert np.array_equal(found.numpy(), in_reading_order(levels[0][level], levels[1][level], ids))
        assert np.array_equal(joint_features(levels[0][0], levels[1][0], tokens, KINDS).numpy(), joined[0].numpy())


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_gradients_go_back_to_their_kind(dtype):
    """Exact small numbers, in every dtype."""
    ids = np.array([[IMAGE, TEXT, VIDEO, IMAGE]])
    image, video = (features(1, n, stop_gradient=False).astype(dtype).detach() for n in (2, 1))
    image.stop_gradient = video.stop_gradient = False
    joined = joint_features(image, video, ids, KINDS)
    assert joined.dtype == image.dtype
    weight = paddle.to_tensor([[1.0], [2.0], [3.0]])
    (joined.astype("float32") * weight).sum().backward()
    assert image.grad.astype("float32").numpy()[:, 0].tolist() == [1, 3]
    assert video.grad.astype("float32").numpy()[:, 0].tolist() == [2]


def test_a_kind_that_is_not_there_leaves_the_other_as_it_is():
    """Identity; a kind with no rows keeps its gradient."""
    image = features(1, 2)
    ids = np.array([[TEXT, IMAGE, IMAGE]])
    assert joint_features(image, None, ids, KINDS) is image
    assert joint_features(None, [image, image], np.where(ids == IMAGE, VIDEO, ids), KINDS) == [image, image]
    nothing = paddle.zeros([0, 3])
    nothing.stop_gradient = False
    joined = joint_features(image, nothing, ids, KINDS)
    joined.sum().backward()
    assert np.array_equal(joined.numpy(), image.numpy())
    assert nothing.grad.shape == [0, 3]


IDS = np.array([[IMAGE, TEXT, VIDEO, IMAGE]])


@pytest.mark.parametrize("tensor", [False, True])
@pytest.mark.parametrize(
    ("image", "video", "message"),
    [
        (features(1, 3), features(2, 1), "the batch has 2 image tokens but 3 feature rows"),
        (features(1, 2), features(2, 0), "the batch has 1 video tokens but 0 feature rows"),
        (features(1, 3), features(2, 0), "the batch has 2 image tokens but 3 feature rows"),
        (features(1, 2), None, "the batch has 1 video tokens but 0 feature rows"),
        (features(1, 2), features(2, 1, width=4), "image features are 3 wide and video features 4"),
        ([features(1, 2)] * 2, [features(2, 1)], "image has 2 levels and video 1"),
        ([features(1, 2), features(1, 1)], None, r"image features must be \[N, H\], the same in every level"),
        (None, None, "both None"),
    ],
)
def test_refusals_name_the_kind_and_both_numbers(tensor, image, video, message):
    """Refused before anything is joined."""
    with pytest.raises(ValueError, match=message):
        joint_features(image, video, paddle.to_tensor(IDS) if tensor else IDS, KINDS)


def test_placeholder_ids_are_image_then_video():
    """Refused with what was got."""
    with pytest.raises(ValueError, match=r"\(image_id, video_id\), got \(151655,\)"):
        joint_features(features(1, 2), None, IDS, (IMAGE,))
