"""The classes of PaddleFleet that Qwen3-VL's models on it are built of: ours are subclasses, put in their places."""

from __future__ import annotations

from typing import Any

from paddle import Tensor

from paddle_vl_sp.autograd import keep_gradient_contiguous
from paddle_vl_sp.formers.contracts import has_one_weight, merges_as_ours
from paddle_vl_sp.formers.known import Family, Swapped

BUILDERS = "paddlefleet.models.gpt.gpt_layer_specs"
UNIT = "Qwen3-VL fleet"  # its layers take what this embedding hands on


def visual_embedding(base: type) -> type:
    """One plan for merge, deepstack layers and gradients, images with videos, plans of the data loader."""
    from paddle_vl_sp.fleet.embedding import VisualEmbedding
    from paddle_vl_sp.fleet.topology import visual_subclass

    if VisualEmbedding in base.__mro__:
        return base
    return visual_subclass(VisualEmbedding, base)


class _ContiguousHead:
    weight: Tensor | None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.weight is not None and not self.weight.stop_gradient:
            keep_gradient_contiguous(self.weight)


def contiguous_head(base: type) -> type:
    """Keeps the LM head's gradient contiguous: Paddle's fused all-reduce over data parallel permutes strided ones."""
    if _ContiguousHead in base.__mro__:
        return base
    return type(base.__name__, (_ContiguousHead, base), {"__module__": base.__module__, "__doc__": base.__doc__})


EMBEDDING = Family(
    "PaddleFleet's embedding",
    BUILDERS,
    replaced=(),
    swapped=(Swapped(BUILDERS, "GPTEmbedding", visual_embedding, sources=("65924e10e00b8a30",)),),
    contract=(merges_as_ours("GPTEmbedding"),),
    part_of=UNIT,
)
HEAD = Family(
    "PaddleFleet's LM head",
    BUILDERS,
    replaced=(),
    swapped=(Swapped(BUILDERS, "GPTLMHead", contiguous_head, sources=("358ccabbd44a2b35",)),),
    contract=(has_one_weight("GPTLMHead"),),
    part_of=UNIT,
)
