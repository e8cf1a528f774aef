"""PaddleFleet's GPTLMHead over a linear layer of our own: what ours, a subclass of it, relies on."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import numpy as np
import paddle
from paddle import Tensor
from paddle.nn import Layer

from paddle_vl_sp.formers.contracts.fleet_parts import VOCAB, WIDTH, config
from paddle_vl_sp.formers.known import Clause, Family, below_ours


def has_one_weight(name: str) -> Clause:
    """Its constructor leaves a `weight`, its own, None or given to it, and the logits' gradient arrives there."""

    def broken(family: Family, module: Any) -> str:
        base = below_ours(getattr(module, name))
        with _linear_base(base):
            for nranks in (1, 2):
                why = _of_heads(base, family.swapped[0].make(base), nranks)
                if why:
                    return f"{why}: {nranks} rank{'s' * (nranks > 1)}"
        return ""

    return Clause(f"{name} has one weight, and ours only changes how its gradient lies", broken)


def _of_heads(base: type, ours: type, nranks: int) -> str:
    if getattr(_built(ours, nranks, skips=True), "weight", 0) is not None:
        return "it makes a weight where it is told not to"
    theirs, mine = (_built(cls, nranks, skips=False) for cls in (base, ours))
    if not all(isinstance(head.weight, Tensor) for head in (theirs, mine)):
        return "its weight is not one tensor"
    for batch in (1, 3):
        results = [_trained(head, batch, nranks) for head in (theirs, mine)]
        if any(grad is None for _, grad in results):
            return "no gradient arrives at its weight"
        (wanted, wanted_grad), (got, grad) = results
        if not (np.array_equal(wanted.numpy(), got.numpy()) and np.array_equal(wanted_grad.numpy(), grad.numpy())):
            return "other logits, or another gradient"
        if not grad.is_contiguous():
            return "its weight's gradient is not contiguous in ours"
    return ""


def _built(cls: type, nranks: int, skips: bool) -> Any:
    """With the arguments that PaddleFleet's builders give."""
    return cls(
        input_size=WIDTH,
        output_size=VOCAB,
        config=config(nranks),
        init_method=lambda weight: weight,
        bias=False,
        skip_bias_add=False,
        gather_output=False,
        skip_weight_param_allocation=skips,
        tp_group=None,
    )


def _trained(head: Any, batch: int, nranks: int) -> tuple[Any, Any]:
    """Logits of this rank's columns, and the gradient of the weight."""
    rng = np.random.default_rng(2)
    head.weight.set_value(rng.standard_normal(head.weight.shape).astype("float32"))
    head.clear_gradients(set_to_zero=False)
    shape = (4, batch, WIDTH) if nranks > 1 else (batch, 4, WIDTH)
    logits = head.forward({"hidden_states": paddle.to_tensor(rng.standard_normal(shape).astype("float32"))})
    (logits * paddle.arange(logits.size, dtype="float32").reshape(logits.shape)).sum().backward()
    return logits, head.weight.grad


class _Linear:
    """Stands for ColumnParallelLinear, which needs groups and a random state."""

    @staticmethod
    def build(
        self: Any,
        input_size: int,
        output_size: int,
        *,
        config: Any,
        skip_weight_param_allocation: bool = False,
        **_: Any,
    ) -> None:
        Layer.__init__(self)
        self.config, self.world_size, self.rank, self.is_expert = config, config.tensor_model_parallel_size, 0, False
        self.input_size, self.output_size = input_size, output_size
        self.output_size_per_partition = output_size // self.world_size
        self.weight = self.bias = None
        if not skip_weight_param_allocation:
            self.weight = self.create_parameter([input_size, self.output_size_per_partition])

    @staticmethod
    def multiply(self: Any, rows: Tensor, weight: Tensor | None = None, *_: Any, **__: Any) -> tuple[Tensor, None]:
        return paddle.matmul(rows, self.weight if weight is None else weight), None


@contextmanager
def _linear_base(cls: type) -> Iterator[None]:
    below, module = cls.__mro__[1], sys.modules[cls.__module__]
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(below, "__init__", _Linear.build))
        stack.enter_context(mock.patch.object(below, "forward", _Linear.multiply))
        for name in vars(module):
            if name.startswith("_initialize_affine_weight"):
                stack.enter_context(mock.patch.object(module, name))
        yield
