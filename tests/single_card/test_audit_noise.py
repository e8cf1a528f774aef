"""How audits find a loss's noise, and what they ask of one that is noisy: planted noise, exact numbers."""

from types import SimpleNamespace

import numpy as np
import paddle
import pytest

from paddle_vl_sp.audit.alone import Alone
from paddle_vl_sp.audit.entries import EQUAL, entries_of
from paddle_vl_sp.audit.judge import Reading, holding, judge, statements
from paddle_vl_sp.audit.probe import Probe
from paddle_vl_sp.audit.search import Search
from paddle_vl_sp.audit.state import Before
from paddle_vl_sp.audit.steps import Steps, blind_moves, reach

E = 0.01  # planted
START = [0.9, 2.1]


class Noisy:
    """A straight loss of some parameters, of about 1; `planted` is added to it in the forwards of those numbers."""

    def __init__(self, planted=None, count=1):
        self.planted, self.number, self.moved = planted or {}, 0, []
        self.named = [(f"{i}", paddle.to_tensor(START, stop_gradient=False)) for i in range(count)]

    def __call__(self):
        self.number += 1
        self.moved.append([bool((tensor != paddle.to_tensor(START)).any()) for _, tensor in self.named])
        total = paddle.add_n([tensor.sum() for _, tensor in self.named]) / (3.1 * len(self.named))
        return total + self.planted.get(self.number, 0.0)

    def probe(self):
        probe = Probe(self, None, Before([]), "equal", False, lambda: None)
        probe.backward(None)
        probe.measure_noise(entries_of(self.named, set(), set(), 0.05, None))
        return probe


# Forward 1 has the backward, 2 is the same again; 3 and 4 are a step up and down, 5 and 6 half of it; where those are
# uneven, three steps more, up to forward 18.
@pytest.mark.parametrize(
    ("planted", "noise", "forwards"),
    [
        ({}, 0, 6),
        ({2: E}, E, 6),
        ({3: E, 4: -E}, E / 2.5**0.5, 18),
        ({5: E, 6: -E}, 2 * E / 2.5**0.5, 18),
        ({3: E, 4: E}, E / 17.5**0.5, 18),
        ({5: E, 6: E}, 4 * E / 17.5**0.5, 18),
        ({3: E, 4: E, 15: 8 * E, 16: 8 * E}, 8 * E / 17.5**0.5, 18),
        ({3: 8 * E, 4: 8 * E, 15: E, 16: E}, 8 * E / 17.5**0.5, 18),
        ({15: E, 16: E}, 0, 6),
    ],
)
def test_noise_is_the_largest_of_what_was_seen(planted, noise, forwards):
    """Within fp32 rounding (1e-5): between two equal forwards, or off a parabola, as the deviation of one loss."""
    loss = Noisy(planted)
    assert loss.probe().noise == pytest.approx(noise, rel=1e-3, abs=1e-5)
    assert loss.number == forwards


def test_a_loss_without_noise_has_that_of_its_digits():
    """At least a rounding of float32, at most some."""
    assert 0.9 * 2.0**-23 <= Noisy().probe().noise <= 12 * 2.0**-23


def test_a_loss_near_zero_is_as_large_as_what_it_is_made_of():
    """Exact: a hundredth of what its largest parameter can make of it."""
    weight = paddle.to_tensor([1.3, 1.3], stop_gradient=False)
    probe = Probe(lambda: weight[0] - weight[1], None, Before([]), "equal", False, lambda: None)
    probe.backward(None)
    probe.measure_noise(entries_of([("weight", weight)], set(), set(), 0.05, None))
    assert probe.base == 0
    assert probe.scale == pytest.approx(0.026)


def test_noise_is_looked_for_with_parameters_of_all_places():
    """Sixteen of them at most, from first to last; each is put back."""
    loss = Noisy(count=40)
    loss.probe()
    places = np.flatnonzero(loss.moved[2])
    assert 8 <= len(places) <= 16
    assert places.min() < 4
    assert places.max() > 35
    assert not any(loss.moved[0] + loss.moved[1])


@pytest.mark.parametrize(
    ("noise", "needed", "alone", "block"),
    [(1e-6, 2.4e-4, 2.4e-3, 166), (1e-4, 2.4e-2, 2.4e-2, 1), (1e-5, 2.4e-3, 2e-2, 16)],
)
def test_the_steps_that_a_noise_asks_for(noise, needed, alone, block):
    """Exact: the tolerated error of a part is twelve noises; one parameter alone has ten times that, up to 0.02."""
    steps = Steps.of(SimpleNamespace(noise=noise, scale=1.0), 0.05)
    assert (steps.needed, steps.alone) == pytest.approx((needed, alone))
    assert steps.largest_block == block
    assert steps.within(1) == pytest.approx(min(2 * needed, 0.04))
    assert steps.within(100) == pytest.approx(min(2 * needed, 0.0004))


@pytest.mark.parametrize(
    ("value", "along", "across"),
    [
        ([0.9, 2.1], 2 * 0.05 * 2.61**0.5, 2**0.5 * 0.15 * 2.61**0.5),
        ([0.0, 0.0], 2 * 0.05 * 0.1, 2**0.5 * 0.15 * 0.1),  # a bias
        ([[0.0, 0.0]], 2 * 0.05 * 0.02, 2**0.5 * 0.15 * 0.02),
    ],
)
def test_how_far_a_parameter_is_moved(value, along, across):
    """Exact, of a gradient of ones: relative to its root mean square, or to what zeros count as."""
    weight = paddle.to_tensor(value, stop_gradient=False)
    _, (entry,) = known(lambda: weight.sum(), [("weight", weight)], 1e-5)
    assert reach(entry, False) == pytest.approx(along, rel=1e-5)
    assert reach(entry, True) == pytest.approx(across, rel=1e-5)


def off_by(distance, error):
    """A reading of a whole gradient's part of 1, whose truth may be off by `error`."""
    return Reading(1.0, np.array([1.0 + distance]), error, 1.0)


@pytest.mark.parametrize(
    ("distance", "error", "holds"),
    [
        (0.04, 0.0, True),
        (0.055, 0.01, True),  # the error may have made it
        (0.065, 0.01, None),
        (0.075, 0.01, False),
        (0.02, 0.06, None),  # the error is above the tolerance
        (0.16, 0.06, None),
        (0.18, 0.06, False),
    ],
)
def test_a_reading_leaves_open_what_its_error_may_have_made(distance, error, holds):
    """True up to tolerance and error, False from tolerance and two errors on."""
    (whole,) = statements(EQUAL, 1, "equal")
    assert holding(whole, off_by(distance, error), 0.05) is holds
    verdict = judge([off_by(distance, error)], EQUAL, "equal", 0.05)
    assert (None if verdict is None else verdict.verdict) == {True: "whole", False: "mixed", None: None}[holds]


def test_one_statement_that_is_open_keeps_the_verdict_open():
    """Of two ranks: neither whole nor n times can be said, and the half, which comes later, does not close it."""
    unclear = Reading(1.0, np.array([1.065, 1.065]), 0.01, 1.0)
    assert judge([unclear], EQUAL, "equal", 0.05) is None
    clear = Reading(1.0, np.array([1.4, 1.4]), 0.01, 1.0)
    assert judge([unclear, clear], EQUAL, "equal", 0.05).verdict == "mixed"


def known(loss, named, noise, scale=1.0, after=None):
    """A probe that takes the loss to have this noise, and the entries."""
    probe = Probe(loss, None, Before([]), "equal", False, lambda: None)
    probe.backward(after)
    probe.noise, probe.scale = noise, scale
    return probe, entries_of(named, set(), set(), 0.05, None)


def readings_of(bend, factor, noise=1e-5):
    """Of the loss s + k s^3 at 0, where k is such that the first step's cube is `bend` of its straight part, 0.024."""
    weight = paddle.to_tensor([1.0, -1.0], stop_gradient=False)
    k = bend / 0.024**2

    def loss():
        return weight.sum() + k * weight.sum() ** 3

    def after():
        weight.grad.set_value(weight.grad * factor)

    probe, (entry,) = known(loss, [("weight", weight)], noise, scale=10.0, after=after)
    judgement, (reading,) = Alone(probe, Steps.of(probe, 0.05), 0, 0.05, "equal").judge([entry])
    return None if judgement is None else judgement.verdict, reading, probe.num_forwards


@pytest.mark.parametrize(
    ("bend", "factor", "noise", "verdict", "error", "forwards"),
    [
        (0.0, 1.0, 1e-5, "whole", 2e-5, 3),  # one step agrees: it is off by two noises at most
        (0.0, 1.2, 1e-5, "mixed", 6e-5, 5),  # a second one says that it is no bend
        (0.1, 1.0, 1e-5, "whole", 0.25 * 0.1 * 0.024 + 6e-5, 5),
        (0.4, 1.0, 1e-5, "whole", 0.4 * 0.024 / 64 + 24e-5, 9),  # of two steps too bent, of shorter ones not
        (0.0, 1.0, 2e-3, None, 24 * 2e-3, 9),  # all of them are too noisy
    ],
)
def test_a_step_that_disagrees_is_made_again_shorter(bend, factor, noise, verdict, error, forwards):
    """Within a thousandth: a third of what the bend explains and six noises, times how much shorter the steps are."""
    found, reading, count = readings_of(bend, factor, noise)
    assert (found, count) == (verdict, forwards)
    assert reading.error == pytest.approx(error, rel=1e-2)
    assert reading.truth == pytest.approx(reading.own[0] / factor, rel=1e-3)


REACHES = {  # of the loss; what is needed for a verdict is 0.048
    "big": 0.5,
    "layers.0.0": 0.03,
    "layers.0.1": 0.03,
    "layers.1.0": 0.01,
    "layers.1.1": 0.01,
    "layers.2.0": 0.02,
    "layers.3.0": 0.05,
    "layers.3.1": 0.0005,
    "layers.4.0": 0.1,
    "layers.4.1": 0.1,
}


def searched(wrong=""):
    """The outcomes of parameters of those reaches, one with half as much gradient again; noise 1e-4."""
    named = [(name, paddle.to_tensor([1.0, -1.0], stop_gradient=False)) for name in REACHES]
    slopes = [10 * reach for reach in REACHES.values()]

    def after():
        for name, tensor in named:
            tensor.grad.set_value(tensor.grad * (1.5 if name == wrong else 1.0))

    def loss():
        return sum(slope * tensor.sum() for slope, (_, tensor) in zip(slopes, named, strict=True))

    probe, entries = known(loss, named, 1e-4, after=after)
    search = Search(probe, 2, 0.05, "equal")
    search.run(entries)
    return search.found


def test_a_noisy_loss_judges_the_smallest_modules_that_it_can():
    """Alone, with others of its module, or not at all; and how large an error of one would have been seen."""
    found = searched()
    whole = {name: each.bundle for name, each in found.items() if each.judgement.verdict == "whole"}
    assert whole == {"big": 1, "layers.0.0": 2, "layers.0.1": 2, "layers.3.0": 1, "layers.4.0": 1, "layers.4.1": 1}
    left = found.keys() - whole.keys()
    assert {found[name].judgement.verdict for name in left} == {"too small to judge"}
    assert found["layers.0.0"].within == pytest.approx(0.05 * 0.06 / 0.03, rel=1e-3)


@pytest.mark.parametrize(
    ("wrong", "named"), [("layers.0.0", {"layers.0.0", "layers.0.1"}), ("layers.4.1", {"layers.4.1"})]
)
def test_with_a_noisy_loss_a_wrong_one_is_named_with_its_module(wrong, named):
    """And by itself where it can be judged alone."""
    assert {name for name, each in searched(wrong).items() if each.judgement.verdict == "mixed"} == named


@pytest.mark.parametrize(("times_noise", "is_needed"), [(5.0, False), (7.0, True)])
def test_a_parameter_without_gradient_is_needed_if_the_loss_moves_by_more_than_noise(times_noise, is_needed):
    """From six noises on."""
    weight = paddle.to_tensor([0.9, 2.1], stop_gradient=False)
    absent = paddle.to_tensor([0.4, 0.7], stop_gradient=False)
    probe, entries = known(
        lambda: weight.sum() + absent.detach().sum(), [("weight", weight), ("absent", absent)], noise=1.0
    )
    changes = [abs(probe.difference(blind_moves(entries[1:], number, 0)).truth) for number in (1, 2)]
    probe.noise = max(changes) / times_noise
    search = Search(probe, 2, 0.05, "equal")
    search.run(entries)
    assert search.found["absent"].is_needed == is_needed
