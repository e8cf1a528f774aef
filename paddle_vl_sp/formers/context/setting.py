"""Whether context parallelism is on, and with what; for all models, as the replaced methods are."""

from __future__ import annotations

from typing import Any

import paddle
import paddle.distributed as dist

from paddle_vl_sp.attention import ContextParallel
from paddle_vl_sp.attention.chosen import ChosenAttention
from paddle_vl_sp.formers.groups import sep_size, topology
from paddle_vl_sp.log import logger
from paddle_vl_sp.settings import CONTEXT_PARALLEL

_on: list[ContextParallel] = []  # the last one counts
_said: set[tuple[str, int]] = set()


def as_setting(given: str | ContextParallel) -> ContextParallel:
    """A word, or the value itself."""
    if not isinstance(given, (str, ContextParallel)):
        raise ValueError(
            f"context_parallel must be a word or a ContextParallel, got {given!r}: 'auto' is for fleet's sep axis"
        )
    return ContextParallel(given) if isinstance(given, str) else given


def turn_on(setting: ContextParallel) -> None:
    _on.append(setting)


def turn_off(setting: ContextParallel) -> None:
    _on.remove(setting)


def is_on() -> bool:
    return bool(_on)


def context_parallel() -> ContextParallel | None:
    """The setting, where there are several ranks to share a sequence; groups are looked up at the first forward."""
    if not _on or (_on[-1].group is None and _on[-1].groups is None and _is_one_process()):
        return None
    return _on[-1] if _on[-1].ranks().nranks > 1 else None


def refuse_uncut_training(model: Any) -> None:
    """For a model that is about to train on an uncut sequence, whose ranks' gradients would be summed all the same."""
    if not (model.training and paddle.is_grad_enabled()):
        return
    if context_parallel() is not None:
        raise ValueError(
            f"context parallelism is on, and {type(model).__name__} trains on a batch that is not cut: call the whole "
            "model, whose forward cuts it, without a cache"
        )
    if sep_size() > 1 and not _on:
        raise ValueError(
            f"sep_parallel_size={sep_size()} with {type(model).__name__}: PaddleFormers has no attention that crosses "
            f"the ranks of this axis, so each would train on its own part alone; set {CONTEXT_PARALLEL}=auto, pass "
            "context_parallel='auto', or leave sep_parallel_size out"
        )


def refuse_what_has_no_cut(model: Any) -> None:
    """For a family without context parallelism, whose ranks would all train on the whole batch, or on any parts."""
    if (sep_size() > 1 or context_parallel() is not None) and model.training:
        raise ValueError(
            f"{type(model).__name__} has no context parallelism: leave sep_parallel_size and {CONTEXT_PARALLEL} out"
        )


def _is_one_process() -> bool:
    return topology() is None and dist.get_world_size() == 1


def say_once(chosen: ChosenAttention) -> None:
    """Each kind with the reason of the first batch that it was chosen for: the figures are of the length."""
    which = chosen.kind, chosen.group.nranks
    if which not in _said:
        _said.add(which)
        logger.info("context parallelism, %s", chosen)
