"""tools/demo.py apart from its training: the table, the picture, the verdict and the counting."""

import sys
from pathlib import Path

import pytest
from training import SAMPLES

from paddle_vl_sp.formers import PlanningCollate, apply_to_qwen3_vl, tiny

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
import demo
from demo_parts import models
from demo_parts.counting import syncs_and_searches

COUNTS = {"syncs": 20, "searches": 8}


def made_up(error=1e-6, drift=0.0):
    """What one of two ranks might find in three steps."""
    upstream = {
        "loss": [7.0, 6.0, 5.1],
        "error": [0.8, 0.9, 1.0],
        "norm": [0.3, 0.4, 0.5],
        "drift": [0.006, 0.01, 0.02],
    }
    patched = {"loss": [7.0, 6.0, 5.0], "error": [error] * 3, "norm": [error / 2] * 3, "drift": [drift] * 3}
    counts = {"upstream": COUNTS, "patched": COUNTS, "patched, planned by the loader": {"syncs": 0, "searches": 0}}
    return {"without SP": {"loss": [7.0, 6.0, 5.0]}, "upstream": upstream, "patched": patched, "counts": counts}


def test_table_says_the_numbers():
    """Losses, errors, drift and counts of both."""
    shown = demo.Shown("TheClass", "and why", True)
    text = demo.table(shown, [True] * 3, [made_up(), made_up()])
    errors = ("8.0e-01 / 1.0e+00", "3.0e-01 / 5.0e-01", "1.0e-06 / 1.0e-06", "5.0e-07 / 5.0e-07")
    for number in ("TheClass", "and why", "3 of 3 steps", "5.10000", "5.00000", *errors, "2.00%", "0.00%", "20 (0)"):
        assert number in text
    assert "as it does without sequence parallelism" in text
    assert "please report it" in demo.table(shown, [True], [made_up(error=0.1)])
    assert max(map(len, text.splitlines())) <= 120


def test_the_class_that_is_shown(monkeypatch):
    """The default one where PaddleFleet is there and a step runs; else the plain one, with the reason."""
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda _: None)
    assert models.chosen()[0] is models.PLAIN
    assert "paddlefleet, which is not installed" in models.chosen()[1]
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda _: "there")
    monkeypatch.setattr(models, "_try_a_step", lambda _: None)
    assert models.chosen()[0] is models.FLEET
    assert models.chosen("plain") == (models.PLAIN, "as asked for")

    def fails(_):
        raise RuntimeError("no kernel\nfor the CPU")

    monkeypatch.setattr(models, "_try_a_step", fails)
    kind, why = models.chosen()
    assert kind is models.PLAIN
    assert why.endswith("does not run on a CPU here: RuntimeError: no kernel for the CPU")


def test_without_paddleformers(monkeypatch, capsys):
    """Exit code 1, and what to install."""
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    monkeypatch.setattr(sys, "argv", ["demo.py"])
    assert demo.main() == 1
    assert "pip install" in capsys.readouterr().err


@pytest.mark.parametrize("nranks", [2, 4])
def test_pictures_are_900_pixels_wide(tmp_path, nranks):
    """Two PNGs."""
    pytest.importorskip("matplotlib")
    paths = tmp_path / "demo.png", tmp_path / "demo-owners.png"
    for is_flattened in (True, False):
        told = demo.pictures([made_up()] * nranks, tmp_path, is_flattened)
        assert told == f"pictures: {paths[0]}, {paths[1]}"
    for path in paths:
        header = path.read_bytes()[:24]
        assert int.from_bytes(header[16:20], "big") == 900


def test_without_matplotlib(monkeypatch, tmp_path):
    """It says so and goes on."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "pip install matplotlib" in demo.pictures([made_up()], tmp_path)


def test_verdict():
    """What must hold: equal bits on one rank, right gradients, equal copies, and upstream's fault still there."""
    assert demo.is_as_claimed([True], [made_up()])
    assert not demo.is_as_claimed([True, False], [made_up()])
    assert not demo.is_as_claimed([True], [made_up(error=0.1)])
    assert not demo.is_as_claimed([True], [made_up(), made_up(drift=1e-9)])


def test_counting():
    """One plan and one host sync with paddle_vl_sp, none with the loader's plan; upstream searches again and again."""
    model, batch = tiny.tiny_qwen3_vl(), tiny.draw_batch(SAMPLES["several"], seed=1)
    positions = tiny.positions(model, batch)
    upstream = syncs_and_searches(model, batch, positions)
    planned = PlanningCollate(dict, (tiny.IMAGE, tiny.VIDEO), cut="flattened")(batch)
    with apply_to_qwen3_vl():
        assert syncs_and_searches(model, batch, positions) == {"syncs": 1, "searches": 1}
        assert syncs_and_searches(model, planned, positions) == {"syncs": 0, "searches": 0}
    assert upstream["syncs"] >= 8
    assert upstream["searches"] >= 7
    assert syncs_and_searches(model, batch, positions) == upstream, "nothing is left behind"
