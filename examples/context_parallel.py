"""Two ranks share the sequences of one batch: PaddleFormers' own Qwen3-VL, tiny, on the CPU, against one process.

    python examples/context_parallel.py        needs paddleformers; a quarter of a minute

The model takes the whole batch on every rank and cuts it itself. Each rank's gradients are of its own part; their sum
over the ranks, which PaddleFormers' trainer makes for sep_parallel_size, is the whole gradient.
"""

import numpy as np
import paddle
import paddle.distributed as dist

from paddle_vl_sp.attention import ContextParallel
from paddle_vl_sp.formers import apply_to_qwen3_vl, tiny
from paddle_vl_sp.testing import run_ranks

KINDS = ("auto", "gather", "ring", "ulysses")
SAMPLES, SEQ_LEN = [["image", "image"], ["video"]], 61  # the model pads it to what the cut divides
HEADS, HEAD_SIZE = tiny.TEXT["num_attention_heads"], tiny.TEXT["head_dim"]


def trained(context_parallel=None, group=None):
    """The loss of the batch, and the gradient of every parameter."""
    with apply_to_qwen3_vl(context_parallel=context_parallel):
        model = tiny.tiny_qwen3_vl()
        batch = tiny.draw_batch(SAMPLES, SEQ_LEN)
        loss = model(**batch, position_ids=tiny.positions(model, batch)).loss
        loss.backward()
    if group is not None:
        for parameter in model.parameters():
            dist.all_reduce(parameter.grad, group=group)
    return float(loss), tiny.gradients_of(model)


def on_a_rank():
    """Of each kind of attention: which one it is and why, loss, gradients."""
    group = dist.get_group(0)  # in a trainer leave it out: it is that of sep_parallel_size
    found = {}
    for kind in KINDS:
        setting = ContextParallel(kind, group=group)
        chosen = setting.choose(HEADS, HEADS, SEQ_LEN, head_size=HEAD_SIZE, batch=len(SAMPLES))
        found[kind] = str(chosen), *trained(setting, group)
    return found


def worst_error(gradients, whole):
    """Of all parameters, relative to the gradient in one process."""
    return max(np.linalg.norm(gradients[name] - whole[name]) / np.linalg.norm(whole[name]) for name in whole)


def main():
    paddle.set_device("cpu")
    loss, whole = trained()
    print(f"one process: loss {loss:.6f}")
    for kind, (chosen, shared_loss, gradients) in run_ranks(on_a_rank, 2)[0].items():
        error = worst_error(gradients, whole)
        print(f"two ranks, {kind}: loss {shared_loss:.6f}, worst gradient error {error:.1e}\n    {chosen}")


if __name__ == "__main__":
    from context_parallel import main  # the ranks import their function, so it must not be that of __main__

    main()
