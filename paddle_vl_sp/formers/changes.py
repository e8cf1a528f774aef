"""What is changed at the moment, and how each change is undone."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from paddle.nn import Layer

from paddle_vl_sp.formers import balanced_tower, shared_tower
from paddle_vl_sp.formers.known import OURS, Make
from paddle_vl_sp.log import logger


@dataclass(frozen=True)
class Replacement:
    """One method of a class, or a class under a name: what was there and what we put there."""

    owner: Any
    name: str
    original: Any
    ours: Any

    def undo(self) -> bool:
        """Puts the original back, unless other code has replaced ours since."""
        now = self.owner.__dict__.get(self.name)
        if now is not self.ours:
            theirs, name = getattr(now, "__module__", now), f"{self.owner.__name__}.{self.name}"
            logger.warning("%s is not put back: %s has replaced it since", name, theirs)
            return False
        setattr(self.owner, self.name, self.original)
        return True


@dataclass(frozen=True, eq=False)
class SharedTower:
    """One model whose tower's work is shared."""

    inner: Layer

    def undo(self) -> bool:
        balanced_tower.stop_balancing_of(self.inner)
        return True


class Change(Protocol):
    """Something that was changed."""

    def undo(self) -> bool:
        """Puts back what was there; whether it could."""


_in_place: list[Change] = []


C = TypeVar("C", bound=Change)


def keep(change: C) -> C:
    """Has `revert` undo it."""
    _in_place.append(change)
    return change


def replace(owner: Any, method: str, make: Make) -> Replacement | None:
    """Puts what `make` makes of the method in its place; None where it is ours already."""
    original = owner.__dict__[method]
    if hasattr(original, OURS):
        return None
    ours: Any = make(original)
    setattr(ours, OURS, original)
    # PretrainedModel's metaclass wraps a `forward` whose signature lacks return_dict in one that drops arguments
    ours.__signature__ = inspect.signature(original)
    setattr(owner, method, ours)
    assert owner.__dict__[method] is ours, f"{owner.__name__}.{method} was wrapped on being set"
    return keep(Replacement(owner, method, original, ours))


def swap(owner: Any, name: str, make: Callable[[type], type]) -> Replacement | None:
    """Puts a subclass of the class in its place; None where it is there already."""
    original = owner.__dict__[name]
    if any(isinstance(change, Replacement) and change.ours is original for change in _in_place):
        return None
    ours = make(original)
    if ours is original:
        return None
    setattr(owner, name, ours)
    return keep(Replacement(owner, name, original, ours))


def share(model: Layer) -> SharedTower | None:
    """Shares the work of the model's tower; None where it was shared already: then what it got since is marked too."""
    was_shared = shared_tower.is_shared(shared_tower.plain_model_of(model))
    inner = shared_tower.share_tower(model)
    return None if was_shared else keep(SharedTower(inner))


def balance(model: Layer) -> SharedTower:
    """Balances the work of the model's tower over the data-parallel ranks."""
    return keep(SharedTower(balanced_tower.balance_tower(model)))


def undo_changes(changes: Iterable[Change]) -> None:
    """In the other order of their making."""
    changes = list(changes)
    _refuse_to_leave_a_setting(changes)
    for change in reversed([change for change in _in_place if change in changes]):
        if change.undo():
            _in_place.remove(change)
    shared_tower.stop_where_not_asked_for()
    balanced_tower.stop_where_not_asked_for()


def _refuse_to_leave_a_setting(changes: list[Change]) -> None:
    """A setting that stays on needs every method that was replaced before it."""
    stays_on = next((c for c in _in_place if getattr(c, "needs_methods", False) and c not in changes), None)
    earlier = _in_place[: _in_place.index(stays_on)] if stays_on is not None else []
    if any(change in earlier for change in changes):
        raise ValueError(
            "context parallelism that was turned on later is still on, and needs what is being taken back: take that "
            "report back first, or call revert()"
        )


def revert() -> None:
    """Puts everything back that `apply_to_paddleformers` replaced: the same function objects.

    ::

        apply_to_paddleformers()
        ...
        revert()  # as if it had not been called
    """
    undo_changes(tuple(_in_place))
