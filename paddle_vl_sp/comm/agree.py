"""What ranks check together before they go on: an error on any of them, and whether all hold the same batch."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import paddle
import paddle.distributed as dist
from paddle import Tensor

from paddle_vl_sp.comm import collectives
from paddle_vl_sp.comm.collectives import Group


def agree(error: BaseException | None, group: Group | None) -> None:
    """Raises on every rank if any rank passes an error, so that no rank waits in a collective for one that raised.

    All ranks raise one error with the message of the first rank that failed: a ValueError if that was one, else a
    RuntimeError. Every rank must make the call: one small collective and a host sync. group=None means no group: this
    rank raises its own error, and no other rank learns of it.

    ::

        error = None if pixels.shape[0] else ValueError("this rank has no images")
        agree(error, group)  # raises on all ranks of the group, or on none
    """
    collectives.warn_of_no_group(group, "agree", "no other rank learns of an error of this one")
    agree_on([], error, group)


def agree_on(numbers: Sequence[int], error: BaseException | None, group: Group | None) -> npt.NDArray[np.int64]:
    """The numbers of every rank, int64 [nranks, len(numbers)], or an error on all ranks if any rank has one."""
    if not collectives.has_peers(group):
        if error is not None:
            raise error
        return np.asarray(numbers, dtype=np.int64)[None]
    table = exchange([error is not None, *numbers], group)
    failed = np.flatnonzero(table[:, 0])
    if failed.size:
        raise _common_error(failed, error, group) from error
    return table[:, 1:]


def exchange(numbers: Sequence[int], group: Group | None) -> npt.NDArray[np.int64]:
    """The numbers of every rank, equally many on each: int64 [nranks, len(numbers)], on the host."""
    row = np.asarray(numbers, dtype=np.int64)[None]
    if not collectives.has_peers(group):
        return row
    own = paddle.to_tensor(row, place=collectives.wire_place(group))
    table: npt.NDArray[np.int64] = collectives.all_gather(own, group).numpy()
    return table


def fingerprint(*values: object) -> int:
    """64 bits that are equal for equal values: arrays, tensors, numbers, text, or lists of them.

    Integer arrays are compared by value, whatever their dtype; other arrays differ if their dtypes do.
    """
    return int.from_bytes(hashlib.blake2b(_bytes_of(values), digest_size=8).digest(), "little", signed=True)


def _bytes_of(value: Any) -> bytes:
    """Different for different values: before each part of a list comes its length, so that no two lists are alike."""
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


def check_same(own_fingerprint: int, what: str, group: Group | None) -> None:
    """Raises on every rank if the ranks' fingerprints of `what` differ; one small collective."""
    check_equal_fingerprints(exchange([own_fingerprint], group)[:, 0], what)


def check_equal_fingerprints(
    fingerprints: npt.NDArray[np.int64], what: str, look_for: str = "a data loader that feeds these ranks differently"
) -> None:
    """Raises if the fingerprints [nranks] differ: the same error on every rank, since all hold the same ones."""
    other = np.flatnonzero(fingerprints != fingerprints[0])
    if other.size:
        raise ValueError(
            f"the ranks of one group must hold the same {what}: rank {other[0]} ({_hex(fingerprints[other[0]])}) "
            f"differs from rank 0 ({_hex(fingerprints[0])}); look for {look_for}"
        )


def check_same_parameters(
    tensors: Sequence[tuple[str, Tensor]], which: str, group: Group, error: Exception | None = None
) -> None:
    """Raises on every rank if names, shapes or dtypes differ between the ranks, or if any rank passes an error."""
    described = [(name, tuple(tensor.shape), str(tensor.dtype)) for name, tensor in tensors]
    fingerprints = agree_on([fingerprint(described)], error, group)[:, 0]
    what = f"{which} (names, shapes and dtypes)"
    check_equal_fingerprints(fingerprints, what, "a parameter that some ranks only have, or have frozen")


def _hex(number: np.int64) -> str:
    return f"fingerprint {int(number) & 0xFFFFFFFFFFFFFFFF:016x}"


def _common_error(failed: npt.NDArray[np.intp], error: BaseException | None, group: Group) -> Exception:
    """The error that every rank raises, from the first rank that failed."""
    found: list[tuple[bool, str]] = []  # of every rank: whether its error is a ValueError, and its message
    dist.all_gather_object(found, (isinstance(error, ValueError), _message_of(error)), group=group)
    is_value_error, words = found[failed[0]]
    ranks = ", ".join(map(str, failed))
    message = f"rank {ranks} of {group.nranks} failed, so all stop; rank {failed[0]} says: {words}"
    return ValueError(message) if is_value_error else RuntimeError(message)


def _message_of(error: BaseException | None) -> str:
    if error is None:
        return ""
    return str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
