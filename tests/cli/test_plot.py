"""plot: files of the right kind and size, and the pixels and bars that the numbers ask for."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from paddle_vl_sp.cli import batch, main
from paddle_vl_sp.cli.draw_batch import PALE, owners_of, picture_of
from paddle_vl_sp.cli.drawing import RANKS, rank_colours
from paddle_vl_sp.layout import SeqLayout

matplotlib = pytest.importorskip("matplotlib")
BATCH = ("--seq", "256", "--batch", "2", "--images", "64x64,256x256", "--images", "64x64")
RACE = {
    "title": "a race, of two",
    "note": "",
    "lines": [
        {"name": "ours", "milliseconds": 1.0, "times_ours": 1.0, "times_floor": 2.0, "syncs": 0},
        {"name": "another", "milliseconds": 20.0, "times_ours": 20.0, "times_floor": 40.0, "syncs": 3},
    ],
}
STORED = {"machine": "a machine", "quick": True, "scripts": [{"name": "plan", "tables": [RACE]}]}


@pytest.mark.parametrize("kind", ["owners", "load"])
@pytest.mark.parametrize("cut", [(), ("--sp", "4"), ("--cp", "4", "--sp", "8")], ids=str)
def test_png_of_900_pixels_and_svg_with_text(kind, cut, tmp_path, capsys):
    """The width by reading the picture; words in the SVG stay words."""
    png, svg = tmp_path / "a.png", tmp_path / "a.svg"
    assert main(["plot", "--kind", kind, "--out", str(png), *BATCH, *cut]) == 0
    assert main(["plot", "--kind", kind, "--out", str(svg), *BATCH, *cut]) == 0
    assert matplotlib.image.imread(png).shape[1] == 900
    assert "visual tokens" in svg.read_text()
    assert str(svg) in capsys.readouterr().out


def test_a_batch_of_text_alone_has_pictures(tmp_path):
    """Nothing is divided by zero."""
    for kind in ("owners", "load"):
        assert main(["plot", "--kind", kind, "--out", str(tmp_path / "a.png"), "--seq", "64", "--sp", "2"]) == 0


def test_bench_from_a_stored_run(tmp_path):
    """Every contender by its name."""
    (tmp_path / "run.json").write_text(json.dumps(STORED))
    out = tmp_path / "a.svg"
    assert main(["plot", "--kind", "bench", "--bench", str(tmp_path / "run.json"), "--out", str(out)]) == 0
    words = out.read_text()
    assert all(part in words for part in ("a race, of two", "another", "20.00 x", "3 syncs", "a machine"))


def test_every_pixel_has_its_owners_colour():
    """By hand: visual positions in full colour, text pale."""
    mask = np.array([[1, 0, 0, 1]], dtype=bool)
    owners = np.array([0, 0, 1, 1])
    colours = rank_colours(2)
    picture = picture_of(mask, owners, 2)
    full = [colours[0], 1 - PALE * (1 - colours[0]), 1 - PALE * (1 - colours[1]), colours[1]]
    np.testing.assert_allclose(picture[0], full)


def test_long_sequences_keep_their_share_of_visual_tokens():
    """Columns average: half visual is half way between pale and full."""
    mask = np.tile([True, False], 8000)[None]
    picture = picture_of(mask, np.zeros(16000, dtype=int), 1)
    half = 1 - (PALE + (1 - PALE) / 2) * (1 - rank_colours(1)[0])
    assert picture.shape[1] <= 1600
    np.testing.assert_allclose(picture, np.broadcast_to(half, picture.shape))


def test_owners_are_the_layouts():
    """The example in SeqLayout's docstring."""
    layouts = [SeqLayout(8, cp_size=2, cp_rank=c, sp_size=2, sp_rank=s) for c in (0, 1) for s in (0, 1)]
    assert owners_of(batch.Batch(np.zeros((1, 8), bool), [], layouts)).tolist() == [0, 0, 2, 2, 3, 3, 1, 1]


def test_rank_colours_can_be_told_apart_without_red_and_green():
    """Neighbours differ by more than a quarter in lightness or in blue against yellow, which all people see."""
    red, green, blue = rank_colours(len(RANKS)).T
    lightness, yellowness = 0.3 * red + 0.59 * green + 0.11 * blue, (red + green) / 2 - blue
    apart = np.hypot(np.diff(lightness), np.diff(yellowness))
    assert apart.min() > 0.25


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (("--out", "a.gif", *BATCH), "--out must end in .png or .svg"),
        (("--out", "no-such/a.png", *BATCH), "there is no folder no-such"),
        (("--out", "a.png", "--kind", "bench"), "needs --bench FILE"),
        (("--out", "a.png", "--kind", "bench", "--bench", "gone.json"), "cannot be read"),
        (("--out", "a.png"), "which batch?"),
    ],
)
def test_wrong_use(arguments, why, capsys):
    """Exit code 2; nothing is written."""
    assert main(["plot", *arguments]) == 2
    assert why in capsys.readouterr().err
    assert not Path("a.png").exists()


def test_a_file_that_is_no_run_is_refused(tmp_path, capsys):
    """JSON of something else, and a run without races."""
    path = tmp_path / "run.json"
    for content, why in (({"a": 1}, "was not made by `bench"), (STORED | {"scripts": []}, "has no races")):
        path.write_text(json.dumps(content))
        assert main(["plot", "--kind", "bench", "--bench", str(path), "--out", str(tmp_path / "a.png")]) == 2
        assert why in capsys.readouterr().err


def test_without_matplotlib_the_mend_is_named(monkeypatch, capsys, tmp_path):
    """Exit code 1."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["plot", "--out", str(tmp_path / "a.png"), *BATCH]) == 1
    assert 'pip install "paddle-vl-sp[plot]"' in capsys.readouterr().err
