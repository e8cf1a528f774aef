"""plot: files of the right kind and size, and the pixels and bars that the numbers ask for."""

import json
import logging
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest

from paddle_vl_sp.cli import _parser, batch, main
from paddle_vl_sp.cli.costs import Model, vision_of
from paddle_vl_sp.cli.draw_batch import PALE, draw_load, owners_of, picture_of
from paddle_vl_sp.cli.draw_bench import limits_of, ticks_between
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
    assert all(
        part in words for part in ("a race, of two", "another", "20.00x", "3 waits for the device", "a machine", "10x")
    )


def test_ticks_of_a_log_axis():
    """By hand: 1, 2 and 5 of every decade, powers of ten where these are too many; 1 is always on the axis."""
    assert ticks_between(0.15, 30) == [0.2, 0.5, 1, 2, 5, 10, 20]
    assert ticks_between(0.05, 20000) == [0.1, 1, 10, 100, 1000, 10000]
    for ratios in ([1.0], [1.0, 30.0], [0.2, 1.0], [3.0, 4.0]):
        low, high = limits_of(ratios)
        assert low < min(1, *ratios) <= max(1, *ratios) < high
        assert 1 in ticks_between(low, high)


@pytest.mark.parametrize(("ranks", "has_numbers"), [(4, True), (16, False)])
def test_numbers_above_bars_only_where_they_fit(ranks, has_numbers):
    """Four digits each: above 4 bars, not above 16."""
    figure = matplotlib.figure.Figure(figsize=(9, 4), dpi=100)
    mask = np.ones((16, 16 * 180), dtype=bool)  # 2880 visual tokens for each of 16 ranks
    layouts = [SeqLayout(mask.shape[1], sp_size=ranks, sp_rank=rank) for rank in range(ranks)]
    draw_load(figure, batch.Batch(mask, [], layouts), Model(8, 2, 3))
    numbers = {text.get_text() for text in figure.axes[0].texts}
    assert (str(mask.sum() // ranks) in numbers) == has_numbers


def test_the_pages_policies_differ():
    """The example of the page with --kind load: the numbers that the page has, each policy better than the last."""
    page = (Path(__file__).parents[2] / "docs" / "command-line.md").read_text()
    (line,) = re.findall(r"^python -m paddle_vl_sp (plot --kind load .+)$", page, re.MULTILINE)
    arguments = _parser().parse_args(shlex.split(line))
    by_name = {each["policy"]: each["imbalance"] for each in vision_of(batch.batch_of(arguments), Model(8, 2, 3))}
    assert by_name["count"] > by_name["contiguous"] + 0.5 > by_name["longest"] + 0.6
    number = {name: f"{imbalance:.2f}" for name, imbalance in by_name.items()}
    told = " ".join(page.split())
    assert f"{number['count']} times the mean by `count`, {number['contiguous']} by `contiguous`" in told
    assert f"and {number['longest']} by `longest`" in told


def test_a_file_that_cannot_be_written_is_refused(tmp_path, capsys):
    """Exit code 2: here it is a folder."""
    (tmp_path / "a.png").mkdir()
    assert main(["plot", "--out", str(tmp_path / "a.png"), *BATCH]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_matplotlib_does_not_log_between_our_lines(tmp_path):
    """Whatever the level of the root: fonts found are no news."""
    logging.getLogger("matplotlib").setLevel(logging.NOTSET)
    assert main(["plot", "--out", str(tmp_path / "a.png"), *BATCH]) == 0
    assert not logging.getLogger("matplotlib.font_manager").isEnabledFor(logging.INFO)


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
        (("--out", "a.gif", *BATCH), "a picture must end in .png or .svg"),
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
