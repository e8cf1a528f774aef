"""Documents packed into one row, whose sequence two ranks share: the whole step, padding, cut, ring attention, loss.

    python examples/packed_ring.py

Two processes on the CPU, one attention layer. A cut that forgets the other ranks, or where the documents end, trains
too: only the numbers are wrong. docs/attention.md has the other kinds of attention, and which one when.
"""

import numpy as np
import paddle
import paddle.distributed as dist
from paddle import nn

from paddle_vl_sp import sum_parameter_grads
from paddle_vl_sp.attention import packed_attention, ring_attention
from paddle_vl_sp.sequence import padded_layout, sequence_parallel_loss, shard_batch, unshard
from paddle_vl_sp.testing import run_ranks

WORDS, HEADS, HEAD_SIZE = 50, 4, 8
CU_SEQLENS = (0, 5, 14, 26)  # documents of 5, 9 and 12 tokens
WAYS = ("own part only", "documents joined", "ring, packed")


class Model(nn.Layer):
    def __init__(self):
        super().__init__()
        paddle.seed(0)
        width = HEADS * HEAD_SIZE
        self.embed, self.place = nn.Embedding(WORDS, width), nn.Embedding(32, width)
        self.qkv, self.out, self.head = nn.Linear(width, 3 * width), nn.Linear(width, width), nn.Linear(width, WORDS)

    def forward(self, share, attention):
        x = self.embed(share["input_ids"]) + self.place(share["position_ids"])  # [1, S_local, width]
        q, k, v = (part.reshape([1, -1, HEADS, HEAD_SIZE]) for part in self.qkv(x).chunk(3, axis=-1))
        return self.head(x + self.out(attention(q, k, v).flatten(2)))  # [1, S_local, WORDS]


def packed_batch():
    ids = np.random.default_rng(0).integers(0, WORDS, [1, CU_SEQLENS[-1]])  # [1, S]
    positions = np.concatenate([np.arange(length) for length in np.diff(CU_SEQLENS)])[None]
    arrays = {"input_ids": ids, "labels": ids, "position_ids": positions}
    return {name: paddle.to_tensor(array) for name, array in arrays.items()}


def step(way, group):
    """The logits of the whole batch, the loss, and every gradient, on a rank of the group; None is one process."""
    cut = {"cp_size": group.nranks, "cp_rank": group.rank} if group else {}
    layout = padded_layout(CU_SEQLENS[-1], cu_seqlens=CU_SEQLENS, **cut)  # pads every document to what the cut divides
    # [1, S_local] each. shift_labels: the label at a position becomes the token that follows, within each document and
    # before the cut; data sets of PaddleFormers have done that already
    share = shard_batch(packed_batch(), layout, cu_seqlens=CU_SEQLENS, shift_labels=True)

    def attention(q, k, v):
        if way == "own part only":
            return packed_attention(q, k, v)
        joined = padded_layout(layout.seq_len, **cut)  # the same length, one document
        return ring_attention(q, k, v, layout=joined if way == "documents joined" else layout, group=group)

    model = Model()
    logits = model(share, attention)
    loss = sequence_parallel_loss(logits, share["labels"], group=group)  # the mean over all ranks' tokens
    loss.backward()
    sum_parameter_grads(model, group)  # in a trainer, the data-parallel reduction
    whole = unshard(logits.detach(), layout, group, axis=1, cu_seqlens=CU_SEQLENS)  # [1, S, WORDS], without padding
    return whole.numpy(), float(loss), {name: parameter.grad.numpy() for name, parameter in model.named_parameters()}


def error(got, wanted):
    return np.linalg.norm(got - wanted) / np.linalg.norm(wanted)


def on_a_rank():
    """{way: (loss, error of the logits, worst error of a gradient)}, against one process without a cut."""
    wanted, loss, gradients = step("ring, packed", None)
    found = {"one process": (loss, 0.0, 0.0)}
    for way in WAYS:
        logits, loss, got = step(way, dist.get_group(0))
        found[way] = loss, error(logits, wanted), max(error(got[name], gradients[name]) for name in gradients)
    return found


if __name__ == "__main__":
    import packed_ring  # the ranks import their function, so it must not be that of __main__

    found = run_ranks(packed_ring.on_a_rank, 2)[0]
    print(f"3 documents, 2 ranks{'loss':>10}{'logits off':>14}{'worst gradient off':>21}")
    for way, (loss, logits, gradient) in found.items():
        print(f"{way:20}{loss:>10.5f}{logits:>14.1e}{gradient:>21.1e}")
