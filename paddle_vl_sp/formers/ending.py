"""The end of a training whose ranks meet in every forward: each says that it comes no more."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

from paddle_vl_sp.formers.balanced_tower import is_any_balanced
from paddle_vl_sp.formers.changes import Change, keep
from paddle_vl_sp.formers.groups import data_group
from paddle_vl_sp.vision.balanced import stop_balancing


@dataclass(frozen=True, eq=False)
class AddedCallback:
    """A callback that every trainer has which is built from now on."""

    callbacks: list[Any]
    callback: Any

    def undo(self) -> bool:
        if self.callback in self.callbacks:
            self.callbacks.remove(self.callback)
        return True


def stop_together() -> list[Change]:
    """Has PaddleFormers' trainers say it: a rank with fewer batches is named, where others would wait for it."""
    callbacks = importlib.import_module("paddleformers.trainer.trainer").DEFAULT_CALLBACKS
    base = importlib.import_module("paddleformers.trainer").TrainerCallback
    if any(getattr(each, "__module__", "") == __name__ for each in callbacks):
        return []

    class StopsTogether(base):  # type: ignore[misc, valid-type]
        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if is_any_balanced():
                stop_balancing(data_group())

    callbacks.append(StopsTogether)
    return [keep(AddedCallback(callbacks, StopsTogether))]
