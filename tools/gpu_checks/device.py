"""The GPU by way of PyTorch: guarded tensors, launches, captured graphs, times by CUDA events."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .library import Library

GUARD = 256  # bytes on both sides of a tensor that no kernel may touch
GUARD_BYTE = 0xA5


class Guarded:
    """A copy on the GPU of a host tensor, `offset` elements off alignment, between guard bytes."""

    def __init__(self, values: Tensor, offset: int = 0) -> None:
        start = GUARD + offset * values.element_size()
        stop = start + values.numel() * values.element_size()
        buffer = torch.full((stop + GUARD,), GUARD_BYTE, dtype=torch.uint8, device="cuda")
        self.tensor = buffer[start:stop].view(values.dtype).reshape(values.shape)
        self.tensor.copy_(values)
        self.address = buffer.data_ptr() + start
        self._guards = buffer[:start], buffer[stop:]

    def read(self) -> Tensor:
        if any(bool((guard != GUARD_BYTE).any()) for guard in self._guards):
            raise AssertionError(f"bytes outside a tensor of shape {list(self.tensor.shape)} were overwritten")
        return self.tensor.cpu()


def stream() -> int:
    """The stream that PyTorch uses now: the default one, or that of a capture."""
    return int(torch.cuda.current_stream().cuda_stream)


@dataclass
class Rows:
    """The arrays of a row operation, on the GPU."""

    hidden: Tensor  # [R, H]
    features: Tensor  # [N, H]
    out: Tensor  # [R, H]
    update: Tensor  # [n]
    gather: Tensor  # [n]
    map: Tensor  # [R]

    def launch(self, library: Library, operation: str) -> None:
        hidden, features = ((x.data_ptr(), str(x.dtype).removeprefix("torch.")) for x in (self.hidden, self.features))
        indices = (self.update.data_ptr(), self.gather.data_ptr(), self.map.data_ptr())
        sizes = (len(self.update), len(self.hidden), len(self.features), self.hidden.shape[1])
        library.rows(operation, self.out.data_ptr(), hidden, features, indices, sizes, stream())


def capture(launch: Callable[[], Any]) -> Callable[[], None]:
    """`launch` as a graph, after a plain run that loads its kernels; returns what replays it."""
    launch()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch()
    return lambda: graph.replay()


def microseconds(run: Callable[[], Any]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return 1e3 * float(start.elapsed_time(end))
