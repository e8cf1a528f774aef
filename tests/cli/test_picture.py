"""The picture of inspect --out: files of the right kind and size, and the pixels and bars that the numbers ask for."""

import logging
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest

from paddle_vl_sp.cli import _parser, main, picture
from paddle_vl_sp.cli.batch import Batch, batch_of
from paddle_vl_sp.cli.inspect import costs_of
from paddle_vl_sp.cli.picture import PALE, RANKS, owners_image, owners_of, rank_colours
from paddle_vl_sp.layout import SeqLayout

figure_of, image_of = pytest.importorskip("matplotlib.figure"), pytest.importorskip("matplotlib.image")
BATCH = ("--seq", "256", "--batch", "2", "--images", "64x64,256x256", "--images", "64x64")
TEXT = ("--seq", "64", "--sp", "2")


@pytest.mark.parametrize("arguments", [BATCH, (*BATCH, "--cp", "4", "--sp", "8"), TEXT], ids=str)
def test_png_of_900_pixels_and_svg_with_text(arguments, tmp_path, capsys):
    """The width by reading the picture; words in the SVG stay words; a batch of text alone has a picture too."""
    png, svg = tmp_path / "a.png", tmp_path / "a.svg"
    assert main(["inspect", *arguments, "--out", str(png)]) == 0
    assert main(["inspect", *arguments, "--out", str(svg)]) == 0
    assert image_of.imread(png).shape[1] == 900
    words = svg.read_text()
    assert "Who owns which visual tokens" in words
    assert "Visual tokens of each rank" in words
    assert ("Vision DP" in words) == (arguments != TEXT)
    assert capsys.readouterr().out.endswith(f"picture: {svg}\n")


@pytest.mark.parametrize(("num_ranks", "has_numbers"), [(4, True), (16, False)])
def test_numbers_above_bars_only_where_they_fit(num_ranks, has_numbers, monkeypatch, tmp_path):
    """Four or five digits each: above 4 bars, not above 16."""
    mask = np.ones((16, 16 * 180), dtype=bool)  # 2880 visual tokens for each of 16 ranks
    layouts = [SeqLayout(mask.shape[1], sp_size=num_ranks, sp_rank=rank) for rank in range(num_ranks)]
    batch, figure = Batch(mask, [], layouts), figure_of.Figure(figsize=(9, 6), dpi=100)
    monkeypatch.setattr(picture, "save", lambda path, height, draw: draw(figure))
    picture.draw_batch(tmp_path, batch, costs_of(batch, 16, 3))
    numbers = {text.get_text() for text in figure.axes[1].texts}
    assert (str(mask.sum() // num_ranks) in numbers) == has_numbers


def test_the_pages_policies_differ():
    """The example of the page: the numbers that the page has, each policy better than the last."""
    page = (Path(__file__).parents[2] / "docs" / "command-line.md").read_text()
    (line,) = re.findall(r"^python -m paddle_vl_sp (inspect --out .+)$", page, re.MULTILINE)
    costs = costs_of(batch_of(_parser().parse_args(shlex.split(line))), 16, 3)
    by_name = {each["policy"]: each["imbalance"] for each in costs["vision_dp"]}
    assert by_name["count"] > by_name["contiguous"] + 0.5 > by_name["longest"] + 0.6
    number = {name: f"{imbalance:.2f}" for name, imbalance in by_name.items()}
    text = " ".join(page.split())
    assert f"{number['count']} times the mean by `count`, {number['contiguous']} by `contiguous`" in text
    assert f"and {number['longest']} by `longest`" in text


def test_matplotlib_does_not_log_between_our_lines(tmp_path):
    """Whatever the level of the root: fonts found are no news."""
    logging.getLogger("matplotlib").setLevel(logging.NOTSET)
    assert main(["inspect", "--out", str(tmp_path / "a.png"), *BATCH]) == 0
    assert not logging.getLogger("matplotlib.font_manager").isEnabledFor(logging.INFO)


def test_every_pixel_has_its_owners_colour():
    """By hand: visual positions in full colour, text pale."""
    mask = np.array([[1, 0, 0, 1]], dtype=bool)
    colours = rank_colours(2)
    image = owners_image(mask, np.array([0, 0, 1, 1]), 2)
    full = [colours[0], 1 - PALE * (1 - colours[0]), 1 - PALE * (1 - colours[1]), colours[1]]
    np.testing.assert_allclose(image[0], full)


def test_long_sequences_keep_their_share_of_visual_tokens():
    """Columns average: half visual is half way between pale and full."""
    mask = np.tile([True, False], 8000)[None]
    image = owners_image(mask, np.zeros(16000, dtype=int), 1)
    half = 1 - (PALE + (1 - PALE) / 2) * (1 - rank_colours(1)[0])
    assert image.shape[1] <= 1600
    np.testing.assert_allclose(image, np.broadcast_to(half, image.shape))


def test_owners_are_the_layouts():
    """The example in SeqLayout's docstring."""
    layouts = [SeqLayout(8, cp_size=2, cp_rank=c, sp_size=2, sp_rank=s) for c in (0, 1) for s in (0, 1)]
    assert owners_of(layouts).tolist() == [0, 0, 2, 2, 3, 3, 1, 1]


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
        (("--out", "folder.png", *BATCH), "cannot be written"),
        (("--out", "a.png"), "there is no batch"),
    ],
)
def test_wrong_usage(arguments, why, capsys, tmp_path, monkeypatch):
    """Exit code 2; nothing is written."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.png").mkdir()
    assert main(["inspect", *arguments]) == 2
    assert why in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["folder.png"]


def test_without_matplotlib_the_fix_is_named(monkeypatch, capsys, tmp_path):
    """Exit code 1, with what to install."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["inspect", "--out", str(tmp_path / "a.png"), *BATCH]) == 1
    assert 'pip install "paddle-vl-sp[plot]"' in capsys.readouterr().err
