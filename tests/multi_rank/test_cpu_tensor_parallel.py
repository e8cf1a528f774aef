"""What the tensor-parallel layers call on CPU ranks: supplied while it is on, and Paddle's own afterwards."""

import numpy as np
import paddle
import paddle.distributed as dist
import pytest
from paddle.base import core
from paddle.distributed import fleet
from paddle.distributed.fleet.layers.mpu import mp_ops
from paddle.distributed.fleet.meta_parallel import tensor_parallel

from paddle_vl_sp.testing import run_ranks
from paddle_vl_sp.testing.tensor_parallel import enable_tensor_parallel_on_cpu, init_tensor_parallel


def own_calls():
    gloo = vars(core.ProcessGroupGloo).get("all_reduce_on_calc_stream")
    trainer = [tensor_parallel.broadcast_input_data, paddle.device.synchronize, paddle.Tensor.cuda]
    return [
        dist.stream.reduce_scatter,
        gloo,
        paddle._C_ops.c_identity,
        paddle._C_ops.c_concat,
        dist.new_group,
        *trainer,
    ]


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


def batch_of_the_first(rank):
    """What a forward is called with: [rank + 1, 2] of each dtype, an empty array, a scalar, a word."""
    dtypes = ("float32", "bfloat16", "float16", "int64", "bool")
    given = {dtype: (paddle.ones([rank + 1, 2]) * (rank < 1)).astype(dtype) for dtype in dtypes}
    given |= {"nested": [paddle.zeros([0, rank + 2]), (paddle.to_tensor(float(rank)),)], "word": str(rank)}
    first = given["float32"]
    tensor_parallel.broadcast_input_data(fleet.get_hybrid_communicate_group(), first, **given)
    got = given  # overwritten, since fleet's wrapper drops what the call returns
    ones = [bool((got[dtype].astype("float32").numpy() == np.ones([1, 2])).all()) for dtype in dtypes]
    types = [str(got[dtype].dtype).rpartition(".")[2] for dtype in dtypes]
    empty, (scalar,) = got["nested"]
    return ones, types == list(dtypes), first.shape, empty.shape, scalar.item(), scalar.shape, got["word"]


def calls_of_a_gpu():
    paddle.device.synchronize()
    x = paddle.ones([2])
    return x.cuda() is x


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
        found["batch"], found["gpu"] = batch_of_the_first(group.rank), calls_of_a_gpu()
    found["restored"] = all(a is b for a, b in zip(before, own_calls(), strict=True))
    return found


@pytest.mark.parametrize("nranks", [2])
def test_the_calls(nranks):
    """Exact: sums cut to blocks, columns joined, gradients, the first rank's batch; the originals afterwards."""
    for rank, found in enumerate(run_ranks(measure, nranks, nranks)):
        assert found["sums"] == [(True, True)] * 3
        assert found["columns"][0] == [float(r) for r in range(nranks) for _ in range(3)]
        assert found["columns"][1] == [3.0 * rank, 3.0 * rank + 1, 3.0 * rank + 2]
        assert found["identity"] == [float(nranks)] * 2
        assert found["list"] == [float(rank * nranks)] * 2
        assert found["batch"] == ([True] * 5, True, [1, 2], [0, 2], 0.0, [], str(rank))
        assert found["gpu"]
        assert found["restored"]
