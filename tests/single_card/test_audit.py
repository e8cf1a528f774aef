"""audit_gradients in one process: what it finds, what it says, and that it leaves everything as it was."""

import random
import sys

import numpy as np
import paddle
import pytest
from paddle.nn import functional as F  # noqa: N812

from paddle_vl_sp import GradientAudit, audit_gradients
from paddle_vl_sp.audit import Cause, register_causes
from paddle_vl_sp.audit import causes as known_causes
from paddle_vl_sp.audit.entries import EQUAL, MARKED, SHARDED, UNEQUAL, entries_of
from paddle_vl_sp.audit.judge import Reading, factor_of, judge
from paddle_vl_sp.audit.probe import Probe
from paddle_vl_sp.audit.progress import counting
from paddle_vl_sp.audit.state import Before

LAYERS = ("first", "norm", "last")


class Small(paddle.nn.Layer):
    """Two layers with dropout and a BatchNorm between them; `detached` of the first one's output has no gradient."""

    def __init__(self, detached=0.0):
        super().__init__()
        self.first, self.last = paddle.nn.Linear(16, 64), paddle.nn.Linear(64, 10)
        self.norm, self.drop = paddle.nn.BatchNorm1D(64, use_global_stats=False), paddle.nn.Dropout(0.3)
        self.detached = detached
        self.x, self.labels = paddle.randn([32, 16]), paddle.randint(0, 10, [32])

    def loss(self):
        hidden = self.first(self.x)
        hidden = F.gelu(hidden) + self.detached * F.gelu(hidden.detach())
        return F.cross_entropy(self.last(self.norm(self.drop(hidden))), self.labels)


@pytest.fixture
def small():
    paddle.set_device("cpu")
    paddle.seed(1)
    return Small()


def everything_of(model):
    """Parameters, buffers, gradients and the next random numbers, to be compared bit for bit."""
    states = paddle.get_rng_state(), np.random.get_state(), random.getstate()
    found = [tensor.numpy() for tensor in [*model.parameters(), *model.buffers()]]
    found += [np.zeros(0) if p.grad is None else p.grad.numpy() for p in model.parameters()]
    found += [paddle.rand([4]).numpy(), np.random.rand(4), np.array([random.random()])]
    paddle.set_rng_state(states[0])
    np.random.set_state(states[1])
    random.setstate(states[2])
    return found


def same(one, other):
    return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def test_right_gradients_are_whole_with_dropout_and_batch_norm(small):
    """Every verdict, in twelve forwards."""
    audit = audit_gradients(small.loss, small, None)
    assert isinstance(audit, GradientAudit)
    assert audit.ok
    assert set(audit.verdicts.values()) == {"whole"}
    assert set(audit.verdicts) == {f"{layer}.{kind}" for layer in LAYERS for kind in ("weight", "bias")}
    assert all(shares == pytest.approx((1.0,), abs=0.02) for shares in audit.shares.values())
    assert audit.num_forwards == 12
    assert str(audit).splitlines()[-1] == f"audited 6 parameters in 2 + 2·{audit.num_forwards // 2 - 1} forwards"


@pytest.mark.parametrize(("detached", "tolerance"), [(1.0, 0.05), (0.3, 0.05), (0.05, 0.02)])
def test_a_detached_branch_is_found(small, detached, tolerance):
    """The layer before it is mixed, the others are whole."""
    small.detached = detached
    audit = audit_gradients(small.loss, small, None, tolerance=tolerance)
    assert not audit.ok
    assert {finding.name: finding.verdict for finding in audit.wrong} == {
        "first.weight": "mixed",
        "first.bias": "mixed",
    }
    assert audit.shares["first.weight"][0] == pytest.approx(1 / (1 + detached), rel=0.1)
    assert "off by" in str(audit)


def test_a_parameter_that_is_not_used_has_none_and_one_without_gradient_is_wrong(small):
    """Both have no gradient: the loss says which of them should have one."""
    unused, scale = paddle.create_parameter([3], "float32"), paddle.create_parameter([10], "float32")

    def loss():
        return small.loss() + (scale.detach() * paddle.arange(10, dtype="float32")).sum()

    audit = audit_gradients(loss, [*small.named_parameters(), ("unused", unused), ("scale", scale)], None)
    assert audit.verdicts["unused"] == audit.verdicts["scale"] == "none"
    assert [finding.name for finding in audit.wrong] == ["scale"]
    assert "detached?" in str(audit)


@pytest.mark.parametrize("with_gradients", [False, True])
def test_everything_is_as_before(small, with_gradients):
    """Bit for bit: parameters, buffers, gradients, absent ones too, and the random numbers that come next."""
    if with_gradients:
        small.loss().backward()
    before = everything_of(small)
    audit_gradients(small.loss, small, None)
    assert same(everything_of(small), before)
    assert all((p.grad is not None) == with_gradients for p in small.parameters() if not p.stop_gradient)


@pytest.mark.parametrize("fails_at", [1, 2, 3, 6])
def test_everything_is_as_before_after_an_error(small, fails_at):
    """Bit for bit, whether the backward, the noise or a step fails."""
    small.loss().backward()
    before, calls = everything_of(small), []

    def loss():
        calls.append(None)
        if len(calls) == fails_at:
            raise KeyError("no batch")
        return small.loss()

    with pytest.raises(KeyError, match="no batch"):
        audit_gradients(loss, small, None)
    assert same(everything_of(small), before)


def test_main_gradients_are_judged_and_kept(small):
    """Mixed precision's float32 gradients, bit for bit; wrong ones are found."""
    trained = [parameter for parameter in small.parameters() if not parameter.stop_gradient]
    for parameter in trained:
        parameter.main_grad = paddle.full(parameter.shape, 3.0)

    def into_main(factor):
        for parameter in trained:
            parameter.main_grad.set_value(parameter.main_grad + factor * parameter.grad)

    assert audit_gradients(small.loss, small, None, after=lambda: into_main(1.0)).ok
    assert not audit_gradients(small.loss, small, None, after=lambda: into_main(1.5)).ok
    assert all(bool((parameter.main_grad == 3.0).all()) for parameter in trained)


def test_a_loss_of_few_digits_gives_no_guess(small):
    """Rounded to bfloat16, by its dtype or hidden in float32: too small to judge instead of a verdict."""
    hidden = audit_gradients(lambda: small.loss().astype("bfloat16").astype("float32"), small, None)
    plain = audit_gradients(lambda: small.loss().astype("bfloat16"), small, None)
    for audit in (hidden, plain):
        assert audit.noise > 1e-3
        assert not audit.wrong
        assert "too small to judge" in audit.verdicts.values()


def test_a_bfloat16_model_is_judged_by_what_its_parameters_really_did():
    """Weights of 8 bits move in jumps: with a loss in float32 large parameters are judged, none of them wrongly."""
    paddle.seed(3)
    x, weight = paddle.randn([128, 64]), (0.2 * paddle.randn([64, 32])).astype("bfloat16")
    weight.stop_gradient = False
    way = paddle.randn([32, 8])

    def loss(factor=1.0):
        hidden = paddle.matmul(x, weight.astype("float32"))
        hidden = factor * hidden + (1 - factor) * hidden.detach()
        return F.softplus(paddle.matmul(paddle.tanh(hidden), way)).mean()

    assert audit_gradients(loss, [("weight", weight)], None).verdicts == {"weight": "whole"}
    assert audit_gradients(lambda: loss(0.3), [("weight", weight)], None).verdicts == {"weight": "mixed"}


def rounded_block(weights, x, labels):
    """The loss of two layers whose activations have the eight bits of bfloat16."""
    for weight in weights[:-1]:
        x = F.gelu(paddle.matmul(x, weight)).astype("bfloat16").astype("float32")
    return F.cross_entropy(paddle.matmul(x, weights[-1]), labels)


@pytest.mark.parametrize("factor", [1.0, 3.0])
def test_a_noisy_loss_is_judged_by_modules(factor):
    """Right gradients are not named; of wrong ones the module is, or the parameter where it stands out."""
    paddle.seed(5)
    weights = [(paddle.randn([64, 64]) / 8).detach() for _ in range(4)]
    for weight in weights:
        weight.stop_gradient = False
    x, labels = paddle.randn([32, 64]), paddle.randint(0, 64, [32])

    def after():
        for weight in weights[:2]:
            weight.grad.set_value(weight.grad * factor)

    named = [(f"layers.{i // 2}.{i % 2}", weight) for i, weight in enumerate(weights)]
    audit = audit_gradients(lambda: rounded_block(weights, x, labels), named, None, after=after)
    assert audit.noise > 1e-5
    assert audit.ok == (factor == 1.0)
    assert {finding.name for finding in audit.wrong if finding.together == 1} <= {"layers.0.0", "layers.0.1"}
    together = [finding for finding in audit.findings if finding.together > 1]
    assert all(("of its own" in each.note) == each.is_right for each in together)


@pytest.mark.parametrize(("count", "wrong", "most"), [(2000, None, 20), (500, 321, 120)])
def test_many_parameters(count, wrong, most):
    """The clean case costs ten to twenty forwards, whatever their number; one that is wrong is found by halving."""
    paddle.seed(6)
    scales = [(1 + 0.01 * paddle.randn([8])).detach() for _ in range(count)]
    for scale in scales:
        scale.stop_gradient = False
    x = paddle.rand([16, 8]) + 0.5

    def loss():
        hidden = x
        for i, scale in enumerate(scales):
            hidden = hidden * (scale if i != wrong else 0.5 * scale + 0.5 * scale.detach())
        return F.softplus(hidden).mean()

    audit = audit_gradients(loss, [(f"layers.{i // 10}.{i % 10}", scale) for i, scale in enumerate(scales)], None)
    assert [finding.name for finding in audit.wrong] == (
        [] if wrong is None else [f"layers.{wrong // 10}.{wrong % 10}"]
    )
    assert audit.num_forwards <= most


def test_steps_smaller_than_a_rounding_count_as_what_they_move():
    """A straight loss of bfloat16 weights, which a step of a thousandth moves by a rounding or not at all: exact."""
    paddle.seed(4)
    weight, factors = paddle.randn([40, 30]).astype("bfloat16"), paddle.randn([40, 30])
    weight.stop_gradient = False

    def loss():
        return (weight.astype("float32") * factors).sum()

    probe = Probe(loss, None, Before([]), "equal", False, lambda: None)
    probe.backward(None)
    (entry,) = entries_of([("weight", weight)], set(), set(), 0.05, None)
    seen = probe.difference([(entry, 3e-3 * weight.detach().astype("float32"))])
    assert abs(seen.truth) > 0.1
    assert seen.expected == pytest.approx(seen.truth, rel=2e-2)  # factors are rounded to bfloat16 in the gradient


def test_a_gradient_of_rounding_only_is_not_judged():
    """softmax does not change with a shift of its input: what autograd gives for it is noise."""
    paddle.seed(0)
    bias, weight, x = paddle.create_parameter([4], "float32"), paddle.create_parameter([8, 4], "float32"), None
    x = paddle.randn([16, 8])

    def loss():
        scores = paddle.matmul(x, weight) + bias.sum()
        return (F.softmax(scores) * paddle.arange(4, dtype="float32")).mean()

    audit = audit_gradients(loss, [("bias", bias), ("weight", weight)], None)
    assert audit.verdicts["weight"] == "whole"
    assert audit.verdicts["bias"] in ("too small to judge", "none")
    assert audit.ok


def test_frozen_and_shared_parameters(small):
    """Frozen ones are left out, a tensor under two names is judged once."""
    small.first.weight.stop_gradient = True
    pairs = [*small.named_parameters(), ("tied", small.last.weight)]
    audit = audit_gradients(small.loss, pairs, None)
    assert set(audit.verdicts) == {"first.bias", "norm.weight", "norm.bias", "last.weight", "last.bias"}


def test_a_known_cause_is_in_the_table(small, monkeypatch):
    """By name and verdict; the first one that fits, those that were added last before the others."""
    monkeypatch.setattr(known_causes, "_known", list(known_causes._known))
    register_causes(Cause("first", ("mixed",), "not this one"))
    register_causes(Cause("first", ("mixed",), "the branch is detached"))
    small.detached = 1.0
    assert str(audit_gradients(small.loss, small, None)).count("the branch is detached") == 2
    assert "q_norm" in known_causes.cause_of("layers.0.q_norm.weight", "partial", False, True)
    assert known_causes.cause_of("layers.0.q_norm.weight", "mixed", False, False) == ""
    assert "strided" in known_causes.cause_of("head.weight", "mixed", True, False)
    assert known_causes.cause_of("head.weight", "mixed", False, True) == ""


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"directions": -1}, "directions must be 0 or more, got -1"),
        ({"tolerance": 0.7}, "tolerance must be between 0 and 0.5, got 0.7"),
        ({"combine": "max"}, "combine must be one of 'equal', 'mean', 'sum', got 'max'"),
        ({"parameters": []}, "no parameter to audit"),
        (
            {"loss": lambda: paddle.create_parameter([2], "float32")},
            r"loss\(\) must return one number, .* got a tensor of shape \[2\]",
        ),
        ({"loss": lambda: 3.0}, r"loss\(\) must return one number, .* got float"),
    ],
)
def test_what_is_refused(small, change, words):
    """The message, with what was got."""
    given = {"loss": small.loss, "parameters": small, "group": None} | change
    with pytest.raises(ValueError, match=words):
        audit_gradients(given.pop("loss"), given.pop("parameters"), given.pop("group"), **given)


@pytest.mark.parametrize("rich", [True, False])
def test_the_count_of_forwards(monkeypatch, rich, capsys):
    """A function to call after each, on whichever rank and terminal, with rich or without it."""
    if rich:
        pytest.importorskip("rich")
    else:
        monkeypatch.setitem(sys.modules, "rich.console", None)
    for wanted, is_first_rank in ((None, True), (True, True), (True, False), (False, True)):
        with counting(wanted, is_first_rank) as tick:
            tick()
        assert ("1 forwards" in capsys.readouterr().err) <= (rich and bool(wanted) and is_first_rank)


def reading(own, truth, error=1e-4, size=1.0):
    return Reading(truth, np.array(own), error, size)


@pytest.mark.parametrize(
    ("kind", "own", "truth", "verdict"),
    [
        (EQUAL, [1, 1], 1, "whole"),
        (EQUAL, [1, 1], 2, "partial"),  # half of it on each rank
        (EQUAL, [2, 2], 1, "times 2"),
        (EQUAL, [4, 4], 1, "times 4"),
        (EQUAL, [0.25, 0.25], 1, "times 1/4"),
        (EQUAL, [1.2, 1.2], 1, "mixed"),
        (EQUAL, [0, 0], 1, "mixed"),
        (UNEQUAL, [0.3, 0.7], 1, "partial"),
        (UNEQUAL, [1.3, 1.7], 1, "mixed"),
        (UNEQUAL, [1, 0], 0, "mixed"),
        (MARKED, [0.3, 0.7], 1, "partial"),
        (MARKED, [1, 1], 1, "times 2"),
        (SHARDED, [1, 1], 1, "whole"),
        (SHARDED, [1, 1], 0.5, "times 2"),
        (SHARDED, [1, 1], 0.8, "mixed"),
    ],
)
def test_a_verdict_is_what_all_readings_agree_with(kind, own, truth, verdict):
    """One reading gives it; a second that disagrees makes it mixed; one that is too inexact leaves it open."""
    one, inexact = reading(own, truth), reading(own, truth, error=5.0)
    assert judge([one], kind, "equal", 0.05).verdict == verdict
    assert judge([one, reading([0.4, 0.9], -0.7)], kind, "equal", 0.05).verdict == "mixed"
    assert judge([inexact], kind, "equal", 0.05) is None


def test_mean_of_the_losses():
    """Under combine="mean" the sum of right gradients is n times, and the mean completes them."""
    judgement = judge([reading([0.5, 1.5], 1)], UNEQUAL, "mean", 0.05)
    assert (judgement.verdict, judgement.completed_by) == ("partial", "mean")
    assert judge([reading([0.5, 1.5], 1)], UNEQUAL, "equal", 0.05).verdict == "mixed"


def test_factors_of_verdicts():
    assert [factor_of(verdict) for verdict in ("times 2", "times 1/4", "whole")] == [2.0, 0.25, None]
