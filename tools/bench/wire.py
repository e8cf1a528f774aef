"""Counts the bytes that a rank sends: messages, and collectives by what their usual algorithms send."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

from paddle import Tensor

from paddle_vl_sp.comm import collectives, exchange


class Counted(AbstractContextManager["Counted"]):
    """The bytes sent by this rank while it is open.

    A gather sends a rank's part to each other rank, and a broadcast its owner's; a sum for one rank is sent by each of
    the others. A sum over all ranks is a scatter of sums and a gather, of which
    gloo lacks the first: where only a rank's own part is kept, a backend with reduce-scatter sends half as much.
    """

    sent = 0.0

    def __enter__(self) -> Counted:
        self._patches = [
            mock.patch.object(exchange, "Messages", self._messages(exchange.Messages)),
            mock.patch.object(collectives, "all_gather", self._collective(collectives.all_gather, lambda n: n - 1.0)),
            mock.patch.object(
                collectives, "all_reduce_sum", self._collective(collectives.all_reduce_sum, lambda n: 2 * (n - 1) / n)
            ),
            mock.patch.object(collectives, "broadcast", self._from_owner(collectives.broadcast)),
            mock.patch.object(collectives, "reduce_sum", self._to_owner(collectives.reduce_sum)),
        ]
        for patch in self._patches:
            patch.start()
        return self

    def __exit__(self, *_: object) -> None:
        for patch in self._patches:
            patch.stop()

    def _messages(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def counting(sends: Any, expects: Any, group: Any) -> Any:
            self.sent += sum(x.size * x.element_size() for _, x in sends)
            return original(sends, expects, group)

        return counting

    def _collective(self, original: Callable[..., Tensor], times: Callable[[int], float]) -> Callable[..., Tensor]:
        def counting(x: Tensor, group: Any) -> Tensor:
            self.sent += times(group.nranks) * x.size * x.element_size()
            return original(x, group)

        return counting

    def _from_owner(self, original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def counting(x: Tensor, owner: int, group: Any) -> Tensor:
            self.sent += (group.nranks - 1) * x.size * x.element_size() if group.rank == owner else 0
            return original(x, owner, group)

        return counting

    def _to_owner(self, original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def counting(x: Tensor, owner: int, group: Any) -> Tensor:
            self.sent += 0 if group.rank == owner else x.size * x.element_size()
            return original(x, owner, group)

        return counting
