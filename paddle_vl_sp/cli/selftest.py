"""selftest: rows, gradients and collectives against slow loops, on this machine's devices and a launch's ranks."""

from __future__ import annotations

import argparse
import atexit
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

import paddle_vl_sp as vlsp
from paddle_vl_sp.cli import Answer, Problem
from paddle_vl_sp.cli.installation import PADDLE
from paddle_vl_sp.cli.quiet import quiet
from paddle_vl_sp.cli.terminal import Progress, coloured
from paddle_vl_sp.layout import SeqLayout, layouts_of_all_ranks

if TYPE_CHECKING:
    from paddle import Tensor

    from paddle_vl_sp.comm.collectives import Group

Array = npt.NDArray[Any]
Pairs = list[tuple[tuple[int, int], int]]  # ((local position, sample), feature row)
Results = list[tuple[str, Array, Array]]  # (what it is, what was got, what was expected)

LAYOUT = SeqLayout(24, cp_size=2, sp_size=2)  # zigzag, then sequence parallel
DTYPES = ("float32", "bfloat16")
HIDDEN = 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """None: the devices are the CPU and the one that Paddle uses."""


def run(arguments: argparse.Namespace) -> Answer:
    """On every rank of a launch; rank 0 answers for all."""
    begin = time.monotonic()
    with quiet():
        backend, devices = _prepare()
        group, is_new = _group_of_launch()
    rank, num_ranks = (0, 1) if group is None else (group.rank, group.nranks)
    checks: dict[str, Callable[[], Results]] = {
        f"{device}: rows, {dtype}": partial(check_rows, device, dtype) for device in devices for dtype in DTYPES
    }
    if group is not None:
        collectives = {"all_gather_rows": check_gather, "complete_grad": check_complete, "encode_shared": check_shared}
        checks |= {name: partial(check, group) for name, check in collectives.items()}
    failed = []
    with Progress(len(checks), wanted=rank == 0) as bar:
        for name, check in checks.items():
            why = _failure(check)
            bar.advance(name)
            failed += [{"case": name, "rank": rank, "why": why}] if why else []
    if group is not None:
        failed = _of_all_ranks(failed, group)
    found = {"ok": not failed, "cases": len(checks), "failed": failed, "devices": devices, "ranks": num_ranks}
    found |= {"backend": backend, "seconds": round(time.monotonic() - begin, 2)}
    code = 1 if failed else 0
    if is_new:
        atexit.register(_leave_at_once, code)
    return Answer(found if rank == 0 else None, _report(found), code)


def _prepare() -> tuple[str, list[str]]:
    """The implementation in use, and the devices to check."""
    try:
        import paddle

        backend = str(vlsp.backend())
    except (ImportError, ValueError) as error:  # no Paddle, a wrong switch, or required operators are missing
        raise Problem(f"{error}; {'`doctor` says more' if sys.modules.get('paddle') else PADDLE}") from error
    return backend, sorted({"cpu", str(paddle.device.get_device())})


def _group_of_launch() -> tuple[Group | None, bool]:
    """The group of all ranks of the launch, if there is one, and whether it was made here."""
    if int(os.environ.get("PADDLE_TRAINERS_NUM", "1")) < 2:
        return None, False
    import paddle.distributed as dist

    is_new = not dist.is_initialized()
    if is_new:
        dist.init_parallel_env()
    return dist.get_group(0), is_new


def check_rows(device: str, dtype: str) -> Results:
    """Both row functions by the plan of every rank of LAYOUT: movement is exact, a sum is rounded once."""
    import paddle

    rng = np.random.default_rng(0)
    visual: Array = rng.random((3, LAYOUT.seq_len)) < 0.4  # [B, S]
    visual[1] = False
    results: Results = []
    for layout in layouts_of_all_ranks(LAYOUT):
        plan = vlsp.plan_visual(paddle.to_tensor(visual, place=device), None, layout, sequence_first=True)
        rows, tokens = (*plan.row_shape, HIDDEN), (int(visual.sum()), HIDDEN)  # [S_local, B, H], [N, H]
        drawn = [
            paddle.to_tensor(rng.standard_normal(shape), dtype=dtype, place=device, stop_gradient=False)
            for shape in (rows, tokens, rows)
        ]
        hidden, features, grad = drawn
        for name in ("replace_rows", "add_rows"):
            out = getattr(vlsp, name)(hidden, features, plan)
            got = out, *paddle.grad([out], [features, hidden], [grad])
            expected = slow_rows(name, [_float32(x) for x in drawn], slow_pairs(visual, layout))
            for what, x, slow in zip(("result", "features' gradient", "hidden's gradient"), got, expected, strict=True):
                rounded = _float32(paddle.to_tensor(slow, place="cpu").astype(dtype))
                where = f"{name} of cp rank {layout.cp_rank}, sp rank {layout.sp_rank}, {what}"
                results.append((where, _float32(x), rounded))
    return results


def slow_pairs(visual: Array, layout: SeqLayout) -> Pairs:
    """The pairs of a zigzag layout's rank, token by token, of a mask [B, S]."""
    chunks = np.split(np.arange(layout.seq_len), 2 * layout.cp_size)
    row = np.concatenate([chunks[layout.cp_rank], chunks[-1 - layout.cp_rank]])
    owned = np.split(row, layout.sp_size)[layout.sp_rank].tolist()
    tokens = np.argwhere(visual).tolist()  # (sample, position), in reading order
    return [((owned.index(s), b), n) for n, (b, s) in enumerate(tokens) if s in owned]


def slow_rows(name: str, drawn: list[Array], pairs: Pairs) -> tuple[Array, Array, Array]:
    """(result, gradient of the features, gradient of the hidden states), row by row."""
    hidden, features, grad = drawn
    out, feature_grad, hidden_grad = hidden.copy(), np.zeros_like(features), grad.copy()
    for row, n in pairs:
        feature_grad[n] = grad[row]
        if name == "add_rows":
            out[row] = out[row] + features[n]
        else:
            out[row] = features[n]
            hidden_grad[row] = 0
    return out, feature_grad, hidden_grad


def check_gather(group: Group) -> Results:
    """Rank r has 3 r rows; movement, and a gradient that is a sum of small whole numbers: both exact."""
    import paddle

    counts = [3 * rank for rank in range(group.nranks)]
    whole = np.arange(sum(counts) * HIDDEN, dtype="float32").reshape(-1, HIDDEN)
    begin = sum(counts[: group.rank])
    x = paddle.to_tensor(whole[begin : begin + counts[group.rank]], stop_gradient=False)
    out = vlsp.all_gather_rows(x, counts, group)
    out.backward(paddle.full_like(out, group.rank + 1.0))
    grad = np.full(x.shape, sum(range(group.nranks + 1)))
    return [("rows", out.numpy(), whole), ("gradient", x.grad.numpy(), grad)]


def check_complete(group: Group) -> Results:
    """Every rank's gradient of the features is that of one process; a row has one owner, so exact."""
    import paddle

    layout = SeqLayout(4 * group.nranks, sp_size=group.nranks, sp_rank=group.rank)
    visual = np.arange(2 * layout.seq_len).reshape(2, -1) % 3 > 0  # [B, S]
    weight = np.arange(visual.size * HIDDEN, dtype="float32").reshape(*visual.shape, HIDDEN)
    features = paddle.ones([int(visual.sum()), HIDDEN])
    features.stop_gradient = False
    plan = vlsp.plan_visual(paddle.to_tensor(visual), None, layout, sequence_first=False)
    (whole,) = vlsp.complete_grad([features], plan, group)
    out = vlsp.add_rows(paddle.zeros([*plan.row_shape, HIDDEN]), whole, plan)
    out.backward(paddle.to_tensor(weight[:, layout.positions()]))
    return [("features' gradient", features.grad.numpy(), weight[visual])]


def check_shared(group: Group) -> Results:
    """Images of different sizes, more than ranks: features, and the sum over the ranks of the gradients, exact."""
    import paddle
    import paddle.distributed as dist

    grid = np.array([[1, 2, 2 * (image + 1)] for image in range(2 * group.nranks + 1)], dtype=np.int64)
    pixels = np.arange(grid.prod(axis=1).sum() * 4, dtype="float32").reshape(-1, 4)
    x = paddle.to_tensor(pixels, stop_gradient=False)
    found = vlsp.encode_shared(lambda x, _: x.reshape([-1, 16]), x, grid, group=group, merge_size=2)
    found.sum().backward()
    grad = x.grad.clone()
    dist.all_reduce(grad, group=group)
    summed = np.full_like(pixels, group.nranks)
    return [("features", found.numpy(), pixels.reshape(-1, 16)), ("sum of gradients", grad.numpy(), summed)]


def _failure(check: Callable[[], Results]) -> str:
    """The first difference, or what was raised; empty where all is equal."""
    try:
        for what, got, expected in check():
            if got.shape != expected.shape:
                return f"{what}: shape {list(got.shape)}, expected {list(expected.shape)}"
            if (got != expected).any():
                place = tuple(np.argwhere(got != expected)[0].tolist())
                return f"{what}: {got[place]} at {list(place)}, expected {expected[place]}"
    except Exception as error:  # whatever it is, it is the finding
        return f"{type(error).__name__}: {error}"
    return ""


def _of_all_ranks(failed: list[dict[str, Any]], group: Group) -> list[dict[str, Any]]:
    import paddle.distributed as dist

    gathered: list[list[dict[str, Any]]] = []
    dist.all_gather_object(gathered, failed, group=group)
    return [failure for of_rank in gathered for failure in of_rank]


def _float32(x: Tensor) -> Array:
    numbers: Array = x.astype("float32").numpy()
    return numbers


def _leave_at_once(code: int) -> None:
    """Skips the end of the interpreter: gloo's threads may outlive the other ranks' sockets and abort there."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _report(found: dict[str, Any]) -> str:
    verdict = coloured("PASS", "green") if found["ok"] else coloured("FAIL", "red")
    where = f"{' and '.join(found['devices'])}, {found['ranks']} rank{'s' if found['ranks'] > 1 else ''}"
    lines = [f"{verdict}  {found['cases']} cases on {where} in {found['seconds']} s; {found['backend']}"]
    lines += [f"{coloured('FAIL', 'red')}  rank {f['rank']}, {f['case']}: {f['why']}" for f in found["failed"]]
    return "\n".join(lines)
