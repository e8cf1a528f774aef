"""inspect --dataset: the loads of a data set. Bar: the numbers are those of the shares; errors say what to change."""

import json

import numpy as np
import pytest
from commands import call

from paddle_vl_sp.cli import balance_picture
from paddle_vl_sp.vision.homes import balance_images

SIDES = np.array([64, 8, 8, 16, 8, 32, 8, 8])


def saved(folder, **arrays):
    grids = np.stack([np.ones_like(SIDES), SIDES, SIDES], axis=1)
    path = folder / "sizes.npz"
    np.savez(path, **({"image_grid_thw": grids, "images_per_sample": [1, 3, 0, 4]} | arrays))
    return path


def asked(path, *more):
    return call("inspect", "--dataset", str(path), "--dp", "2", "--batch", "2", "--json", *more)


def test_the_loads_of_every_policy(tmp_path):
    """One step of two copies of two samples: the huge image bounds all; nothing moves at home."""
    found = json.loads(asked(saved(tmp_path)).stdout)
    assert (found["samples"], found["images"], found["steps"]) == (4, 8, 1)
    by_name = {policy["policy"]: policy for policy in found["policies"]}
    assert list(by_name) == ["home", "count", "contiguous", "longest"]
    assert by_name["home"]["pixel_bytes"] == by_name["home"]["row_bytes"] == 0
    assert by_name["home"]["faster"] == 1
    assert by_name["longest"]["over_least"] <= min(policy["over_least"] for policy in found["policies"])
    assert by_name["count"]["pixel_bytes"] % (3 * 2 * 16 * 16 * 2) == 0


def test_ranks_within_a_copy_and_a_picture(tmp_path):
    """Rows travel to the other rank of a copy even if nothing moves; the picture is written."""
    picture = tmp_path / "loads.png"
    found = json.loads(asked(saved(tmp_path), "--sp", "2", "--levels", "0", "--out", str(picture)).stdout)
    assert found["ranks"] == {"dp": 2, "within": 2}
    assert found["policies"][0]["row_bytes"] == (SIDES**2).sum() // 4 * 4096 * 2
    assert picture.read_bytes().startswith(b"\x89PNG")


def without(folder, *numbers):
    """Samples with so many images of 8 x 8 patches each."""
    return saved(folder, image_grid_thw=np.full([sum(numbers), 3], (1, 8, 8)), images_per_sample=numbers)


def test_steps_without_images_are_left_out_of_the_means(tmp_path):
    """By hand: one of two copies has the only image, so its rank has twice the mean and the least possible load."""
    done = call("inspect", "--dataset", str(without(tmp_path, 1, 0, 0, 0, 0, 0, 0, 0)), "--dp", "2", "--json")
    found = json.loads(done.stdout)
    assert (found["steps"], found["steps_without_images"]) == (4, 3)
    for policy in found["policies"]:
        assert (policy["imbalance"], policy["worst_imbalance"], policy["over_least"]) == (2, 2, 1)
    assert found["visual_tokens"]["of_a_copy"] == {"fewest": 0, "mean": 2.0, "most": 16}
    words = call("inspect", "--dataset", str(tmp_path / "sizes.npz"), "--dp", "2").stdout
    assert "3 of the steps have no image; the loads, the prediction and MiB are of the other 1" in words


def test_visual_tokens_of_copies_and_ranks(tmp_path):
    """By hand: two images of 16 tokens in one copy of two ranks, none in the other; four ranks with one at most."""
    done = call("inspect", "--dataset", str(without(tmp_path, 2, 0)), "--dp", "2", "--sp", "2", "--json")
    assert json.loads(done.stdout)["visual_tokens"] == {
        "of_a_copy": {"fewest": 0, "mean": 16.0, "most": 32},
        "home": {"fewest": 0, "mean": 8.0, "most": 16},
        "longest": {"fewest": 0, "mean": 8.0, "most": 16},
    }


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ((), "home: every rank the images of its own batch, as without balance"),
        (("--sp", "2"), "home: the 2 ranks of a copy share the images of its batch, as by vision_dp=True"),
        (("--sp", "2"), "over the mean of all 4 ranks"),
        (("--sp", "2"), "encoded by a rank, home"),
    ],
)
def test_words_say_what_is_shared_and_counted(tmp_path, flags, words):
    """By hand; no line is wider than 110 letters."""
    text = call("inspect", "--dataset", str(saved(tmp_path)), "--dp", "2", "--batch", "2", *flags).stdout
    assert words in text
    assert max(map(len, text.splitlines())) < 110


@pytest.mark.parametrize("copies", [1, 2, 3])
def test_the_pictures_ranks_and_steps_are_whole_numbers(copies, monkeypatch, tmp_path):
    """Every tick in both panels, and what is drawn are steps with images."""
    figure = pytest.importorskip("matplotlib.figure").Figure(figsize=(9, 4))
    share = balance_images([np.array([[1, 8, 8 * (copy + 1)]]) for copy in range(copies)], 2, 100)
    monkeypatch.setattr(balance_picture, "save", lambda path, height, draw: draw(figure))
    balance_picture.draw_balance(tmp_path, "", dict.fromkeys(("home", "longest"), [share] * copies))
    for panel in figure.axes:
        ticks = panel.get_xticks()
        assert len(ticks)
        assert (ticks == ticks.round()).all()


@pytest.mark.parametrize(
    ("arrays", "more", "words"),
    [
        ({"images_per_sample": [1, 2]}, (), "images_per_sample is 3 in all, and there are 8 grids"),
        ({"images_per_sample": [1.0, 7.0]}, (), "images_per_sample is whole numbers [D], got float64 [2]"),
        ({"image_grid_thw": np.array([[1, 3, 4]] * 8)}, (), "image_grid_thw has (1, 3, 4); height and width"),
        ({}, ("--steps", "0"), "--steps must be at least 1"),
        ({}, ("--sp", "100000"), "their ranks at most 4096"),
        ({}, ("--batch", "0"), "--batch and --steps must be at least 1"),
        ({}, ("--steps", "1001"), "the steps at most 1000, got 2, 1, 1, 2, 1001"),
        ({}, ("--batch", "100"), "--dp 2 x --batch 100 is 200 samples a step, and --dataset "),
        (
            {"image_grid_thw": np.ones([0, 3], int), "images_per_sample": [0] * 4},
            (),
            "none of the 1 steps has an image",
        ),
    ],
)
def test_what_cannot_be_looked_at(tmp_path, arrays, more, words):
    found = asked(saved(tmp_path, **arrays), *more)
    assert found.returncode == 2
    assert words in found.stdout


def test_a_file_without_the_arrays(tmp_path):
    np.savez(tmp_path / "other.npz", mask=np.ones([1, 4]))
    assert "it has mask; needed are image_grid_thw and images_per_sample" in asked(tmp_path / "other.npz").stdout
    assert "cannot be read" in asked(tmp_path / "absent.npz").stdout


SIZES = {"hidden_size": 1280, "intermediate_size": 3420, "out_hidden_size": 3584, "spatial_merge_size": 2}


def configured(folder, **vision):
    """A folder with a model's config.json."""
    (folder / "config.json").write_text(json.dumps({"vision_config": SIZES | {"patch_size": 14} | vision}))
    return folder


def test_the_sizes_of_a_model(tmp_path):
    """Exact: bytes of pixels and rows by its patch, width and levels; flags are above it; loads by its tower."""
    found = {
        name: json.loads(asked(saved(tmp_path), "--model", str(configured(tmp_path, **vision)), *more).stdout)
        for name, vision, more in (
            ("Qwen2.5-VL's", {}, ()),
            ("with levels", {"deepstack_visual_indexes": [1, 2]}, ()),
            ("by flags", {}, ("--hidden", "7168", "--levels", "0")),
            ("another tower", {"hidden_size": 16, "intermediate_size": 16}, ()),
        )
    }
    moved = {name: policies["policies"][1] for name, policies in found.items()}
    plain = moved["Qwen2.5-VL's"]
    assert plain["pixel_bytes"] > 0
    assert plain["pixel_bytes"] % (3 * 2 * 14 * 14 * 2) == 0
    assert plain["row_bytes"] % (3584 * 2) == 0
    assert moved["with levels"]["row_bytes"] == 3 * plain["row_bytes"]
    assert moved["by flags"]["row_bytes"] == 2 * plain["row_bytes"]
    assert moved["another tower"]["imbalance"] > plain["imbalance"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{}", "its vision_config needs whole numbers from 1 as patch_size, spatial_merge_size, hidden_size"),
        ('{"vision_config": {"patch_size": 0}}', "as patch_size, "),
        ("[1]", "is not the configuration of a model"),
        ("{", "is not the configuration of a model"),
    ],
)
def test_a_file_that_is_no_configuration(tmp_path, text, words):
    (tmp_path / "config.json").write_text(text)
    found = asked(saved(tmp_path), "--model", str(tmp_path))
    assert found.returncode == 2
    assert words in found.stdout


def test_a_folder_without_a_configuration(tmp_path):
    found = asked(saved(tmp_path), "--model", str(tmp_path / "none"))
    assert (found.returncode, "it is the folder with a model's config.json" in found.stdout) == (2, True)
