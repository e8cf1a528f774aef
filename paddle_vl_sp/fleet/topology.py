"""PaddleFleet's modules, and what share of the sequence an embedding or a layer holds."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import types
from dataclasses import dataclass
from typing import Any

import paddle

from paddle_vl_sp.comm.collectives import Group
from paddle_vl_sp.layout import SeqLayout

ROOT = "paddlefleet"
PUBLIC_MODULE = "paddle_vl_sp.fleet"


def require_paddlefleet() -> None:
    """Raises an ImportError that says what to install where PaddleFleet cannot be imported."""
    try:
        importlib.import_module(ROOT)
    except ImportError as error:
        raise ImportError(
            f"{PUBLIC_MODULE} extends PaddleFleet, but `import {ROOT}` failed ({error}): install paddlefleet as your "
            "Paddle version asks for it; the copy inside development versions of PaddleFormers (paddleformers.fleet) "
            "is not supported"
        ) from error


def fleet_module(name: str) -> Any:
    return importlib.import_module(f"{ROOT}.{name}")


@functools.cache
def visual_subclass(mixin: type, base: type) -> type:
    """`base` with the mixin in front of it, named Visual + its name; the same class for the same base."""
    body = {"__doc__": mixin.__doc__, "__module__": PUBLIC_MODULE}
    return types.new_class(f"Visual{base.__name__}", (mixin, base), exec_body=lambda names: names.update(body))


@dataclass(frozen=True)
class Share:
    """Which part of the sequence this rank holds: part `rank` of `size`, the ranks of `group`."""

    rank: int
    size: int
    group: Group | None

    def layout(self, seq_len: int) -> SeqLayout:
        return SeqLayout(seq_len, sp_size=self.size, sp_rank=self.rank)


WHOLE = Share(0, 1, None)


def embedding_share(embedding: Any) -> Share:
    """The share of a GPTEmbedding, by the rule of its own scatter: no cut before paddle.distributed is initialised."""
    if not embedding.sequence_parallel or not paddle.distributed.is_initialized():
        return WHOLE
    return _share_of(embedding.embedding.tp_group, "the embedding was built without one (embedding.tp_group is None)")


def layer_share(layer: Any) -> Share:
    """The share of a transformer layer."""
    if not layer.config.sequence_parallel or not paddle.distributed.is_initialized():
        return WHOLE
    return _share_of(tensor_parallel_group(), "parallel_state has none")


def tensor_parallel_group() -> Group | None:
    """The group of parallel_state, None where there is none."""
    if not paddle.distributed.is_initialized():
        return None
    group: Group | None = fleet_module("parallel_state").get_tensor_model_parallel_group(check_initialized=False)
    return group


def context_parallel_size() -> int:
    return int(fleet_module("parallel_state").get_context_parallel_world_size())


def pipeline_size(config: Any) -> int:
    """How many stages the model is cut into, by its configuration or by the groups that run."""
    configured = int(getattr(config, "pipeline_model_parallel_size", None) or 1)
    return max(configured, int(fleet_module("parallel_state").get_pipeline_model_parallel_world_size()))


def _share_of(group: Group | None, where: str) -> Share:
    if group is None:
        raise ValueError(
            f"sequence_parallel is on but there is no tensor-parallel group: {where}; initialise model parallelism "
            "(paddlefleet.parallel_state.initialize_model_parallel) before the model is built, or turn "
            "sequence_parallel off"
        )
    return Share(int(group.rank), int(group.nranks), group)
