"""What an audit changes while it runs, and puts back: gradients, buffers, states of random numbers."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import paddle
from paddle import Tensor


class RandomState:
    """The states of all generators that a forward may draw from; `restore` makes the next forward draw the same."""

    def __init__(self) -> None:
        self._cpu, self._device = paddle.get_rng_state("cpu"), paddle.get_rng_state()
        self._tracked = _tracker().get_states_tracker()
        self._fleet = _fleet_states()
        self._numpy, self._python = np.random.get_state(), random.getstate()

    def restore(self) -> None:
        if self._tracked:
            _tracker().set_states_tracker(self._tracked)
        if self._fleet:
            _fleet_tracker().set_states(dict(self._fleet))  # a copy: a forward writes into it
        paddle.set_rng_state(self._device)
        paddle.set_rng_state(self._cpu, "cpu")
        np.random.set_state(self._numpy)
        random.setstate(self._python)


def _tracker() -> Any:
    """Paddle's generators for tensor-parallel dropout."""
    from paddle.distributed.fleet.layers.mpu.random import get_rng_state_tracker

    return get_rng_state_tracker()


def _fleet_states() -> dict[str, Any]:
    """By name, of PaddleFleet's own tracker; a forward cannot draw from one that nothing has seeded."""
    get_states = getattr(_fleet_tracker(), "get_states", dict)
    states: dict[str, Any] = get_states()
    return states


def _fleet_tracker() -> Any:
    """PaddleFleet's generators for tensor-parallel dropout, beside Paddle's; None where no model has imported it."""
    module = sys.modules.get("paddlefleet.tensor_parallel.random")
    get_tracker = getattr(module, "get_cuda_rng_tracker", None)
    return None if get_tracker is None else get_tracker()


class Before:
    """Buffers and random states as they were before the audit; every forward starts from them."""

    def __init__(self, buffers: Iterable[Tensor]) -> None:
        self._buffers = [(buffer, buffer.detach().clone()) for buffer in buffers]
        self._random = RandomState()

    def restore(self) -> None:
        for buffer, value in self._buffers:
            assign(buffer, value)
        self._random.restore()


@contextmanager
def kept(parameters: Sequence[Tensor], buffers: Iterable[Tensor]) -> Iterator[Before]:
    """Begins with no gradients; at the end gradients, buffers and random states are what they were."""
    before, gradients = Before(buffers), [_take_gradients(parameter) for parameter in parameters]
    try:
        yield before
    finally:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            _give_back(parameter, *gradient)
        before.restore()


def assign(target: Tensor, value: Tensor) -> None:
    """Writes into the target's own memory, which fused buffers share."""
    with paddle.no_grad():
        target.set_value(value)


def gradient_of(parameter: Tensor) -> Tensor | None:
    """What the optimizer will see: the float32 gradient of mixed precision, where there is one."""
    main: Tensor | None = getattr(parameter, "main_grad", None)
    return parameter.grad if main is None else main


def _take_gradients(parameter: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Copies of grad and main_grad; both are zero or absent afterwards."""
    gradients = parameter.grad, getattr(parameter, "main_grad", None)
    copies = tuple(None if gradient is None else gradient.detach().clone() for gradient in gradients)
    with paddle.no_grad():
        for gradient in gradients:
            if gradient is not None:
                gradient.zero_()
    return copies  # type: ignore[return-value]


def _give_back(parameter: Tensor, gradient: Tensor | None, main: Tensor | None) -> None:
    if gradient is None:
        parameter.clear_gradient(False)  # False: absent again, not zeros
    elif parameter.grad is None:
        parameter.grad = gradient
    else:
        assign(parameter.grad, gradient)
    if main is not None:
        assign(parameter.main_grad, main)
    elif getattr(parameter, "main_grad", None) is not None:
        parameter.main_grad = None
