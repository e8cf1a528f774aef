"""Every operation, by custom operators where the device of its tensors has them, else in plain Paddle."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import paddle
from paddle import Tensor
from paddle.jit.sot import psdb

from paddle_vl_sp.backends import load, plain
from paddle_vl_sp.backends.checks import check_ir
from paddle_vl_sp.backends.copies import on_place
from paddle_vl_sp.layout import SeqLayout

if TYPE_CHECKING:
    import numpy.typing as npt

Result = TypeVar("Result")


def build_plan(
    tokens: Tensor,
    ids: tuple[int, ...] | None,
    layout: SeqLayout,
    sequence_first: bool,
    num_features: int,
    padded: bool,
) -> tuple[Tensor, Tensor, Tensor | npt.NDArray[np.int64]]:
    """update, gather and counts [2]: a tensor for a padded plan, else a numpy array."""
    check_ir()
    chosen = _implementation(tokens)
    if padded:
        update, gather, counts = chosen.build_plan(tokens, ids, layout, sequence_first, num_features, True)
        return update, gather, counts
    if is_tracing():
        raise ValueError(
            "an exact plan has a size that is in the data, which a traced graph does not know: padded=True, or "
            "export.IndexBuilder"
        )
    if plain.is_on_host(tokens):
        update, gather, counts = chosen.build_plan(tokens, ids, layout, sequence_first, -1, False)
        return update, gather, counts.numpy()
    update, gather, counts = chosen.build_plan(tokens, ids, layout, sequence_first, -1, True)
    counts = counts.numpy()  # the one host sync, for both numbers
    n = int(counts[0])
    return update[:n], gather[:n], counts


def replace_rows(hidden: Tensor, features: Tensor, update: Tensor, gather: Tensor) -> Tensor:
    return _implementation(hidden).replace_rows(hidden, features, update, gather)


def add_rows(hidden: Tensor, features: Tensor, update: Tensor, gather: Tensor, inplace: bool) -> Tensor:
    chosen = _implementation(hidden)
    if not inplace or is_tracing():  # a graph plans its memory itself
        return chosen.add_rows(hidden, features, update, gather)
    needs_new_graph = hidden.stop_gradient and not features.stop_gradient and paddle.is_grad_enabled()
    if chosen is plain or needs_new_graph or not hidden.is_contiguous():
        return paddle.assign(chosen.add_rows(hidden, features, update, gather), output=hidden)
    return chosen.add_rows_inplace(hidden, features, update, gather)


def joint_order(
    tokens: Tensor, ids: tuple[int, ...], num_image: int, num_video: int
) -> tuple[Tensor, npt.NDArray[np.int64]]:
    order, counts = plain.joint_order(tokens, ids, num_image, num_video)
    return order, counts.numpy()


def joint_rows(image: Tensor, video: Tensor, order: Tensor | npt.NDArray[np.int64]) -> Tensor:
    if isinstance(order, np.ndarray):
        order = on_place(order, image.place)
    return plain.joint_rows(image, video, order)


def untranslated(function: Callable[..., Result], *arguments: Any) -> Result:
    """function(*arguments), eagerly inside the default `to_static`, whose bytecode translator knows no properties."""
    psdb.fallback(recursive=True)
    return function(*arguments)


def is_tracing() -> bool:
    """Whether a static graph is being traced, where tensors have no place and shapes may not be numbers."""
    return not paddle.in_dynamic_mode()


def has_operators(device: str) -> bool:
    """Whether the operators can run on a device such as "cpu" or "gpu:0"."""
    kind, _, number = device.partition(":")
    return load.has_kernels_for(int(number)) if kind == "gpu" else kind in load.backend().devices


def _implementation(x: Tensor) -> ModuleType:
    """The module to use on x's device or, while a graph is traced, on the current one, where it will run."""
    if not has_operators(paddle.get_device() if is_tracing() else _device(x)):
        return plain
    from paddle_vl_sp.backends import operators

    return operators


def _device(x: Tensor) -> str:
    if x.place.is_gpu_place():
        return f"gpu:{x.place.gpu_device_id()}"
    return "cpu" if x.place.is_cpu_place() else "other"
