"""A training loop of your own under sequence parallelism: without complete_grad, and with it.

    python examples/own_loop.py

Two processes on the CPU share the sequence; each holds a copy of the vision tower, which encodes all images. A copy's
gradient covers the visual tokens of its rank only, until complete_grad sums it. docs/own-loop.md explains the calls.
"""

import numpy as np
import paddle
import paddle.distributed as dist
from paddle import nn

import paddle_vl_sp as vlsp
from paddle_vl_sp.sequence import sequence_parallel_loss, shard_batch
from paddle_vl_sp.testing import run_ranks

IMAGE, WORDS, HIDDEN, PIXELS, STEPS = 99, 100, 16, 12, 5
IDS = paddle.to_tensor([[1, *[IMAGE] * 6, 2, 3, 4, 5, 6], [7, 8, 9, *[IMAGE] * 5, 10, 11, 12, 13]])  # [B, S]


class Tower(nn.Layer):
    """pixels [N, PIXELS] -> features [N, HIDDEN] and one deepstack level alike."""

    def __init__(self):
        super().__init__()
        self.embed, self.main = nn.Linear(PIXELS, HIDDEN), nn.Linear(HIDDEN, HIDDEN)
        self.level = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, pixels):
        x = nn.functional.gelu(self.embed(pixels))
        return self.main(x), [self.level(x)]


class Model(nn.Layer):
    def __init__(self):
        super().__init__()
        paddle.seed(0)
        self.visual, self.embed = Tower(), nn.Embedding(WORDS, HIDDEN)
        self.layers = nn.LayerList([nn.Linear(HIDDEN, HIDDEN) for _ in range(2)])
        self.head = nn.Linear(HIDDEN, WORDS)

    def loss(self, batch, group, completes):
        cut = {} if group is None else {"sp_size": group.nranks, "sp_rank": group.rank}
        layout = vlsp.SeqLayout(batch["input_ids"].shape[1], **cut)
        main, levels = self.visual(batch["pixel_values"])  # [N, H], L x [N, H]
        plan = vlsp.plan_visual(batch["input_ids"], (IMAGE,), layout, sequence_first=True, num_features=main.shape[0])
        if completes:
            main, *levels = vlsp.complete_grad([main, *levels], plan, group)
        share = shard_batch(batch, layout, shift_labels=True)  # [B, S_local]; a label becomes the token that follows
        hidden = vlsp.replace_rows(self.embed(share["input_ids"].t()), main, plan)  # [S_local, B, H]
        for i, layer in enumerate(self.layers):
            hidden = hidden + nn.functional.gelu(layer(hidden))
            if i < len(levels):
                hidden = vlsp.add_rows(hidden, levels[i], plan)
        return sequence_parallel_loss(self.head(hidden).transpose([1, 0, 2]), share["labels"], group=group)


def trained(pixels, group, completes):
    """The tower's gradients of the first step, and how far the ranks' copies of it are apart at the end."""
    batch, model, first = {"input_ids": IDS, "labels": IDS, "pixel_values": pixels}, Model(), {}
    optimizer = paddle.optimizer.AdamW(1e-3, parameters=model.parameters())
    for _ in range(STEPS):
        model.loss(batch, group, completes).backward()
        vlsp.sum_parameter_grads(model, group, skip=model.visual)  # the tower's are whole
        first = first or {name: parameter.grad.numpy() for name, parameter in model.visual.named_parameters()}
        optimizer.step()
        optimizer.clear_grad()
    return first, max((drift.relative for drift in vlsp.check_replicas(model.visual, group)), default=0.0)


def on_a_rank():
    """{way: (worst gradient error against one process, how far the copies are apart)}"""
    pixels = paddle.to_tensor(np.random.default_rng(0).standard_normal([11, PIXELS]).astype("float32"))
    (whole, _), found = trained(pixels, None, True), {}
    for way in ("without complete_grad", "with complete_grad"):
        grads, drift = trained(pixels, dist.get_group(0), way.startswith("with "))
        errors = [np.linalg.norm(grads[name] - whole[name]) / np.linalg.norm(whole[name]) for name in whole]
        found[way] = max(errors), drift
    return found


if __name__ == "__main__":
    import own_loop  # the ranks import their function, so it must not be that of __main__

    ranks = run_ranks(own_loop.on_a_rank, 2)
    print(f"2 ranks{'worst vision gradient error':>45}{f'copies apart after {STEPS} steps':>29}")
    for way in ranks[0]:
        error, drift = (max(values) for values in zip(*(rank[way] for rank in ranks), strict=True))
        print(f"{way:24}{error:>28.1e}{drift:>29.1e}")
