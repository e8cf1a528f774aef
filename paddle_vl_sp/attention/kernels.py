"""Which kernel computes the blocks: Paddle's flash attention where it can run, else plain Paddle, and the reason."""

from __future__ import annotations

from dataclasses import dataclass

import paddle
from paddle import Tensor

from paddle_vl_sp.attention.blocks import Blockwise, Kernel
from paddle_vl_sp.attention.flash import Flash

FLASH_HEAD_SIZE = 256
FLASH_BACKWARD_HEAD_SIZE = 192  # where the GPU has less shared memory than an A100 or H100


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


def check_backward(q: Tensor, k: Tensor, v: Tensor, name: str) -> None:
    """Raises before the forward where flash attention (the name of the kernel) would raise in the backward."""
    wants_grad = paddle.is_grad_enabled() and not all(x.stop_gradient for x in (q, k, v))
    if name != "flash" or not wants_grad or q.shape[-1] <= FLASH_BACKWARD_HEAD_SIZE:
        return
    major, minor = _capability(q)
    if major == 8 and minor != 0:
        raise ValueError(
            f"heads are {q.shape[-1]} wide, and on a GPU of compute capability {major}.{minor} the backward of flash "
            f"attention takes up to {FLASH_BACKWARD_HEAD_SIZE}: use one of 8.0, or 9.0 and more (A100, H100); or "
            "float32 q, k and v, for which plain Paddle is used; or paddle.no_grad() if no gradient is needed"
        )


def _flash_obstacles(q: Tensor, v: Tensor) -> list[str]:
    kind, width = str(q.dtype).removeprefix("paddle."), q.shape[-1]
    on_gpu = q.place.is_gpu_place()
    checks = [
        (not on_gpu, f"the tensors are on {q.place}, flash attention needs a GPU"),
        (on_gpu and _capability(q) < (8, 0), "the GPU is older than compute capability 8.0"),
        (kind not in ("float16", "bfloat16"), f"the dtype is {kind}, flash attention needs float16 or bfloat16"),
        (v.shape[-1] != width, f"heads are {width} wide in q and k, {v.shape[-1]} in v"),
        (width > FLASH_HEAD_SIZE or width % 8 != 0, f"heads are {width} wide: flash takes multiples of 8 up to 256"),
    ]
    return [reason for applies, reason in checks if applies]


def _capability(x: Tensor) -> tuple[int, int]:
    """Of the GPU that x is on, which may not be the current one."""
    major, minor = paddle.device.cuda.get_device_capability(x.place.gpu_device_id())
    return int(major), int(minor)
