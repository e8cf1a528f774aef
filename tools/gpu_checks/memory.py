"""Device memory, events and graphs, from PyTorch or CuPy: whichever finds a GPU."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from .oracle import Array

GUARD = 256  # bytes on both sides of an array that no kernel may touch
GUARD_BYTE = 0xA5


@dataclass(frozen=True)
class Device:
    name: str
    architecture: str  # "90"
    l2_bytes: int
    memory_bytes: int


class Memory(Protocol):
    """A buffer is a flat uint8 tensor of the framework; kernels outside of a capture go to `stream`."""

    name: str
    stream: int

    def device(self) -> Device: ...
    def free_bytes(self) -> int: ...
    def empty(self, size: int) -> Any: ...
    def address(self, buffer: Any) -> int: ...
    def write(self, buffer: Any, start: int, data: Array) -> None: ...
    def read(self, buffer: Any, start: int, size: int) -> Array: ...
    def copy(self, target: Any, source: Any) -> None: ...
    def synchronize(self) -> None: ...
    def milliseconds(self, run: Callable[[], None]) -> float: ...
    def capture(self, launch: Callable[[int], None]) -> Callable[[], None]: ...


class TorchMemory:
    """PyTorch's default stream is CUDA's: 0."""

    def __init__(self) -> None:
        self.torch: Any = importlib.import_module("torch")
        if not self.torch.cuda.is_available():
            raise RuntimeError("PyTorch sees no GPU")
        self.name = f"PyTorch {self.torch.__version__}"
        self.stream = 0

    def device(self) -> Device:
        found = self.torch.cuda.get_device_properties(0)
        l2_bytes = getattr(found, "L2_cache_size", 64 << 20)
        return Device(found.name, f"{found.major}{found.minor}", l2_bytes, found.total_memory)

    def free_bytes(self) -> int:
        return int(self.torch.cuda.mem_get_info()[0])

    def empty(self, size: int) -> Any:
        return self.torch.empty(size, dtype=self.torch.uint8, device="cuda")

    def address(self, buffer: Any) -> int:
        return int(buffer.data_ptr())

    def write(self, buffer: Any, start: int, data: Array) -> None:
        flat = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
        buffer[start : start + flat.size].copy_(self.torch.from_numpy(flat))

    def read(self, buffer: Any, start: int, size: int) -> Array:
        return np.array(buffer[start : start + size].cpu().numpy())

    def copy(self, target: Any, source: Any) -> None:
        target.copy_(source)

    def synchronize(self) -> None:
        self.torch.cuda.synchronize()

    def milliseconds(self, run: Callable[[], None]) -> float:
        start, end = (self.torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end))

    def capture(self, launch: Callable[[int], None]) -> Callable[[], None]:
        graph = self.torch.cuda.CUDAGraph()
        with self.torch.cuda.graph(graph):
            launch(int(self.torch.cuda.current_stream().cuda_stream))
        return lambda: graph.replay()


class CupyMemory:
    """Everything on one stream of its own: CuPy cannot capture the default one."""

    def __init__(self) -> None:
        self.cupy: Any = importlib.import_module("cupy")
        if self.cupy.cuda.runtime.getDeviceCount() == 0:
            raise RuntimeError("CuPy sees no GPU")
        self.cupy.cuda.set_allocator(None)  # each buffer its own allocation: a stray access shows
        self._stream = self.cupy.cuda.Stream(non_blocking=True)
        self.name = f"CuPy {self.cupy.__version__}"
        self.stream = int(self._stream.ptr)

    def device(self) -> Device:
        found = self.cupy.cuda.runtime.getDeviceProperties(0)
        name, l2_bytes = found["name"].decode(), found["l2CacheSize"]
        return Device(name, f"{found['major']}{found['minor']}", l2_bytes, found["totalGlobalMem"])

    def free_bytes(self) -> int:
        return int(self.cupy.cuda.runtime.memGetInfo()[0])

    def empty(self, size: int) -> Any:
        return self.cupy.empty(size, dtype=np.uint8)

    def address(self, buffer: Any) -> int:
        return int(buffer.data.ptr)

    def write(self, buffer: Any, start: int, data: Array) -> None:
        flat = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
        if flat.size > 0:
            buffer[start : start + flat.size].set(flat)
        self.synchronize()

    def read(self, buffer: Any, start: int, size: int) -> Array:
        self.synchronize()
        return np.array(buffer[start : start + size].get())

    def copy(self, target: Any, source: Any) -> None:
        with self._stream:
            target[...] = source

    def synchronize(self) -> None:
        self.cupy.cuda.runtime.deviceSynchronize()

    def milliseconds(self, run: Callable[[], None]) -> float:
        start, end = self.cupy.cuda.Event(), self.cupy.cuda.Event()
        start.record(self._stream)
        run()
        end.record(self._stream)
        end.synchronize()
        return float(self.cupy.cuda.get_elapsed_time(start, end))

    def capture(self, launch: Callable[[int], None]) -> Callable[[], None]:
        with self._stream:
            self._stream.begin_capture()
            launch(self.stream)
            graph = self._stream.end_capture()
        return lambda: graph.launch(stream=self._stream)


def find_memory(wanted: str = "auto") -> Memory:
    """PyTorch before CuPy; raises RuntimeError saying why neither serves."""
    kinds: dict[str, Callable[[], Memory]] = {"torch": TorchMemory, "cupy": CupyMemory}
    reasons = []
    for name in kinds if wanted == "auto" else [wanted]:
        try:
            return kinds[name]()
        except Exception as error:  # CuPy has its own errors for a missing driver
            reasons.append(f"{name}: {error}")
    raise RuntimeError("no GPU to run on (" + "; ".join(reasons) + ")")


class DeviceArray:
    """A copy of a numpy array on the device, `offset` bytes off alignment, between guard bytes."""

    def __init__(self, memory: Memory, host: Array, offset: int = 0) -> None:
        self._memory, self._dtype, self._shape = memory, host.dtype, host.shape
        self._start = GUARD + offset
        self._size = host.nbytes
        self.buffer = memory.empty(self._start + self._size + GUARD)
        memory.write(self.buffer, 0, np.full(self._start + self._size + GUARD, GUARD_BYTE, np.uint8))
        self.write(host)
        self.address = memory.address(self.buffer) + self._start

    def write(self, host: Array) -> None:
        assert host.nbytes == self._size
        self._memory.write(self.buffer, self._start, host)

    def read(self) -> Array:
        data = self._memory.read(self.buffer, 0, self._start + self._size + GUARD)
        end = self._start + self._size
        if (data[: self._start] != GUARD_BYTE).any() or (data[end:] != GUARD_BYTE).any():
            raise AssertionError(f"bytes outside an array of shape {self._shape} were overwritten")
        return data[self._start : end].view(np.uint8).copy().view(self._dtype).reshape(self._shape)
