"""inspect --dataset train.jsonl: PaddleFormers' data files. Bar: grids by hand; what cannot be read names its line."""

import json
import re
import sys

import pytest

from paddle_vl_sp.cli import main, messages_file
from paddle_vl_sp.cli.data_files import data_set_in
from paddle_vl_sp.cli.model_sizes import sizes_in

new_image = pytest.importorskip("PIL.Image").new
SIZES = {"hidden_size": 1280, "intermediate_size": 3420, "out_hidden_size": 3584, "spatial_merge_size": 2}
BOUNDS = {"patch_size": 14, "min_pixels": 3136, "max_pixels": 12845056}


@pytest.fixture
def folder(tmp_path):
    """A model's folder and three images: 448 x 448, 720 high and 1280 wide, 56 x 56."""
    (tmp_path / "config.json").write_text(json.dumps({"vision_config": SIZES | {"patch_size": 14}}))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(BOUNDS))
    (tmp_path / "deep").mkdir()
    for name, size in (("a.png", (448, 448)), ("deep/b.jpg", (1280, 720)), ("c.png", (56, 56))):
        new_image("RGB", size).save(tmp_path / name)
    return tmp_path


def sample(*images, **more):
    message = {"role": "user", "content": "<image>" * len(images) + "?"}
    return (
        {"messages": [message, {"role": "assistant", "content": "yes"}]} | more | ({"images": images} if images else {})
    )


def written(folder, *samples):
    path = folder / "train.jsonl"
    path.write_text("\n".join(text if isinstance(text, str) else json.dumps(text) for text in samples))
    return path


@pytest.fixture
def inspected(folder, capsys):
    def call(*samples, flags=()):
        path = written(folder, *samples)
        code = main(["inspect", "--dataset", str(path), "--model", str(folder), "--json", *flags])
        return code, json.loads(capsys.readouterr().out)

    return call


def test_grids_of_the_samples(folder):
    """By hand, in patches of 14: as it is; shrunk to 576 x 1024 first; paths from the file's folder, or whole."""
    path = written(folder, sample("a.png", "deep/b.jpg"), "", sample(), sample(str(folder / "c.png")))
    data = data_set_in(path, folder, sizes_in(folder))
    assert data.images == [2, 0, 1]
    grids = data.read([0, 1, 2])
    assert [own.tolist() for own in grids.of_samples] == [[[1, 32, 32], [1, 42, 74]], [], [[1, 4, 4]]]
    assert grids.shrunk == 1
    assert data_set_in(path, folder / "config.json", sizes_in(folder)).read([2]).of_samples[0].tolist() == [[1, 4, 4]]


def test_loads_and_tokens(inspected, folder, capsys):
    """By hand: 256 and 4 tokens in the steps of one copy; words have them, and how many images are shrunk."""
    code, found = inspected(sample("a.png"), sample("c.png"))
    assert code == 0
    assert found["visual_tokens"]["of_a_copy"] == {"fewest": 4, "mean": 130.0, "most": 256}
    assert (found["steps"], found["shrunk_images"]) == (2, 0)
    path = written(folder, sample("deep/b.jpg"))
    assert main(["inspect", "--dataset", str(path), "--model", str(folder)]) == 0
    words = capsys.readouterr().out
    assert "1 of the images looked at have more than 768 x 768 pixels" in words
    assert "777.00" in words


def test_only_images_that_are_looked_at_are_opened(inspected):
    """With more steps than are asked for; with as few, all are, also those that make no whole step."""
    samples = [sample("a.png"), *[sample("none.png")] * 3]
    codes = {inspected(*samples[index:], *samples[:index], flags=("--steps", "1"))[0] for index in range(4)}
    assert codes == {0, 2}
    samples = [sample("a.png"), sample(), sample("none.png")]
    codes = [inspected(*samples[index:], *samples[:index], flags=("--dp", "2"))[0] for index in range(3)]
    assert codes == [2, 2, 2]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (sample("none.png"), r"line 2: there is no image .*/none\.png"),
        (sample("config.json"), r"line 2: .*/config\.json cannot be read as an image"),
        (sample("https://host/a.png"), r"line 2: https://host/a\.png is not downloaded here"),
        (sample(images="a.png"), r"line 2: images must be a list of paths, got a\.png"),
        (sample(images=[1]), r"line 2: images must be a list of paths, got \[1\]"),
        (sample(videos=["a.mp4"]), r"1 of 2 samples have videos, first in line 2, .* as a \.npz file, or leave"),
        ('{"messages": [', "line 2 is not JSON"),
        ('{"text_info": []}', r'line 2 has no messages: a line is \{"messages"'),
        ("[]", "line 2 has no messages"),
    ],
)
def test_lines_that_cannot_be_used(inspected, text, words):
    """Exit code 2, with the file, the line and the path."""
    code, found = inspected(sample("a.png"), text)
    assert code == 2
    assert re.search(rf"--dataset .*train\.jsonl: {words}", found["error"])


def test_files_that_cannot_be_used(inspected, folder, capsys):
    """Empty, absent, without a model, without Pillow: what to do."""
    assert "it has no line; each is" in inspected("")[1]["error"]
    path = written(folder, sample("a.png"))
    for arguments, words in (
        ((folder / "none.jsonl", "--model", str(folder)), "it cannot be read"),
        ((path,), "a .jsonl file needs --model FOLDER"),
    ):
        assert main(["inspect", "--dataset", *map(str, arguments)]) == 2
        assert words in capsys.readouterr().err


def test_without_pillow_the_fix_is_named(inspected, monkeypatch):
    """Exit code 1, with what to install."""
    monkeypatch.setitem(sys.modules, "PIL", None)
    code, found = inspected(sample("a.png"))
    assert code == 1
    assert "pip install pillow" in found["error"]


def test_progress_is_by_sample(folder, monkeypatch):
    """A step of the bar for each; it shows on a terminal only, as everywhere."""
    steps = []
    monkeypatch.setattr(messages_file.Progress, "advance", lambda self, doing: steps.append((self.total, doing)))
    messages_file.sizes_of(messages_file.lines_in(written(folder, sample("a.png"), sample())), folder)
    assert steps == [(2, "sizes of images")] * 2
