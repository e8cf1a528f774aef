"""What ranks must know of each other before they may go on: errors, and whether they hold the same batch."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import paddle
import paddle.distributed as dist

from paddle_vl_sp.comm import collectives


def agree(error: BaseException | None, group: Any) -> None:
    """Raises on every rank if any rank passes an error, so that nobody waits for a rank that will not come.

    All ranks raise one error with the words of the first rank that failed: a ValueError where that was one, else a
    RuntimeError. Every rank must make the call; it is one small collective, and waits for it. A group of None means
    nobody: this rank raises its own error, and the others do not hear of it.
    """
    collectives.warn_of_no_group(group, "agree", "no other rank hears of an error of this one")
    agree_on([], error, group)


def agree_on(numbers: Sequence[int], error: BaseException | None, group: Any) -> npt.NDArray[np.int64]:
    """The numbers of every rank, [nranks, len(numbers)], unless a rank has an error: then every rank raises it."""
    if not collectives.has_peers(group):
        if error is not None:
            raise error
        return np.asarray(numbers, dtype=np.int64)[None]
    table = exchange([error is not None, *numbers], group)
    failed = np.flatnonzero(table[:, 0])
    if failed.size:
        raise _common_error(failed, error, group) from error
    return table[:, 1:]


def exchange(numbers: Sequence[int], group: Any) -> npt.NDArray[np.int64]:
    """Equally many numbers of every rank: int64 [nranks, len(numbers)], on the host."""
    row = np.asarray(numbers, dtype=np.int64)[None]
    if not collectives.has_peers(group):
        return row
    mine = paddle.to_tensor(row, place=collectives.wire_place(group))
    table: npt.NDArray[np.int64] = collectives.all_gather(mine, group).numpy()
    return table


def fingerprint(*values: Any) -> int:
    """64 bits that tell whether two ranks hold the same: arrays, tensors, numbers, text, or lists of them.

    Ids of any integer type are the same ids; other arrays differ if their dtypes do.
    """
    return int.from_bytes(hashlib.blake2b(_bytes_of(values), digest_size=8).digest(), "little", signed=True)


def _bytes_of(value: Any) -> bytes:
    """Different for different values: a list's parts tell their lengths, so that they do not run into each other."""
    if isinstance(value, (list, tuple)):
        parts = [_bytes_of(part) for part in value]
        return b"list" + b"".join(len(part).to_bytes(8, "little") + part for part in parts)
    if not hasattr(value, "shape"):
        return repr(value).encode()
    if isinstance(value, np.generic):
        return repr(value.item()).encode()
    array = np.asarray(value.numpy() if hasattr(value, "numpy") else value)
    if array.dtype.kind in "biu":
        array = array.astype(np.int64)
    return f"{array.dtype.str}{array.shape}".encode() + array.tobytes()


def check_same(mark: int, what: str, group: Any) -> None:
    """Raises on every rank if the ranks' fingerprints of `what` differ; one small collective."""
    check_equal_marks(exchange([mark], group)[:, 0], what)


def check_equal_marks(marks: npt.NDArray[np.int64], what: str) -> None:
    """marks [nranks] must be one number; every rank that sees the same marks raises the same error."""
    other = np.flatnonzero(marks != marks[0])
    if other.size:
        raise ValueError(
            f"the ranks of one group must hold the same {what}: rank {other[0]} ({_hex(marks[other[0]])}) differs "
            f"from rank 0 ({_hex(marks[0])}); look for a data loader that feeds these ranks differently"
        )


def _hex(mark: np.int64) -> str:
    return f"fingerprint {int(mark) & 0xFFFFFFFFFFFFFFFF:016x}"


def _common_error(failed: npt.NDArray[np.intp], error: BaseException | None, group: Any) -> Exception:
    told: list[tuple[bool, str]] = []
    mine = isinstance(error, ValueError), "" if error is None else _words(error)
    dist.all_gather_object(told, mine, group=group)
    is_value_error, words = told[failed[0]]
    ranks = ", ".join(map(str, failed))
    message = f"rank {ranks} of {group.nranks} failed, so all stop; rank {failed[0]} says: {words}"
    return ValueError(message) if is_value_error else RuntimeError(message)


def _words(error: BaseException) -> str:
    return str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
