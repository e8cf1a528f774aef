"""A model as its own forward sees it, but that its language model gets other arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
Change = Callable[[tuple[Any, ...], dict[str, Any]], Arguments]


class ModelView:
    """Takes the place of `self` in a forward of PaddleFormers, which calls `self.language_model(...)`.

    The arguments of that call are changed on the way, so that whatever is between the model and its text model, a
    wrapper or a recompute, sees and replays the arguments that it would see upstream. All else is the model's own.
    Nothing is put on the model, so threads do not interfere.
    """

    def __init__(self, model: Any, change: Change) -> None:
        self.__dict__.update(_model=model, _change=change)

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return type(self._model)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._model, name)
        return _ChangedCall(value, self._change) if name == "language_model" else value

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._model, name, value)


class _ChangedCall:
    def __init__(self, called: Any, change: Change) -> None:
        self._called, self._change = called, change

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = self._change(args, kwargs)
        return self._called(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._called, name)
