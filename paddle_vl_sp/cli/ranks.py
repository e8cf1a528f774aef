"""Collective functions on a real group against what one process computes, as cases with names."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import paddle
import paddle.distributed as dist

from paddle_vl_sp.attention import ring_attention, ulysses_attention
from paddle_vl_sp.attention.reference import full_attention
from paddle_vl_sp.cli import slow
from paddle_vl_sp.cli.parity import Case, equal, visual_of
from paddle_vl_sp.comm.gather import all_gather_rows
from paddle_vl_sp.comm.grads import complete_grad
from paddle_vl_sp.comm.local_plan import plan_visual_local
from paddle_vl_sp.comm.uneven import MODES
from paddle_vl_sp.layout import SeqLayout
from paddle_vl_sp.plan import plan_visual
from paddle_vl_sp.rows import add_rows
from paddle_vl_sp.vision.parallel import encode_shared
from paddle_vl_sp.vision.share import POLICIES

WIDTH = 6
ROUNDING = 2e-5


def joined_group() -> tuple[Any, bool]:
    """The group of all processes of this launch, and whether they have met here for the first time."""
    is_first = not dist.is_initialized()
    if is_first:
        dist.init_parallel_env()
    return dist.get_group(0), is_first


def collective_cases(group: Any) -> Iterator[Case]:
    """In the same order on every rank."""
    for mode in ("auto", *MODES):
        yield Case(f"all_gather_rows, {mode}", partial(_hold_gather, group, mode))
    yield Case("complete_grad", partial(_hold_complete_grad, group))
    for rule in ("zigzag", "contiguous", "sp"):
        yield Case(f"plan_visual_local, {rule}", partial(_hold_local_plan, group, rule))
    for policy in POLICIES:
        yield Case(f"encode_shared, {policy}", partial(_hold_shared, group, policy))
    for name in ("ring", "ulysses"):
        yield Case(f"{name} attention", partial(_hold_attention, group, name))


def failures_of_all(mine: list[dict[str, Any]], group: Any) -> list[dict[str, Any]]:
    """What failed on any rank, the same list everywhere."""
    told: list[list[dict[str, Any]]] = []
    dist.all_gather_object(told, mine, group=group)
    return [failure for rank in told for failure in rank]


def layout_of(group: Any, rule: str) -> SeqLayout:
    length = 4 * group.nranks
    if rule == "sp":
        return SeqLayout(length, sp_size=group.nranks, sp_rank=group.rank)
    return SeqLayout(length, cp_size=group.nranks, cp_rank=group.rank, cp_mode=rule)


def _hold_gather(group: Any, mode: str) -> None:
    """Rank r brings 0, 3, 6, ... rows; forward is movement, the gradient a sum of small whole numbers: both exact."""
    counts = [3 * rank for rank in range(group.nranks)]
    whole = np.arange(sum(counts) * WIDTH, dtype="float32").reshape(-1, WIDTH)
    begin = sum(counts[: group.rank])
    mine = slice(begin, begin + counts[group.rank])
    x = paddle.to_tensor(whole[mine], stop_gradient=False)
    out = all_gather_rows(x, counts, group, mode=mode)
    equal(out.numpy(), whole, "the gathered rows")
    out.backward(paddle.full_like(out, group.rank + 1.0))
    equal(x.grad.numpy(), np.full((counts[group.rank], WIDTH), sum(range(group.nranks + 1))), "the gradient")


def _hold_complete_grad(group: Any) -> None:
    """Every rank's gradient of the features is the one that a single process gets; a row has one owner, so exact."""
    layout = layout_of(group, "sp")
    visual = visual_of(layout)
    weight = np.arange(visual.size * WIDTH, dtype="float32").reshape(*visual.shape, WIDTH)
    features = paddle.ones([int(visual.sum()), WIDTH])
    features.stop_gradient = False
    plan = plan_visual(paddle.to_tensor(visual), None, layout, sequence_first=False)
    (whole,) = complete_grad([features], plan, group)
    out = add_rows(paddle.zeros([*plan.row_shape, WIDTH]), whole, plan)
    out.backward(paddle.to_tensor(weight[:, layout.positions()]))
    equal(features.grad.numpy(), weight[visual], "the features' gradient")


def _hold_local_plan(group: Any, rule: str) -> None:
    layout = layout_of(group, rule)
    visual = visual_of(layout)
    owned = slow.positions(layout)
    local = paddle.to_tensor(visual[:, owned])
    plan = plan_visual_local(local, None, layout, group=group, num_features=int(visual.sum()), sequence_first=True)
    update, gather = slow.pairs(visual, owned, sequence_first=True)
    equal(np.asarray(plan.update_indices), update, "rows")
    equal(np.asarray(plan.gather_indices), gather, "feature rows")


def _hold_shared(group: Any, policy: str) -> None:
    """Images of different sizes, fewer and more than ranks: features as one process computes them."""
    for images in (1, 2 * group.nranks + 1):
        grid = np.array([[1, 2, 2 * (i + 1)] for i in range(images)], dtype=np.int64)
        pixels = np.arange(grid.prod(axis=1).sum() * 4, dtype="float32").reshape(-1, 4)

        def encode(x: Any, _: Any) -> Any:
            return x.reshape([-1, 16])  # four patches make a token

        x = paddle.to_tensor(pixels, stop_gradient=False)
        found = encode_shared(encode, x, grid, group=group, merge_size=2, policy=policy)
        equal(found.numpy(), pixels.reshape(-1, 16), f"features of {images} images")


def _hold_attention(group: Any, name: str) -> None:
    """Causal attention of this rank's queries; within rounding of float32."""
    layout = layout_of(group, "zigzag" if name == "ring" else "sp")
    rng = np.random.default_rng(0)
    whole = [rng.standard_normal((1, layout.seq_len, group.nranks, 8)).astype("float32") for _ in range(3)]
    mine = [paddle.to_tensor(x[:, layout.positions()]) for x in whole]
    found = (
        ring_attention(*mine, layout=layout, group=group) if name == "ring" else ulysses_attention(*mine, group=group)
    )
    expected = full_attention(*(paddle.to_tensor(x) for x in whole)).numpy()[:, layout.positions()]
    worst = float(np.abs(found.numpy() - expected).max())
    if not worst < ROUNDING:
        raise ValueError(f"differs by {worst:.2g} from attention on the whole sequence, allowed is {ROUNDING}")
