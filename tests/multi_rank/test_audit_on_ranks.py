"""audit_gradients on real ranks: right wirings of four models, and faults planted in them, each with its verdict.

What a fault's verdicts must be is written next to it, in audit_models and audit_formers.
"""

import functools
from functools import partial

import numpy as np
import paddle
import paddle.distributed as dist
import pytest
from paddle.nn import functional as F  # noqa: N812

import audit_models as models
from paddle_vl_sp import audit_gradients
from paddle_vl_sp.comm.agree import check_same, fingerprint
from paddle_vl_sp.testing.tensor_parallel import enable_tensor_parallel_on_cpu, init_tensor_parallel
from rank_cases import hold, pairs, same_error_everywhere


@functools.cache
def group():
    enable_tensor_parallel_on_cpu()
    return init_tensor_parallel(dist.get_world_size())


def audited(loss, named, after=None, **options):
    """The audit; its verdicts are the same on every rank, and parameters are what they were, bit for bit."""
    before = [tensor.numpy() for _, tensor in named]
    audit = audit_gradients(loss, named, group(), after=after, **options)
    assert all(np.array_equal(tensor.numpy(), value) for (_, tensor), value in zip(named, before, strict=True))
    check_same(fingerprint(str(audit)), "audit", group())
    return audit


def mlp_case(fault):
    loss, named, after = models.tensor_parallel_mlp(fault)
    audit = audited(loss, named, after)
    assert audit.verdicts == models.expected(named, models.MLP_FAULTS.get(fault, {}), group().nranks)
    assert audit.ok == (not fault)
    assert fault or audit.num_forwards <= 12


def decoder_case(attention, fault):
    audit = audited(*models.small_decoder(attention, fault))
    if not fault:
        unused = {name for name in audit.verdicts if "gates" in name or "conv" in name}
        assert all((verdict == "none") == (name in unused) for name, verdict in audit.verdicts.items())
        assert audit.ok
    says(audit, models.DECODER_FAULTS.get(fault, {}))


def formers_case(family, fault):
    """Some parameters of each part; right ones may not be named."""
    import audit_formers

    with audit_formers.formers_model(family, fault, group()) as (loss, model):
        named = [pair for pair in model.named_parameters() if is_looked_at(pair[0])]
        audit = audited(loss, named)
    says(audit, audit_formers.FAULTS[family][fault] if fault else audit_formers.RIGHT)
    assert audit.ok == (not fault)
    language = [finding.name for finding in audit.wrong if "language_model" in finding.name]
    assert bool(language) == (fault == "unmarked norms" or fault.startswith("upstream")), language
    assert ("apply_to_qwen3_vl()" in str(audit)) == (fault == "upstream")
    assert ("q_norm/k_norm under TP" in str(audit)) == bool(language)


LOOKED_AT = ("merger", "layers.0.", "blocks.0.attn.proj", "lm_head")
FEWER = ("linear_fc2", "layers.0.self_attn", "layers.0.input_layernorm", "layers.0.mlp.down", "blocks.0.attn.proj")


def is_looked_at(name):
    parts = LOOKED_AT if group().nranks == 2 else FEWER
    return any(part in name for part in parts) and "bias" not in name


def says(audit, faults):
    wanted = {name: verdict.replace("times n", f"times {group().nranks}") for name, verdict in faults.items()}
    assert {name: audit.verdicts[name] for name in wanted} == wanted, audit


def data_parallel(reduced_by=None):
    return audited(*models.data_parallel(reduced_by), combine="mean")


def unreduced_data_parallel():
    """Completed by the mean, and wrong as it is."""
    audit = data_parallel()
    assert audit.verdicts == {"weight": "partial", "bias": "partial"}
    assert f"the mean over ranks {', '.join(map(str, group().ranks))} completes it" in str(audit)
    assert not audit.ok


def reduced_data_parallel():
    assert data_parallel(models.contiguous_mean).ok


def strided_all_reduce():
    """Paddle 3.3.1's fused all-reduce permutes a gradient with strides."""
    audit = data_parallel(models.fused_mean)
    assert audit.verdicts == {"weight": "mixed", "bias": "whole"}
    assert "strided gradient in fused_allreduce_gradients" in str(audit)


def text_in_parts(fault):
    """By the loss of the whole sequence: upstream's parts make every gradient mixed, which no known cause does."""
    import audit_formers

    loss, named, after = audit_formers.text_in_parts(fault, group())
    named = [pair for pair in named if is_looked_at(pair[0])]
    audit = audited(loss, named, after)
    assert set(audit.verdicts.values()) <= {"mixed" if fault else "whole", "too small to judge"}, audit
    says(audit, audit_formers.TEXT_FAULTS.get(fault, {}))
    assert audit.ok == (not fault)
    assert "q_norm/k_norm under TP" not in str(audit)  # which makes the copies differ


def losses_of_parts():
    """By its own losses upstream's run has no loss of the batch to compare with, which is said on every rank."""
    import audit_formers

    loss, named = audit_formers.text_by_itself(group())
    same_error_everywhere(lambda: audit_gradients(loss, named, group()), group(), "same number", "combine=")


def copies_that_differ():
    """Known to be wrong where no step shows it: across the gradient, or where the ranks' gradients cancel."""
    loss, named, _ = models.tensor_parallel_mlp()
    tensors, sign = dict(named), 1.0 - 2.0 * (dist.get_rank() == 1)

    def after():
        norm, head = tensors["1.norm"].grad, tensors["head"].grad
        across = paddle.flip(head, [1])
        across = across - head * ((across * head).sum() / head.square().sum())
        head.set_value(head + 0.3 * sign * across)
        norm.set_value(sign * norm)

    audit = audited(loss, named, after, directions=0)
    assert {finding.name: finding.verdict for finding in audit.wrong} == {"1.norm": "mixed", "head": "mixed"}
    assert "the ranks' gradients differ by" in str(audit)


def tensor_parallel_dropout():
    """The generators of fleet's tracker draw the same in every forward, and go on as if nothing had been."""
    from paddle.distributed.fleet.meta_parallel import get_rng_state_tracker

    tracker = get_rng_state_tracker()
    if "audited" not in tracker.states_:
        tracker.add("audited", 100 + dist.get_rank())
    rng, states = np.random.default_rng(2), tracker.get_states_tracker()
    weight = models.leaf(rng, 8, 6)
    x = paddle.to_tensor(rng.standard_normal((10, 8)).astype("float32"))

    def loss():
        with tracker.rng_state("audited"):
            hidden = F.dropout(paddle.matmul(x, weight), 0.4)
        return models.around(hidden.square().mean(), models.summed)

    with tracker.rng_state("audited"):
        wanted = paddle.rand([3]).numpy()
    tracker.set_states_tracker(states)
    audit = audited(loss, [("weight", weight)])
    assert audit.verdicts == {"weight": "partial"}  # each rank has a mask of its own
    with tracker.rng_state("audited"):
        assert np.array_equal(paddle.rand([3]).numpy(), wanted)


def refusals():
    """On every rank, whichever has the fault; nothing is changed, and no rank waits."""
    loss, named, _ = models.tensor_parallel_mlp()
    rank, calls = dist.get_rank(), []
    audit = partial(audit_gradients, group=group())

    def fails():
        value = loss()  # its collectives are over: a rank that raises before them leaves the others waiting
        calls.append(None)
        if rank == 1 and len(calls) == 4:
            raise ValueError("no batch")
        return value

    before = [tensor.numpy() for _, tensor in named]
    same_error_everywhere(lambda: audit(fails, named), group(), "rank 1 of", "no batch")
    assert all(np.array_equal(tensor.numpy(), value) for (_, tensor), value in zip(named, before, strict=True))
    same_error_everywhere(lambda: audit(lambda: loss() * (1 + rank), named), group(), "same number", "combine=")
    same_error_everywhere(lambda: audit(loss, named[rank:]), group(), "names of parameters")
    embed = named[0][1]
    embed.set_value(embed + 0.01 * rank)
    same_error_everywhere(lambda: audit(loss, named), group(), "1 of 12 parameters differ", "embed first", "sharded=")


MLP = [(mlp_case, (fault,)) for fault in ("", *models.MLP_FAULTS)]
DECODER = [(decoder_case, ("ring", fault)) for fault in ("", "missing sum", "factor n", "detached keys")]
DECODER += [(decoder_case, ("ulysses", fault)) for fault in ("", "level forgotten", "another's gradient")]
FORMERS = [("qwen3_vl", fault) for fault in ("", "upstream", "upstream without SP", "unmarked norms")]
FORMERS += [("qwen2_5_vl", fault) for fault in ("", "marked tower")]
TWO_RANKS = {"mlp " + words[0]: partial(case, *words) for case, words in MLP}
TWO_RANKS |= {" ".join(words): partial(case, *words) for case, words in DECODER}
TWO_RANKS |= {f"{family} {fault}": partial(formers_case, family, fault) for family, fault in FORMERS}
TWO_RANKS |= {
    case.__name__: case
    for case in (
        unreduced_data_parallel,
        reduced_data_parallel,
        strided_all_reduce,
        copies_that_differ,
        tensor_parallel_dropout,
        refusals,
    )
}
ON_FOUR = ["mlp ", "mlp second sum", "ring missing sum", "reduced_data_parallel", "strided_all_reduce"]
ON_FOUR += [f"qwen3_vl {fault}" for fault in ("", "upstream", "upstream without SP")]
FOUR_RANKS = {name: TWO_RANKS[name] for name in ON_FOUR} | {"losses_of_parts": losses_of_parts}
FOUR_RANKS |= {f"text in parts {fault}": partial(text_in_parts, fault) for fault in ("", "upstream")}
LAUNCHES = {2: TWO_RANKS, 4: FOUR_RANKS}


@pytest.mark.parametrize(("nranks", "case"), pairs(LAUNCHES))
def test_on_all_ranks(nranks, case):
    """The verdicts that the wiring asks for, the same on every rank; parameters unchanged, bit for bit."""
    hold(__name__, nranks, case)
