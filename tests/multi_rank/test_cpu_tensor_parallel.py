"""What the tensor-parallel layers call on CPU ranks: supplied while it is on, and Paddle's own afterwards."""

import numpy as np
import paddle
import paddle.distributed as dist
import pytest
from paddle.base import core
from paddle.distributed.fleet.layers.mpu import mp_ops

from paddle_vl_sp.testing import run_ranks
from paddle_vl_sp.testing.tensor_parallel import enable_tensor_parallel_on_cpu, init_tensor_parallel


def own_calls():
    gloo = vars(core.ProcessGroupGloo).get("all_reduce_on_calc_stream")
    return [dist.stream.reduce_scatter, gloo, paddle._C_ops.c_identity, paddle._C_ops.c_concat, dist.new_group]


def block_of_sum(group, dtype):
    """reduce_scatter of [nranks * 2, 3], against numpy; the input stays as it was."""
    table = np.arange(group.nranks * 6).reshape(-1, 3)
    x = (paddle.to_tensor(table) * (group.rank + 1)).astype(dtype)
    before, out = x.clone(), paddle.empty([2, 3], dtype)
    dist.stream.reduce_scatter(out, x, group=group)
    wanted = table[2 * group.rank : 2 * group.rank + 2] * sum(range(1, group.nranks + 1))
    return np.array_equal(out.astype("float32").numpy(), wanted), bool((before == x).all())


def columns_joined(group):
    """c_concat forward and backward."""
    x = paddle.full([2, 3], float(group.rank), dtype="float32")
    x.stop_gradient = False
    joined = mp_ops._c_concat(x, group=group)
    weights = paddle.arange(3 * group.nranks, dtype="float32")
    (joined * weights).sum().backward()
    return joined.numpy()[0].tolist(), x.grad.numpy()[0].tolist()


def gradient_of_identity(group):
    x = paddle.ones([2])
    x.stop_gradient = False
    mp_ops._c_identity(x, group=group).sum().backward()
    return x.grad.numpy().tolist()


def measure(nranks):
    before = own_calls()
    with enable_tensor_parallel_on_cpu():
        with enable_tensor_parallel_on_cpu():
            pass  # as a helper of the test would: the outer one goes on
        group = init_tensor_parallel(nranks)
        found = {
            "sums": [block_of_sum(group, dtype) for dtype in ("float32", "bfloat16", "int64")],
            "columns": columns_joined(group),
            "identity": gradient_of_identity(group),
        }
        out = paddle.empty([2])
        dist.reduce_scatter(out, [paddle.full([2], float(i)) for i in range(nranks)])
        found["list"] = out.numpy().tolist()
    found["restored"] = all(a is b for a, b in zip(before, own_calls(), strict=True))
    return found


@pytest.mark.parametrize("nranks", [2])
def test_the_four_calls(nranks):
    """Exact values: sums cut to blocks, columns joined, gradients; identity of the originals afterwards."""
    for rank, found in enumerate(run_ranks(measure, nranks, nranks)):
        assert found["sums"] == [(True, True)] * 3
        assert found["columns"][0] == [float(r) for r in range(nranks) for _ in range(3)]
        assert found["columns"][1] == [3.0 * rank, 3.0 * rank + 1, 3.0 * rank + 2]
        assert found["identity"] == [float(nranks)] * 2
        assert found["list"] == [float(rank * nranks)] * 2
        assert found["restored"]
