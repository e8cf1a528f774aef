"""Compares the copies of a module over a group, and makes them equal again."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import paddle
from paddle import Tensor
from paddle.nn import Layer
from paddle.optimizer import Optimizer

from paddle_vl_sp.comm import collectives
from paddle_vl_sp.comm.agree import check_same_parameters
from paddle_vl_sp.comm.collectives import Group


@dataclass(frozen=True)
class Drift:
    """One parameter whose copies differ, and how far each rank's is from that of the group's first rank."""

    name: str
    largest: tuple[float, ...]  # [nranks] the largest absolute difference of each rank's copy
    relative: float  # the largest of these over the largest finite absolute value of the first rank's copy

    def __str__(self) -> str:
        each = ", ".join(f"{difference:.3g}" for difference in self.largest)
        return f"{self.name}: differs from rank 0's copy by [{each}], at worst {self.relative:.2%} of its largest value"


def check_replicas(module: Layer, group: Group | None) -> list[Drift]:
    """The replicated parameters whose copies differ over the group, the same list on every rank; empty if none does.

    Every rank of the group must make the call; None means no group, and nothing is compared. A parameter that is
    tensor-parallel (`is_distributed`) is not a replica and is left out. A NaN equals only a NaN in the same place.

    ::

        for drift in check_replicas(model.visual, group):
            print(drift)  # the parameter, and how far each rank's copy is from the first rank's
    """
    collectives.warn_of_no_group(group, "check_replicas", "nothing was compared")
    if not collectives.has_peers(group):
        return []
    replicas = list(_replicated(module))
    check_same_parameters(replicas, "parameters", group)
    if not replicas:
        return []
    rows = paddle.stack([_distance(parameter, group) for _, parameter in replicas])  # [P, 2]
    table = collectives.all_gather(rows[None], group).numpy()  # [nranks, P, 2]
    found = []
    for i, (name, _) in enumerate(replicas):
        largest, scale = table[:, i, 0], table[0, i, 1]
        if largest.any():
            found.append(Drift(name, tuple(largest.tolist()), float(largest.max() / scale) if scale else float("inf")))
    return found


def sync_replicas(module: Layer, group: Group | None, optimizer: Optimizer | None = None) -> None:
    """Overwrites the replicated parameters of every rank with those of the group's first rank, bit for bit.

    Every rank of the group must make the call; None means no group, and nothing is changed. Once the optimizer has
    made a step, pass it too: copies with different moments drift apart again, and master weights would overwrite the
    parameters at the next step.

    ::

        sync_replicas(model.visual, group, optimizer)
    """
    collectives.warn_of_no_group(group, "sync_replicas", "nothing was made equal")
    if not collectives.has_peers(group):
        return
    replicas = list(_replicated(module))
    states = list(_optimizer_states(optimizer, {parameter.name: name for name, parameter in replicas}))
    check_same_parameters(replicas + states, "parameters", group)
    with paddle.no_grad():
        for _, tensor in replicas + states:
            paddle.assign(collectives.broadcast(_own_copy(tensor, group), 0, group).to(tensor.place), output=tensor)


def _replicated(module: Layer) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in module.named_parameters():
        if not getattr(parameter, "is_distributed", False):
            yield name, parameter


def _optimizer_states(optimizer: Optimizer | None, names: dict[str, str]) -> Iterator[tuple[str, Tensor]]:
    """Moments and master weights of the named parameters, in an order that is the same on every rank."""
    optimizer = getattr(optimizer, "_inner_opt", optimizer)  # fleet's hybrid-parallel optimizer wraps the user's
    if optimizer is None:
        return
    kinds = dict(optimizer._accumulators) | {"master_weight": optimizer._master_weights}
    for kind in sorted(kinds):
        for own_name, name in names.items():
            if own_name in kinds[kind]:
                yield f"{name} ({kind})", kinds[kind][own_name]


def _distance(parameter: Tensor, group: Group) -> Tensor:
    """[2]: the largest difference from the first rank's copy, and that copy's largest finite value; float64."""
    parameter = parameter.detach()
    own = parameter.astype("float64") if parameter.size else paddle.zeros([1], dtype="float64")
    first = collectives.broadcast(_own_copy(parameter, group), 0, group).astype("float64")
    first = first.to(own.place) if parameter.size else own
    zeros = paddle.zeros_like(own)
    is_same = (own == first) | (own.isnan() & first.isnan())  # not by own - first: inf - inf is a NaN
    difference = paddle.where(is_same, zeros, (own - first).abs())
    difference = paddle.where(difference.isnan(), paddle.full_like(difference, float("inf")), difference)
    finite = paddle.where(first.isfinite(), first.abs(), zeros)
    distance: Tensor = paddle.stack([difference.max(), finite.max()])
    return distance.to(collectives.wire_place(group))


def _own_copy(tensor: Tensor, group: Group) -> Tensor:
    copied: Tensor = tensor.detach().to(collectives.wire_place(group)).clone()
    return copied
