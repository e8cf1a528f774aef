"""audit_gradients: from a loss and its parameters to the table."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Any

from paddle import Tensor
from paddle.nn import Layer

from paddle_vl_sp.audit.alone import Outcome
from paddle_vl_sp.audit.causes import cause_of
from paddle_vl_sp.audit.entries import (
    MARKED,
    SHARDED,
    UNEQUAL,
    Entry,
    check_same_names,
    entries_of,
    shards_among,
    trainable,
)
from paddle_vl_sp.audit.judge import MIXED, NONE, PARTIAL, TOO_SMALL, WHOLE
from paddle_vl_sp.audit.probe import Probe
from paddle_vl_sp.audit.progress import counting
from paddle_vl_sp.audit.result import Finding, GradientAudit
from paddle_vl_sp.audit.search import Search
from paddle_vl_sp.audit.state import kept
from paddle_vl_sp.comm import collectives
from paddle_vl_sp.comm.collectives import Group

SUMMED_LATER = "summed by Paddle's sequence-parallel hook or the trainer"
SUMMED_AGAIN = "after the later sum that its mark asks for"


def audit_gradients(
    loss: Callable[[], Tensor],
    parameters: Layer | Iterable[tuple[str, Tensor]],
    group: Group | None,
    *,
    directions: int = 2,
    tolerance: float = 0.05,
    sharded: Collection[str] | Callable[[str, Tensor], bool] | None = None,
    after: Callable[[], object] | None = None,
    combine: str = "equal",
    has_backward: bool = False,
    buffers: Iterable[Tensor] = (),
    progress: bool | None = None,
) -> GradientAudit:
    """Is the gradient of every parameter whole on every rank? Compared with differences of the loss itself.

    loss        the loss of one fixed batch, one number; every rank of the group calls it equally often
    parameters  (name, tensor) pairs, or a Layer, whose buffers are put back as well; frozen ones are left out
    group       the ranks that hold copies of the parameters, or shards; None means no group, one process
    directions  random directions besides the gradient's own; each is two forwards a block
    tolerance   relative; a smaller error of one parameter is not found
    sharded     names, or (name, tensor) -> bool, of the parameters of which each rank holds a part; not given,
                those that are tensor-parallel (`is_distributed`), unless they are equal over this group
    after       what the trainer does to gradients before the optimizer, such as a reduction: the gradients are judged
                as it leaves them, and marks for a later sum no longer count
    combine     how the ranks' losses make the one that is trained: "equal" (they are it), "mean" or "sum"
    has_backward  loss() makes the gradients itself, as a pipeline's training step does; every call then does
    buffers     tensors besides the parameters that a forward changes
    progress    None: a bar on a terminal, if rich is installed

    Every rank of the group must make the call, and gets the same verdicts. Parameters, buffers, gradients and random
    states are as before afterwards, also after an error. Needs memory for the parameters and, in float32, three times
    their gradients.

    ::

        audit = audit_gradients(lambda: model(**batch).loss, model, group)  # on every rank, the same batch
        print(audit)  # the table; audit.ok, audit.verdicts["visual.merger.weight"]
    """
    collectives.warn_of_no_group(group, "audit_gradients", "the gradients of one process are audited")
    _check_numbers(directions, tolerance)
    named = trainable(parameters)
    check_same_names(named, group)
    if isinstance(parameters, Layer):
        # Paddle's BatchNorm keeps its statistics as parameters without gradient
        buffers = [*(each for each in parameters.parameters() if each.stop_gradient), *parameters.buffers(), *buffers]
    is_first_rank = group is None or group.rank == 0
    with kept([tensor for _, tensor in named], buffers) as before, counting(progress, is_first_rank) as tick:
        probe = Probe(loss, group, before, combine, has_backward, tick)
        shards = shards_among(named, group, sharded)
        probe.backward(after)
        marked = set() if after is not None else _marked(named, group)
        entries = entries_of(named, shards, marked - shards, tolerance, group)
        probe.measure_noise(entries)
        search = Search(probe, directions, tolerance, combine)
        search.run(entries)
    findings = tuple(_finding(entry, search.found[entry.name], group, after is not None) for entry in entries)
    return GradientAudit(findings, _in_words(group), probe.num_forwards, probe.noise, probe.base)


def _check_numbers(directions: int, tolerance: float) -> None:
    """The same on every rank, as all arguments but the tensors are, so no agreement is needed."""
    if directions < 0:
        raise ValueError(f"directions must be 0 or more, got {directions}")
    if not 0 < tolerance < 0.5:
        raise ValueError(f"tolerance must be between 0 and 0.5, got {tolerance}")


def _marked(named: list[tuple[str, Tensor]], group: Group | None) -> set[str]:
    """Those that Paddle's sequence-parallel hooks or the trainer sum, if that is over this group."""
    topology = _topology()
    if not collectives.has_peers(group):
        return set()
    if topology is not None and list(topology.get_model_parallel_group().ranks) != list(group.ranks):
        return set()
    return {name for name, tensor in named if getattr(tensor, "sequence_parallel", False)}


def _topology() -> Any:
    from paddle.distributed import fleet

    try:
        return fleet.get_hybrid_communicate_group()
    except (AssertionError, AttributeError):  # how Paddle says that there is none
        return None


def _finding(entry: Entry, outcome: Outcome, group: Group | None, is_final: bool) -> Finding:
    verdict, is_marked = outcome.judgement.verdict, entry.kind == MARKED
    is_right = verdict in (WHOLE, TOO_SMALL) or (verdict == PARTIAL and is_marked)
    if verdict == NONE:
        is_right = not outcome.is_needed
    is_strided = entry.is_strided and is_final
    cause = "" if is_right else cause_of(entry.name, verdict, is_strided, entry.kind == UNEQUAL)
    return Finding(entry.name, verdict, outcome.shares, is_right, _note(entry, outcome, group), cause, outcome.bundle)


def _note(entry: Entry, outcome: Outcome, group: Group | None) -> str:
    judgement, parts = outcome.judgement, []
    if entry.kind == MARKED and judgement.verdict != TOO_SMALL:
        parts.append(SUMMED_AGAIN if judgement.of_sum else SUMMED_LATER)
    elif judgement.completed_by:
        parts.append(f"the {judgement.completed_by} over {_in_words(group)} completes it")
    elif judgement.of_sum:
        parts.append(f"of the ranks' sum over {_in_words(group)}")
    elif judgement.verdict == MIXED and entry.kind == UNEQUAL:
        parts.append(f"the ranks' gradients differ by {entry.spread:.0%} of their mean")
    elif judgement.verdict == MIXED and outcome.off:
        parts.append(f"off by {outcome.off:.0%} or more")
    if outcome.is_needed:
        parts.append("no rank has a gradient, but the loss depends on it: detached?")
    if entry.kind == SHARDED and judgement.verdict != WHOLE:
        parts.append("each rank's own shard")
    if outcome.bundle > 1:
        others = f"judged together with {outcome.bundle - 1} others"
        is_mixed = judgement.verdict == MIXED
        parts.append(f"{others}: one of them at least" if is_mixed else f"{others}, to {outcome.within:.0%} of its own")
    return ", ".join(part for part in parts if part)


def _in_words(group: Group | None) -> str:
    return "one process" if group is None else f"ranks {', '.join(map(str, group.ranks))}"
