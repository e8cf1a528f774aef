"""Is every gradient of my tensor-parallel model whole? A small one, with a fault, and after it is fixed.

    python examples/audit_own_model.py

Two processes on the CPU. The block cuts its columns and rows over the ranks, as tensor parallelism does. What goes into
the columns must have its gradient summed in the backward, since each rank has that of its own columns only; the faulty
block forgets it. Loss and training look right, but everything before the block is trained on wrong gradients.
"""

import numpy as np
import paddle
import paddle.distributed as dist
from paddle.autograd import PyLayer
from paddle.nn import functional

from paddle_vl_sp import audit_gradients
from paddle_vl_sp.testing import run_ranks

HIDDEN, INNER, WORDS = 16, 32, 24


class IntoColumns(PyLayer):
    """The same tensor; its gradient is the sum over the ranks."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone()
        dist.all_reduce(grad)
        return grad


class OutOfRows(PyLayer):
    """The sum over the ranks; its gradient is the same."""

    @staticmethod
    def forward(ctx, x):
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, grad):
        return grad.clone()


class Block(paddle.nn.Layer):
    def __init__(self, rank, nranks, is_faulty):
        super().__init__()
        rng, own = np.random.default_rng(0), slice(rank * INNER // nranks, (rank + 1) * INNER // nranks)
        up, down = rng.standard_normal((HIDDEN, INNER)), rng.standard_normal((INNER, HIDDEN))
        self.embed = self.drawn(rng.standard_normal((WORDS, HIDDEN)))  # these three are copies on every rank
        self.scale, self.head = self.drawn(np.ones(HIDDEN)), self.drawn(rng.standard_normal((HIDDEN, WORDS)))
        self.up, self.down = self.drawn(up[:, own]), self.drawn(down[own])  # and of these, each rank has a part
        self.up.is_distributed = self.down.is_distributed = True  # as Paddle's own tensor-parallel layers say it
        self.into = paddle.assign if is_faulty else IntoColumns.apply

    def drawn(self, value):
        return self.create_parameter(value.shape, default_initializer=paddle.nn.initializer.Assign(0.3 * value))

    def forward(self, ids, labels):
        inner = paddle.matmul(self.into(functional.embedding(ids, self.embed) * self.scale), self.up)
        hidden = OutOfRows.apply(paddle.matmul(functional.gelu(inner), self.down))
        return functional.cross_entropy(paddle.matmul(hidden, self.head), labels)


def on_a_rank():
    """On every rank, with the same batch on each: what is found before and after."""
    group, ids = dist.get_group(0), paddle.arange(40) % WORDS
    found = []
    for is_faulty in (True, False):
        block = Block(group.rank, group.nranks, is_faulty)
        found.append(str(audit_gradients(lambda block=block: block(ids, 7 * ids % WORDS), block, group)))
    return found


if __name__ == "__main__":
    import audit_own_model  # ranks import the function by its module's name

    before, after = run_ranks(audit_own_model.on_a_rank, 2)[0]
    print("with the fault\n", before, "\n\nfixed\n", after, sep="")
