"""What each of two ranks does for the pages: their blocks, and the loop of own-loop.md against one process."""

import docs_given
import numpy as np
import paddle
from docs_blocks import ROOT, blocks_of, run_blocks

from paddle_vl_sp import SeqLayout
from paddle_vl_sp.attention import sequence_parallel_loss


def blocks_on_ranks():
    """The complaints about blocks, and the worst relative error of a gradient of the page's loop, case by case."""
    told = run_blocks("ranks")
    forward, step = (block.source for block in blocks_of(ROOT / "docs" / "own-loop.md")[:2])
    expected = gradients_of_one_process(forward)
    cases = {
        "whole": gradients(forward, step),
        "without complete_grad": gradients(forward + "\ncomplete_grad = lambda features, *_: features", step),
        "a tower summed twice": gradients(forward, step.replace(", skip=model.visual", "")),
        "context parallel": gradients_of_context_parallel(forward),
    }
    return told, {case: worst_error(got, expected) for case, got in cases.items()}


def gradients(forward, step):
    """Of this rank, after the page's backward and sums."""
    names = docs_given.own_loop()
    exec(forward, names)
    exec(step.partition("optimizer.step()")[0], names)
    return grads_of(names)


def gradients_of_context_parallel(forward):
    """Averaged over the ranks, as by a data-parallel reduction: nothing is completed, no tensor-parallel group."""
    names = docs_given.own_loop()
    exec(forward, names)
    group = names["group"]
    layout = SeqLayout(names["batch"]["input_ids"].shape[1], cp_size=group.nranks, cp_rank=group.rank)
    logits, labels = names["forward"](names["model"], names["batch"], layout, None)
    sequence_parallel_loss(logits, labels, group=group, averaged_gradients=True).backward()
    grads = {name: paddle.to_tensor(grad) for name, grad in grads_of(names).items()}
    for grad in grads.values():
        paddle.distributed.all_reduce(grad, group=group)
    return {name: grad.numpy() / group.nranks for name, grad in grads.items()}


def gradients_of_one_process(forward):
    names = docs_given.own_loop()
    exec(forward, names)
    layout = SeqLayout(names["batch"]["input_ids"].shape[1])
    logits, labels = names["forward"](names["model"], names["batch"], layout, None)
    paddle.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()
    return grads_of(names)


def grads_of(names):
    return {name: p.grad.numpy() for name, p in names["model"].named_parameters()}


def worst_error(got, expected):
    return max(float(np.abs(got[name] - expected[name]).max() / np.abs(expected[name]).max()) for name in expected)
