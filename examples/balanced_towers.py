"""Two data-parallel ranks with uneven images balance the work of their vision towers.

    python examples/balanced_towers.py

Two processes on the CPU, PaddleFormers' Qwen2.5-VL, tiny and with random weights. One rank's batches have many images,
the other's few or none. With vision_dp="data" images are encoded wherever there is time; the weights after some steps
are those of plain data parallelism. docs/balanced-towers.md says what moves, and how to see whether it is worth it.
"""

import numpy as np
import paddle
import paddle.distributed as dist

from paddle_vl_sp import apply_to_paddleformers, stop_balancing
from paddle_vl_sp.formers import tiny
from paddle_vl_sp.testing import run_ranks

STEPS, LENGTH = 3, 96
MANY, FEW, TEXT = [["image", "image", "image"], ["image", "image"]], [["image"], []], [[], []]
OF_RANKS = [[MANY, FEW, MANY], [TEXT, MANY, FEW]]  # step by step
WAYS = {"each its own": False, "balanced": "data"}


def train(way, group):
    """Weights after the steps, and the patches that this rank's tower encoded in each."""
    with apply_to_paddleformers(families="qwen2_5_vl", vision_dp=way):
        model, patches = tiny.tiny_qwen2_5_vl(), []
        encode = model.model.visual.forward

        def counting(pixels, *args, **named):
            patches[-1] += pixels.shape[0]
            return encode(pixels, *args, **named)

        model.model.visual.forward = counting
        optimizer = paddle.optimizer.AdamW(1e-3, epsilon=1e-4, parameters=model.parameters())
        for step, samples in enumerate(OF_RANKS[group.rank]):
            patches.append(0)
            batch = tiny.draw_batch(samples, LENGTH, seed=10 * step + group.rank, frames_apart=False)
            model(**batch, position_ids=tiny.positions(model, batch)).loss.backward()
            for parameter in model.parameters():  # data parallelism: the mean over the ranks
                grad = paddle.zeros_like(parameter) if parameter.grad is None else parameter.grad
                dist.all_reduce(grad, group=group)
                parameter.grad = grad / group.nranks
            optimizer.step()
            optimizer.clear_grad()
        if way:
            stop_balancing(group)  # PaddleFormers' trainer says it by itself
        return tiny.weights_of(model), patches


def on_a_rank():
    """{way: (patches of each step, largest difference of a weight, as a part of the largest weight)}"""
    found, wanted = {}, None
    for name, way in WAYS.items():
        weights, patches = train(way, dist.get_group(0))
        wanted = wanted or weights
        apart = max(float(np.abs(weights[key] - wanted[key]).max()) for key in wanted)
        found[name] = patches, apart / max(float(np.abs(value).max()) for value in wanted.values())
    return found


if __name__ == "__main__":
    import balanced_towers  # the ranks import their function, so it must not be that of __main__

    ranks = run_ranks(balanced_towers.on_a_rank, len(OF_RANKS), timeout=120)
    print(f"{STEPS} steps, 2 ranks{'patches of rank 0':>22}{'of rank 1':>20}{'busiest':>10}{'weights apart':>16}")
    for name in WAYS:
        (first, apart), (second, _) = (rank[name] for rank in ranks)
        busiest = sum(max(both) for both in zip(first, second, strict=True))
        print(f"{name:16}{first!s:>22}{second!s:>20}{busiest:>10}{apart:>16.1e}")
