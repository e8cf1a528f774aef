"""The loss on one rank; on several in tests/multi_rank/test_attention.py."""

import numpy as np
import paddle
import pytest

from paddle_vl_sp.attention import sequence_parallel_loss, token_losses
from paddle_vl_sp.testing import FakeGroup

LABELS = paddle.to_tensor([[1, 2, 3, -100]])


def arrays():
    rng = np.random.default_rng(0)
    logits = paddle.to_tensor(rng.standard_normal((1, 4, 5)).astype("float32"), stop_gradient=False)
    return logits, paddle.to_tensor([[1.0, 2.0, 3.0, 4.0]], stop_gradient=False)


def test_the_mean_is_over_the_tokens_that_are_not_ignored():
    """1e-6, against numpy; Paddle's own mean divides by all tokens where ignore_index is negative."""
    logits, _ = arrays()
    x = logits.numpy()[0, :3]
    expected = (np.log(np.exp(x).sum(1)) - x[range(3), [1, 2, 3]]).mean()
    np.testing.assert_allclose(sequence_parallel_loss(logits, LABELS, group=None).item(), expected, rtol=1e-6)


@pytest.mark.parametrize("ignored", [-100, 0, 4, 255])
def test_any_label_may_be_the_ignored_one(ignored):
    """Exact: loss and gradient are those of the same labels with the default in that place."""
    labels = paddle.to_tensor([[1, ignored, 2, ignored]])
    results = []
    for given, options in ((labels, {"ignore_index": ignored}), (paddle.to_tensor([[1, -100, 2, -100]]), {})):
        logits, _ = arrays()
        loss = sequence_parallel_loss(logits, given, group=None, **options)
        results.append(
            [loss.item(), paddle.grad(loss, logits)[0].tolist(), token_losses(logits, given, **options).tolist()]
        )
    assert results[0] == results[1]


@pytest.mark.parametrize("num_tokens", [None, 7.0])
def test_weights_have_a_gradient_too(num_tokens):
    """1e-6: against the weighted mean in plain Paddle; an ignored token's weight has none."""
    logits, weights = arrays()
    counted = weights * (LABELS != -100).astype("float32")
    expected = (token_losses(logits, LABELS) * counted).sum() / (num_tokens or counted.sum())
    loss = sequence_parallel_loss(logits, LABELS, group=None, weights=weights, num_tokens=num_tokens)
    results = [[mean, *paddle.grad(mean, [logits, weights])] for mean in (loss, expected)]
    for got, want in zip(*results, strict=True):
        np.testing.assert_allclose(got.numpy(), want.numpy(), atol=1e-6)


def test_without_any_token_the_gradient_of_weights_is_zero():
    """Exact zeros, not NaN: the loss and both gradients."""
    logits, weights = arrays()
    loss = sequence_parallel_loss(logits, paddle.full([1, 4], -100, "int64"), group=None, weights=weights)
    assert loss.item() == 0
    for grad in paddle.grad(loss, [logits, weights]):
        assert not grad.abs().sum().item()


@pytest.mark.parametrize("group", [None, FakeGroup(0, 1)])
def test_alone_averaged_gradients_are_the_gradients(group):
    """Exact: nobody divides them."""
    logits, _ = arrays()
    grads = [
        paddle.grad(sequence_parallel_loss(logits, LABELS, group=group, averaged_gradients=averaged), logits)[0]
        for averaged in (False, True)
    ]
    np.testing.assert_array_equal(grads[0].numpy(), grads[1].numpy())
