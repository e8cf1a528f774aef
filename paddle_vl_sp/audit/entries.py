"""The parameters of an audit with their gradients, and what the ranks' gradients say before any step is made."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import paddle
from paddle import Tensor
from paddle.nn import Layer

from paddle_vl_sp.audit.state import gradient_of
from paddle_vl_sp.comm import collectives
from paddle_vl_sp.comm.agree import agree_on, check_equal_fingerprints, fingerprint
from paddle_vl_sp.comm.collectives import Group
from paddle_vl_sp.comm.grads import is_cut

EQUAL, UNEQUAL, MARKED, SHARDED, ABSENT = "equal", "unequal", "marked", "sharded", "absent"
Named = list[tuple[str, Tensor]]
Floats = npt.NDArray[np.float64]
CANCELLED = 0.1  # of the largest of the ranks' gradients: a sum below it has no direction of its own


@dataclass(frozen=True)
class Entry:
    """One parameter. kind says what its gradients look like, and so what is expected of `expected`:

    equal     copies whose gradients are alike on all ranks; `expected` is their mean
    unequal   copies whose gradients differ; `expected` is their sum
    marked    copies whose gradients are summed later; `expected` is their sum
    sharded   each rank has a part of the parameter; `expected` is this rank's gradient
    absent    no rank has a gradient
    """

    name: str
    tensor: Tensor
    kind: str
    own: Tensor  # float32, this rank's gradient
    expected: Tensor  # float32, the same on every rank unless sharded
    way: Tensor  # the direction to step along: expected, or where the ranks' gradients cancel, one of them
    size: float  # norm of the way, over all shards
    shares: tuple[float, ...]  # [nranks] each rank's part of `way`; of shards, whether there is any
    spread: float  # the largest distance of a rank's gradient from the mean, over the mean's norm; of copies
    weight: float  # norm of the parameter, over all shards
    is_strided: bool

    @property
    def count(self) -> int:
        return int(self.tensor.size)


def trainable(parameters: Layer | Iterable[tuple[str, Tensor]]) -> Named:
    """The pairs that need a gradient, each tensor once."""
    pairs = parameters.named_parameters() if isinstance(parameters, Layer) else parameters
    once: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in pairs:
        if not tensor.stop_gradient:
            once.setdefault(id(tensor), (name, tensor))
    return list(once.values())


def check_same_names(named: Named, group: Group | None) -> None:
    """Raises on every rank unless all of them bring the same names."""
    error = None if named else ValueError("no parameter to audit: none of those given needs a gradient")
    table = agree_on([fingerprint([name for name, _ in named])], error, group)
    check_equal_fingerprints(table[:, 0], "names of parameters")


def gather_numbers(numbers: Iterable[float], group: Group | None) -> Floats:
    """The numbers of every rank, equally many on each: float64 [nranks, len(numbers)], on the host."""
    row = np.asarray(list(numbers), dtype=np.float64)[None]
    if not collectives.has_peers(group):
        return row
    own = paddle.to_tensor(row, place=collectives.wire_place(group))
    table: Floats = collectives.all_gather(own, group).numpy()
    return table


def shards_among(
    named: Named, group: Group | None, sharded: Collection[str] | Callable[[str, Tensor], bool] | None
) -> set[str]:
    """The names of the parameters of which each rank holds a part; raises on every rank if copies differ.

    Not told, they are the tensor-parallel ones (`is_distributed`), unless all of those are equal over this group, as
    in a data-parallel one.
    """
    table = gather_numbers((number for _, tensor in named for number in _checksums(tensor)), group)
    differ = (table != table[0]).reshape(len(table), -1, 3).any(axis=(0, 2))  # [P]
    if sharded is None:
        cut = [is_cut(tensor) for _, tensor in named]
        is_group_cut = bool((differ & cut).any())
        chosen = {name for (name, _), each in zip(named, cut, strict=True) if each and is_group_cut}
    elif callable(sharded):
        chosen = {name for name, tensor in named if sharded(name, tensor)}
    else:
        chosen = set(sharded)
    apart = [name for (name, _), other in zip(named, differ, strict=True) if other and name not in chosen]
    if apart:
        raise ValueError(
            f"{len(apart)} of {len(named)} parameters differ between the ranks, {apart[0]} first: an audit needs equal "
            "copies; name parameters of which each rank holds a part in sharded=, or call sync_replicas first"
        )
    return chosen


def _checksums(tensor: Tensor) -> tuple[float, float, float]:
    """Size, sum and sum of squares: equal for equal copies."""
    if not tensor.size:
        return 0.0, 0.0, 0.0
    wide = tensor.detach().astype("float32")
    return float(tensor.size), float(wide.sum()), float(wide.square().sum())


def entries_of(named: Named, shards: set[str], marked: set[str], tolerance: float, group: Group | None) -> list[Entry]:
    """Every parameter with its gradient; the numbers travel in one collective, the sums in one for each copy."""
    drawn = [_expected(tensor, name in shards, group) for name, tensor in named]
    rows = []
    for (_, tensor), (own, total) in zip(named, drawn, strict=True):
        rows += _numbers_of(tensor, own, total, group)
    nranks = 1 if group is None else group.nranks
    table = gather_numbers(rows, group).reshape(nranks, len(named), 6)
    made = []
    for i, ((name, tensor), (own, total)) in enumerate(zip(named, drawn, strict=True)):
        make = _shard if name in shards else _copy
        kind, expected, size, shares = make(own, total, table[:, i], name in marked, tolerance)
        way = expected
        if kind == UNEQUAL and size < CANCELLED * table[:, i, 1].max() ** 0.5:
            way, size, shares = _one_of(own, table[:, i, 1], group)
        weight = float((table[:, i, 5].sum() if name in shards else table[0, i, 5]) ** 0.5)
        spread = 0.0 if name in shards else _spread(table[:, i])
        made.append(Entry(name, tensor, kind, own, expected, way, size, shares, spread, weight, _is_strided(tensor)))
    return made


def _expected(tensor: Tensor, is_shard: bool, group: Group | None) -> tuple[Tensor, Tensor]:
    """This rank's gradient and the sum over the group, float32; of a shard, its own twice."""
    gradient = gradient_of(tensor)
    own = paddle.zeros(tensor.shape, "float32") if gradient is None else gradient.detach().astype("float32")
    own = own.clone().contiguous()
    if is_shard or not collectives.has_peers(group):
        return own, own
    return own, collectives.all_reduce_sum(own.to(collectives.wire_place(group)).clone(), group).to(own.place)


def _numbers_of(tensor: Tensor, own: Tensor, total: Tensor, group: Group | None) -> list[float]:
    """is there a gradient, |own|^2, <own, total>, |own - mean|^2, |total|^2, |parameter|^2"""
    if not tensor.size:
        return [0.0] * 6
    mean = total / (1 if group is None else group.nranks)
    parts = (own * own, own * total, (own - mean).square(), total * total, tensor.detach().astype("float32").square())
    return [float(gradient_of(tensor) is not None), *(float(part.sum()) for part in parts)]


def _shard(
    own: Tensor, _total: Tensor, table: Floats, _is_marked: bool, _close: float
) -> tuple[str, Tensor, float, tuple[float, ...]]:
    size = float(table[:, 1].sum() ** 0.5)
    return SHARDED if size else ABSENT, own, size, tuple((table[:, 1] > 0).astype(float).tolist())


def _copy(
    _own: Tensor, total: Tensor, table: Floats, is_marked: bool, close: float
) -> tuple[str, Tensor, float, tuple[float, ...]]:
    """Kind, what is expected of the gradients, its norm, and the ranks' parts of it."""
    nranks, size = len(table), float(table[0, 4] ** 0.5)
    if not table[:, 1].any():
        return ABSENT, total, 0.0, (0.0,) * nranks
    is_equal = _spread(table) <= close and not is_marked
    shares = table[:, 2] / size**2 if size else np.zeros(nranks)
    if is_equal:
        return EQUAL, total / nranks, size / nranks, tuple((nranks * shares).tolist())
    return MARKED if is_marked else UNEQUAL, total, size, tuple(shares.tolist())


def _spread(table: Floats) -> float:
    apart, mean = float(table[:, 3].max() ** 0.5), float(table[0, 4] ** 0.5) / len(table)
    return apart / mean if mean else float("inf") if apart else 0.0


def _one_of(own: Tensor, squares: Floats, group: Group | None) -> tuple[Tensor, float, tuple[float, ...]]:
    """The largest of the ranks' gradients, its norm, and the ranks' parts of it."""
    owner = int(squares.argmax())
    wire = collectives.wire_place(group) if collectives.has_peers(group) else own.place
    way = own.to(wire).clone()
    if collectives.has_peers(group):
        way = collectives.broadcast(way, owner, group)
    way = way.to(own.place)
    size = float(squares.max() ** 0.5)
    dots = gather_numbers([float((own * way).sum())], group)[:, 0]
    return way, size, tuple((dots / size**2).tolist())


def _is_strided(tensor: Tensor) -> bool:
    gradient = gradient_of(tensor)
    return gradient is not None and not gradient.is_contiguous()
