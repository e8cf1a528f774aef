"""Which kernel computes the blocks: Paddle's flash attention where it can run, else plain Paddle, and the reason."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import paddle
from paddle import Tensor

from paddle_vl_sp.attention.blocks import Blockwise, Kernel
from paddle_vl_sp.attention.schedule import Block

FLASH_ROWS = 128  # flash attention rounds the rows of its log-sum-exp up to a multiple of this
FLASH_HEAD_SIZE = 256


class Flash:
    """paddle._C_ops.flash_attn and its gradient operator, a whole block at a time; fp16 or bf16 on a GPU.

    The operator scales by 1 / sqrt(D), so another scale is multiplied into the queries. Its gradient operator takes the
    output and log-sum-exp as arguments, so it can be given those over the keys of all blocks.

    Queries are padded to a multiple of 128 rows, for which the operator's log-sum-exp has no gaps. A causal block's
    keys are padded too; the causal mask hides them from the real queries. The gradient of padded output rows is zero,
    so padding adds nothing to the gradients.
    """

    name = "flash"
    axis = 1

    def load(self, x: Tensor, kv_heads: int) -> Tensor:
        return x

    def store(self, x: Tensor) -> Tensor:
        return x

    def zeros(self, rows: Tensor, width: int, value: float = 0.0) -> Tensor:
        return paddle.full([*rows.shape[:3], width], value, "float32")

    def shared(self, grad: Tensor, out: Tensor) -> Tensor:
        return out

    def pieces(self, block: Block) -> Iterable[Block]:
        return (block,)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
        rows = q.shape[1]
        q, k, v = _operands(q, k, v, scale, causal)
        out, _, lse, _ = paddle._C_ops.flash_attn(q, k, v, None, None, 0.0, causal, False, True, "")
        lse = lse[:, :, :rows].transpose([0, 2, 1]).unsqueeze(-1)  # [B, Sq, Hq, 1]
        return out[:, :rows].astype("float32"), lse

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, shared: Tensor, lse: Tensor, scale: float, causal: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        rows, cols, kind = q.shape[1], k.shape[1], q.dtype
        q, k, v = _operands(q, k, v, scale, causal)
        out, grad = (_pad_rows(x.astype(kind)) for x in (shared, grad))
        lse = _pad_rows(lse.squeeze(-1)).transpose([0, 2, 1]).contiguous()
        seed = paddle.zeros([2], "int64").cpu()  # read only by dropout, which is off
        grads = paddle._C_ops.flash_attn_grad(q, k, v, out, lse, seed, None, grad, 0.0, causal)
        grad_q, grad_k, grad_v = (x[:, :n].astype("float32") for x, n in zip(grads, (rows, cols, cols), strict=True))
        return apply_scale(grad_q, scale), grad_k, grad_v


@dataclass(frozen=True)
class Choice:
    """The kernel in use and the reason."""

    kernel: Kernel
    reason: str

    def __str__(self) -> str:
        return f"{self.kernel.name}: {self.reason}"


def choose_kernel(q: Tensor, v: Tensor) -> Choice:
    """Flash attention for fp16 or bf16 on a GPU of compute capability 8.0 or more, where q, k and v have heads of one
    size, a multiple of 8 up to 256; blockwise otherwise."""
    obstacles = _flash_obstacles(q, v)
    if obstacles:
        return Choice(Blockwise(), obstacles[0])
    return Choice(Flash(), f"{q.dtype} on {q.place}, heads of {q.shape[-1]}")


def _flash_obstacles(q: Tensor, v: Tensor) -> list[str]:
    kind, width = str(q.dtype).removeprefix("paddle."), q.shape[-1]
    checks = [
        (not q.place.is_gpu_place(), f"the tensors are on {q.place}, flash attention needs a GPU"),
        (q.place.is_gpu_place() and _before_ampere(), "the GPU is older than compute capability 8.0"),
        (kind not in ("float16", "bfloat16"), f"the dtype is {kind}, flash attention needs float16 or bfloat16"),
        (v.shape[-1] != width, f"heads are {width} wide in q and k, {v.shape[-1]} in v"),
        (width > FLASH_HEAD_SIZE or width % 8 != 0, f"heads are {width} wide: flash takes multiples of 8 up to 256"),
    ]
    return [reason for applies, reason in checks if applies]


def _before_ampere() -> bool:
    return bool(paddle.device.cuda.get_device_capability()[0] < 8)


def _operands(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor, Tensor]:
    q = _pad_rows(apply_scale(q, scale))
    if causal:
        k, v = _pad_rows(k), _pad_rows(v)
    return q.contiguous(), k.contiguous(), v.contiguous()


def _pad_rows(x: Tensor) -> Tensor:
    """[B, S, ...] with zero rows at the end, up to a multiple of 128."""
    missing = -x.shape[1] % FLASH_ROWS
    if not missing:
        return x
    return paddle.concat([x, paddle.zeros([x.shape[0], missing, *x.shape[2:]], x.dtype)], axis=1)


def apply_scale(x: Tensor, scale: float) -> Tensor:
    """x * (scale / (1 / sqrt(D))): the operator multiplies by 1 / sqrt(D) itself."""
    factor = scale * float(x.shape[-1]) ** 0.5
    return x if abs(factor - 1.0) < 1e-6 else x * factor
