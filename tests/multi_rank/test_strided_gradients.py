"""The gradient of a weight that is multiplied transposed, as in PaddleFleet's LM head, under a fused all-reduce."""

import numpy as np
import paddle
import paddle.distributed as dist
from paddle.distributed.fleet.utils.hybrid_parallel_util import fused_allreduce_gradients

from paddle_vl_sp.autograd import keep_gradient_contiguous
from paddle_vl_sp.testing import run_ranks


def error_after_the_fused_all_reduce(is_kept_contiguous):
    """Of the mean over the ranks, which is what data parallel makes; the largest difference."""
    group = dist.get_group(0)
    weight, other = paddle.create_parameter([5, 3], "float32"), paddle.create_parameter([4], "float32")
    if is_kept_contiguous:
        keep_gradient_contiguous(weight)
    x = paddle.arange(6, dtype="float32").reshape([2, 3]) + group.rank
    logits = paddle.matmul(x, weight.T)
    ((logits * paddle.arange(10, dtype="float32").reshape([2, 5])).sum() + other.sum()).backward()
    own = []
    dist.all_gather_object(own, weight.grad.numpy())
    fused_allreduce_gradients([weight, other], None)
    return float(np.abs(weight.grad.numpy() - sum(own) / len(own)).max())


def errors():
    return error_after_the_fused_all_reduce(False), error_after_the_fused_all_reduce(True)


def test_a_contiguous_gradient_is_averaged_right():
    """Exact, small whole numbers; without the hook Paddle 3.3.1 is off by far, which is why it is there."""
    for strided, contiguous in run_ranks(errors, 2, timeout=60):
        assert contiguous == 0
        assert strided > 1
