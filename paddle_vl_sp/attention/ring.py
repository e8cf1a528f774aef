"""Ring attention: queries stay, keys and values travel around the ring; memory does not grow with the sequence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import paddle
from paddle import Tensor
from paddle.autograd import PyLayer, PyLayerContext

from paddle_vl_sp.attention.blocks import Kernel, Part
from paddle_vl_sp.attention.groups import Alone, group_or_alone
from paddle_vl_sp.attention.kernels import check_backward, choose_kernel
from paddle_vl_sp.attention.schedule import Schedule, ring_schedule, ring_share
from paddle_vl_sp.autograd import differentiable_once
from paddle_vl_sp.comm.collectives import Group
from paddle_vl_sp.comm.exchange import Messages, pass_on
from paddle_vl_sp.layout import SeqLayout


def ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    layout: SeqLayout,
    group: Group | None,
    causal: bool = True,
    scale: float | None = None,
    lengths: Sequence[int] | None = None,
) -> Tensor:
    """Attention of this rank's queries with the keys of the whole sequence: [B, S_local, heads, D] in and out.

    q         [B, S_local, Hq, D]; k [B, S_local, Hk, D] and v [B, S_local, Hk, Dv], where Hk divides Hq
    layout    its cp cut is the ring; where it has an sp cut too, `ulysses_attention` around this call undoes that
    group     the ranks of the ring, in the order of cp_rank; None is one process that holds the whole sequence
    lengths   how many positions of each segment are real, where segments were padded and causal is False: padding is
              never a key

    Each segment of the layout attends to itself only. Equivalent, on the whole sequence, to

        softmax(q @ k.T * scale + mask) @ v         scale = 1 / sqrt(D) unless given

    Forward sends k and v (ranks - 1) times. Backward sends them as often again, and their gradients, in fp32, too.

    ::

        layout = padded_layout(12, cu_seqlens=(0, 5, 12), cp_size=group.nranks, cp_rank=group.rank)
        out = ring_attention(q, k, v, layout=layout, group=group)  # q [1, layout.local_len, Hq, D]
    """
    group = group_or_alone(group)
    _check_ring(layout, group)
    check_heads(q, k, v)
    _check_rows(q, layout)
    schedule = ring_schedule(layout, causal, None if lengths is None else tuple(int(n) for n in lengths))
    rows = [ring_share(layout, source).local_len for source in range(layout.cp_size)]
    return attention_over(q, k, v, schedule, rows, group, scale)


def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    scale: float | None = None,
    cu_seqlens: Sequence[int] | None = None,
) -> Tensor:
    """Attention over a whole sequence on one rank, segment by segment: [B, S, heads, D] in and out.

    >>> q, k, v = (paddle.randn([1, 12, 4, 16]) for _ in range(3))
    >>> list(packed_attention(q, k, v, cu_seqlens=(0, 5, 12)).shape)
    [1, 12, 4, 16]
    """
    check_heads(q, k, v)
    layout = SeqLayout(q.shape[1], cu_seqlens=cu_seqlens)
    check_one_row(layout, q)
    return attention_over(q, k, v, ring_schedule(layout, causal), [q.shape[1]], Alone(0), scale)


def attention_over(
    q: Tensor, k: Tensor, v: Tensor, schedule: Schedule, rows: Sequence[int], group: Group, scale: float | None
) -> Tensor:
    """The attention that a schedule describes; rows says how many keys each rank of the ring holds."""
    scale = float(q.shape[-1]) ** -0.5 if scale is None else float(scale)
    kernel = choose_kernel(q, v).kernel
    check_backward(q, k, v, kernel.name)
    out: Tensor = _RingAttention.apply(q, k, v, _Ring(schedule, tuple(rows), group, kernel, scale))
    return out


@dataclass(frozen=True)
class _Ring:
    """The constants of one call, and whose keys this rank holds at each step."""

    schedule: Schedule
    rows: tuple[int, ...]  # how many keys each rank holds
    group: Group
    kernel: Kernel
    scale: float

    @property
    def size(self) -> int:
        return len(self.schedule)

    def source(self, step: int) -> int:
        """The rank whose keys are here at this step."""
        return (self.group.rank - step) % self.size

    def pass_on(self, tensors: Sequence[Tensor], step: int) -> tuple[list[Tensor], Messages]:
        """Sends what belongs to the source of `step` to the next rank; receives what belongs to the next source."""
        rows = self.rows[self.source(step + 1)]
        shapes = [[x.shape[0], rows, *x.shape[2:]] for x in tensors]
        return pass_on(tensors, shapes, self.group)


class _RingAttention(PyLayer):  # type: ignore[misc]
    @staticmethod
    def forward(ctx: PyLayerContext, q: Tensor, k: Tensor, v: Tensor, ring: _Ring) -> Tensor:
        with paddle.amp.auto_cast(enable=False):
            out, lse = _forward(ring, q, k, v)
        result = ring.kernel.store(out).astype(q.dtype)
        ctx.ring = ring
        ctx.needed = [not x.stop_gradient for x in (q, k, v)]
        ctx.save_for_backward(q, k, v, result.detach(), lse)  # not detached, it would keep its own graph: a leak
        return result

    @staticmethod
    @differentiable_once
    def backward(ctx: PyLayerContext, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensor()
        with paddle.amp.auto_cast(enable=False), paddle.no_grad():
            grads = _backward(ctx.ring, grad, q, k, v, out, lse)
        return tuple(g.astype(q.dtype) if needed else None for g, needed in zip(grads, ctx.needed, strict=True))


def _forward(ring: _Ring, q: Tensor, k: Tensor, v: Tensor) -> Part:
    """The output and its log-sum-exp, in the kernel's form."""
    kernel, heads, here = ring.kernel, k.shape[2], [k, v]
    q = kernel.load(q, heads)
    part = None
    for step in range(ring.size):
        last = step == ring.size - 1
        if not last:
            arriving, messages = ring.pass_on(here, step)
        keys, values = (kernel.load(x, heads) for x in here)
        part = kernel.forward(part, q, keys, values, ring.schedule[ring.source(step)], ring.scale)
        if not last:
            messages.wait()
            here = arriving
    return part or kernel.nothing(q, v.shape[-1])


def _backward(
    ring: _Ring, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values travel again. Their gradients follow one step behind, each rank adding its part, to their owner.

    What a rank's own queries contribute to the gradients of its own keys does not travel: it is added at the end.
    """
    kernel, heads, here = ring.kernel, k.shape[2], [k, v]
    q, grad, out = (kernel.load(x, heads) for x in (q, grad, out))
    grad_q, shared = None, kernel.shared(grad, out)
    own: list[Tensor] = []
    travelling: list[Tensor] = []
    for step in range(ring.size):
        last = step == ring.size - 1
        if not last:
            arriving, messages = ring.pass_on(here, step)
        if step > 1:
            travelling, grad_messages = ring.pass_on(travelling, step - 1)
        keys, values = (kernel.load(x, heads) for x in here)
        blocks = ring.schedule[ring.source(step)]
        grad_q, *grads = kernel.backward(grad_q, grad, q, keys, values, shared, lse, blocks, ring.scale)
        shares = [kernel.store(x) for x in grads]
        del grads  # else it is kept through the next step
        if step == 0:
            own = shares
        if step > 1:
            grad_messages.wait()
            travelling = _sums(travelling, shares)
        elif step == 1:
            travelling = [x.astype("float32") for x in shares]  # of one dtype on all ranks
        if not last:
            messages.wait()
            here = arriving
    if ring.size > 1:
        travelling, grad_messages = ring.pass_on(travelling, ring.size - 1)
        grad_messages.wait()
        own = _sums(own, travelling)
    grad_q = kernel.nothing(q, q.shape[-1]).out if grad_q is None else grad_q
    return kernel.store(grad_q), own[0], own[1]


def _sums(left: Sequence[Tensor], right: Sequence[Tensor]) -> list[Tensor]:
    return [x.astype("float32") + y.astype("float32") for x, y in zip(left, right, strict=True)]


def check_heads(q: Tensor, k: Tensor, v: Tensor) -> None:
    shapes = f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
    if any(len(x.shape) != 4 for x in (q, k, v)):
        raise ValueError(f"q, k and v must be [B, S_local, heads, D], got {shapes}")
    if len({x.dtype for x in (q, k, v)}) > 1:
        raise ValueError(f"q, k and v must have one dtype, got {q.dtype}, {k.dtype} and {v.dtype}: cast them first")
    if list(k.shape[:3]) != list(v.shape[:3]) or list(q.shape[:2]) != list(k.shape[:2]) or q.shape[3] != k.shape[3]:
        raise ValueError(f"q, k and v must agree in B and S_local, k and v in heads, q and k in D; got {shapes}")
    if k.shape[2] == 0 or q.shape[2] % k.shape[2]:
        raise ValueError(
            f"{q.shape[2]} query heads cannot share {k.shape[2]} key heads evenly: q heads must be a multiple"
        )


def check_one_row(layout: SeqLayout, x: Tensor) -> None:
    if layout.cu_seqlens is not None and x.shape[0] != 1:
        raise ValueError(
            f"cu_seqlens describes one packed row, B = 1, got B = {x.shape[0]}: attend to each row by itself"
        )


def _check_ring(layout: SeqLayout, group: Group) -> None:
    if (group.nranks, group.rank) != (layout.cp_size, layout.cp_rank):
        raise ValueError(
            f"the ring is the layout's cp cut, rank {layout.cp_rank} of {layout.cp_size}, but the group says rank "
            f"{group.rank} of {group.nranks}: make the layout with this group's size and rank"
        )


def _check_rows(q: Tensor, layout: SeqLayout) -> None:
    check_one_row(layout, q)
    expected = ring_share(layout).local_len
    if q.shape[1] == expected:
        return
    fix = "pass the rank's own share of the sequence"
    if layout.sp_size > 1:
        fix = "the layout has an sp cut too, so pass this function to ulysses_attention over the sp group"
    raise ValueError(f"q has {q.shape[1]} rows, the layout's cp share is {expected}: {fix}")
