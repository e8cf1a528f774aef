"""As much of PyTorch as tools/gpu_check.py uses, over numpy: "cuda" is the host.

CUDA_EMULATOR is the library that build.py makes, which replays graphs; without it there is no GPU.
"""

import ctypes
import itertools
import os
import time
from contextlib import contextmanager
from types import SimpleNamespace

import ml_dtypes
import numpy as np

__version__ = "emulated"
bool = np.dtype(np.bool_)
uint8, int16, int32, int64 = (np.dtype(name) for name in ("uint8", "int16", "int32", "int64"))
float16, float32, float64 = (np.dtype(name) for name in ("float16", "float32", "float64"))
bfloat16 = np.dtype(ml_dtypes.bfloat16)
dtype = np.dtype
isnan = np.isnan

LIBRARY = os.environ.get("CUDA_EMULATOR")
PROPERTIES = SimpleNamespace(name="an emulator", major=9, minor=0, total_memory=8 << 30, L2_cache_size=1 << 12)
rng = np.random.default_rng(0)
np.seterr(all="ignore")


class Tensor(np.ndarray):
    def element_size(self):
        return self.itemsize

    def numel(self):
        return self.size

    def data_ptr(self):
        return self.ctypes.data

    def cpu(self):
        return self.copy()

    cuda = clone = cpu

    def to(self, dtype):
        return self.astype(dtype)

    def copy_(self, values):
        self[...] = values
        return self

    fill_ = copy_

    def zero_(self):
        return self.copy_(0)

    def normal_(self):
        return self.copy_(rng.standard_normal(self.shape).astype(self.dtype))

    def nonzero(self):
        return np.stack(np.ndarray.nonzero(self), axis=1).view(Tensor)

    def index_put_(self, indices, values):
        self[indices] = values

    def index_copy_(self, axis, index, values):
        self[index] = values

        return self

    index_fill_ = index_copy_

    def index_add_(self, axis, index, values):
        self[index] += values
        return self

    def index_copy(self, axis, index, values):
        return self.clone().index_copy_(axis, index, values)

    index_fill = index_copy

    def index_add(self, axis, index, values):
        return self.clone().index_add_(axis, index, values)

    def masked_scatter_(self, mask, values):
        self[np.broadcast_to(mask, self.shape)] = values.ravel()


def from_numpy(array):
    assert array.flags.writeable
    return array.view(Tensor)


def full(shape, value, dtype=None, device=None):
    return np.full(shape, value, dtype).view(Tensor)


def empty(shape, dtype, device):
    return full(shape, 99, dtype)


def zeros(shape, dtype, device=None):
    return full(shape, 0, dtype)


def full_like(tensor, value):
    return full(tensor.shape, value, tensor.dtype)


def zeros_like(tensor):
    return full_like(tensor, 0)


def empty_like(tensor):
    return tensor.copy()


def add(one, other, out):
    out[...] = one + other


def tensor(values):
    return np.array(values).view(Tensor)


def stack(tensors):
    return np.stack(tensors).view(Tensor)


def where(condition, yes, no):
    return np.where(condition, yes, no).view(Tensor)


def promote_types(one, other):
    return float64 if float64 in (one, other) else float32


class CUDAGraph:
    streams = itertools.count(1)

    def __init__(self):
        self.stream = next(self.streams)

    def replay(self):
        ctypes.CDLL(LIBRARY).cuda_emulator_replay(ctypes.c_void_p(self.stream))


class Event:
    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.seconds = time.perf_counter()

    def synchronize(self):
        pass

    def elapsed_time(self, end):
        return 1e3 * (end.seconds - self.seconds) + 1e-6


current = [0]


@contextmanager
def capture(graph):
    current[0] = graph.stream
    yield
    current[0] = 0


cuda = SimpleNamespace(
    is_available=lambda: LIBRARY is not None,
    get_device_properties=lambda device: PROPERTIES,
    mem_get_info=lambda: (8 << 30, 8 << 30),
    current_stream=lambda: SimpleNamespace(cuda_stream=current[0]),
    synchronize=lambda: None,
    CUDAGraph=CUDAGraph,
    graph=capture,
    Event=Event,
)
