"""Adding a deepstack level to the hidden states of one rank: ours beside PaddleFormers' own layer and simpler ways.

Takes `_deepstack_process` from the installed PaddleFormers, if there is one (paddlefleet's names are stubbed for the
import), checks that every way gives the same hidden states and gradients, then times forward, and that with backward.

With --new-memory glibc's allocator is left as every process has it: large tensors are then mapped anew each time.

    python tools/bench/bench_rows.py [--batch 4] [--seq 32768] [--sp 4] [--hidden 1024] [--rounds 15] [--new-memory]
                                     [--json FILE]
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import paddle
from paddle.autograd import PyLayer

from paddle_vl_sp import SeqLayout, VisualPlan, add_rows, plan_visual
from paddle_vl_sp.backends import plain
from timing import Contender, copied, parse_sizes, race, runs_of_visual, show, start_race, write_json

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
FORMERS = 'pip install "paddleformers==1.2.0" "pyarrow<26"'
UPSTREAM = "PaddleFormers' layer"
Way = Callable[[paddle.Tensor, paddle.Tensor], paddle.Tensor]


def upstream_layer(mask: paddle.Tensor, rank: int, size: int) -> Way:
    """PaddleFormers' method, on a layer that has nothing but its config, as rank `rank` of `size`."""
    from stub_paddlefleet import stubbed_paddlefleet

    with stubbed_paddlefleet():
        from paddleformers.transformers.qwen3_vl.modeling_fleet import Qwen3VLTextTransformerLayer

    topology = SimpleNamespace(get_model_parallel_rank=lambda: rank, get_model_parallel_world_size=lambda: size)
    paddle.distributed.fleet.get_hybrid_communicate_group = lambda: topology
    layer = SimpleNamespace(config=SimpleNamespace(sequence_parallel=True))
    return lambda hidden, features: Qwen3VLTextTransformerLayer._deepstack_process(layer, hidden, mask, features)


def ways(mask: paddle.Tensor, layout: SeqLayout, plan: VisualPlan) -> tuple[dict[str, Way], str]:
    """The contenders by name, and why one is left out: empty where none is."""
    update = plan.update_indices

    def indices_with_scatter(hidden: paddle.Tensor, features: paddle.Tensor) -> paddle.Tensor:
        rows = hidden.reshape([-1, hidden.shape[-1]])
        picked = paddle.gather(features, plan.gather_indices)
        return paddle.scatter_nd_add(rows, update.unsqueeze(1), picked).reshape(hidden.shape)

    def planning_too(hidden: paddle.Tensor, features: paddle.Tensor) -> paddle.Tensor:
        fresh = plan_visual(mask, None, layout, sequence_first=True, num_features=features.shape[0])
        return add_rows(hidden, features, fresh, inplace=True)

    upstream: dict[str, Way] = {}
    left_out = ""
    try:
        upstream[UPSTREAM] = upstream_layer(mask, layout.sp_rank, layout.sp_size)
    except ImportError as error:
        left_out = f"{UPSTREAM} is left out, since it cannot be imported ({error}): {FORMERS}"
    return upstream | {
        "indices known, gather and scatter_nd_add": indices_with_scatter,
        "plain Paddle, on a copy": lambda hidden, features: plain.add_rows(
            hidden, features, update, plan.gather_indices
        ),
        "ours, on a copy": lambda hidden, features: add_rows(hidden, features, plan),
        "ours, in place, planning too": planning_too,
        "ours, in place": lambda hidden, features: add_rows(hidden, features, plan, inplace=True),
    }, left_out


class Made(PyLayer):
    """A copy with a gradient that costs nothing: what a layer passes on, without the layer's own time."""

    @staticmethod
    def forward(ctx: object, x: paddle.Tensor) -> paddle.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, grad: paddle.Tensor) -> paddle.Tensor:
        return grad


class Used(PyLayer):
    """A loss whose gradient is in `made` and nowhere else: what the layers behind give, without their own time."""

    @staticmethod
    def forward(ctx: Any, x: paddle.Tensor, made: list[paddle.Tensor]) -> paddle.Tensor:
        ctx.made = made
        return paddle.zeros([])

    @staticmethod
    def backward(ctx: Any, grad: paddle.Tensor) -> paddle.Tensor:
        return ctx.made.pop()


class Inputs:
    """Hidden states that are the result of an operation, features and an output gradient; prepared for every round."""

    def __init__(self, plan: VisualPlan, num_features: int, width: int) -> None:
        rng = np.random.default_rng(0)
        self.leaf = paddle.to_tensor(rng.standard_normal((*plan.row_shape, width), dtype=np.float32))
        self.features = paddle.to_tensor(rng.standard_normal((num_features, width), dtype=np.float32))
        self.out_grad = paddle.to_tensor(rng.standard_normal((*plan.row_shape, width), dtype=np.float32))
        self.leaf.stop_gradient = self.features.stop_gradient = False
        self.made: list[paddle.Tensor] = []

    def prepare(self) -> tuple[paddle.Tensor, paddle.Tensor]:
        self.leaf.clear_gradient(False)
        self.features.clear_gradient(False)
        self.made[:] = [self.out_grad.clone()]
        return Made.apply(self.leaf), self.features

    def backward(self, way: Way, hidden: paddle.Tensor, features: paddle.Tensor) -> list[paddle.Tensor]:
        out = way(hidden, features)
        return [out, *paddle.grad([Used.apply(out, self.made)], [self.leaf, features])]


def check(inputs: Inputs, all_ways: dict[str, Way]) -> None:
    expected = None
    for name, way in all_ways.items():
        found = [x.numpy() for x in inputs.backward(way, *inputs.prepare())]
        expected = expected or found
        if not all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True)):
            raise SystemExit(f"{name} gives other values or gradients: nothing is timed")


def main() -> None:
    args = parse_sizes(__doc__, batch=4, seq=32768, sp=4, hidden=1024, rounds=15, new_memory=False)
    start_race(args.new_memory)

    mask = paddle.to_tensor(runs_of_visual(args.batch, args.seq, 256, 4096))
    layout = SeqLayout(args.seq, sp_size=args.sp, sp_rank=args.sp // 2)
    plan = plan_visual(mask, None, layout, sequence_first=True)
    own, everywhere = len(plan.update_indices), plan.num_features
    inputs = Inputs(plan, everywhere, args.hidden)
    all_ways, left_out = ways(mask, layout, plan)
    check(inputs, all_ways)

    row = args.hidden * 4
    shape = (
        f"B {args.batch}, S {args.seq}, {args.sp} ranks, H {args.hidden}, float32, {own} of {everywhere} visual rows"
    )
    forward = [Contender(name, way, inputs.prepare) for name, way in all_ways.items()]
    all_rows = plan.row_shape[0] * plan.row_shape[1]
    on_a_copy = (2 * all_rows + own) * row
    forward.insert(0, copied(on_a_copy, "on a copy, its bytes, copied"))
    lines = race(forward[-1], forward[:-1], copied(3 * own * row), args.rounds, UPSTREAM)
    note = f"must move {3 * own * row >> 20} MiB: read two rows, write one; on a copy {on_a_copy >> 20} MiB"
    show(f"deepstack add, forward: {shape}", lines, f"{note}\n{left_out}" if left_out else note)

    def with_backward(way: Way) -> Callable[..., object]:
        return lambda hidden, features: inputs.backward(way, hidden, features)

    both = [Contender(name, with_backward(way), inputs.prepare) for name, way in all_ways.items()]
    backward = (own + everywhere) * row  # read own rows, write a gradient for every feature
    moved = 3 * own * row + backward
    both.insert(0, copied(on_a_copy + backward, "on a copy, its bytes, copied"))
    lines = race(both[-1], both[:-1], copied(moved), args.rounds, UPSTREAM)
    note = f"must move {moved >> 20} MiB; on a copy {on_a_copy + backward >> 20} MiB"
    show(f"deepstack add, forward and backward: {shape}", lines, note)
    write_json(args.json)


if __name__ == "__main__":
    main()
