"""The grids of images by their sizes. Bar: those of the installed PaddleFormers and transformers, size by size."""

import json
import math

import numpy as np
import pytest

from paddle_vl_sp.cli import UsageError
from paddle_vl_sp.cli.model_sizes import ModelSizes
from paddle_vl_sp.cli.processor import FILE, Processor, processor_in, smart_resize, templates_size

QWEN2_5, QWEN3 = ModelSizes(patch=14), ModelSizes(patch=16)
TYPE = {"image_processor_type": "Qwen2VLImageProcessorFast"}
SETTINGS = {  # the models' own, and others
    "Qwen2.5-VL": (QWEN2_5, TYPE | {"patch_size": 14, "merge_size": 2, "min_pixels": 3136, "max_pixels": 12845056}),
    "Qwen3-VL": (
        QWEN3,
        TYPE | {"patch_size": 16, "merge_size": 2, "size": {"shortest_edge": 65536, "longest_edge": 16777216}},
    ),
    "narrow": (QWEN2_5, TYPE | {"patch_size": 14, "min_pixels": 100000, "max_pixels": 200000}),
    "small": (QWEN3, TYPE | {"patch_size": 16, "size": {"shortest_edge": 1024, "longest_edge": 9216}}),
}


def written(folder, **settings):
    (folder / FILE).write_text(json.dumps(settings))
    return folder


def test_smart_resize_is_that_of_transformers():
    """Exact, on 3000 drawn sizes, of all three kinds: rounded, scaled down, scaled up."""
    pytest.importorskip("paddleformers.transformers")  # transformers alone fails beside its torchcodec
    theirs = pytest.importorskip("transformers.models.qwen2_vl.image_processing_qwen2_vl").smart_resize
    rng, kinds = np.random.default_rng(0), set()
    for _ in range(3000):
        height, width = (int(side) for side in np.exp(rng.uniform(np.log(9), np.log(1200), 2)))
        factor, least = int(rng.choice([28, 32, 48])), int(rng.integers(1, 40000))
        most = least + int(rng.integers(factor**2, 400000))
        mine = smart_resize(height, width, factor, least, most)
        assert mine == theirs(height, width, factor, least, most), (height, width, factor, least, most)
        kinds.add(int(np.sign(math.prod(mine) - height * width)))
    assert kinds == {-1, 0, 1}


@pytest.mark.parametrize("name", SETTINGS)
def test_grids_are_those_of_paddleformers(name, tmp_path, monkeypatch):
    """Exact: what its template and its image processor make of images, also huge, tiny and long ones."""
    plugins = pytest.importorskip("paddleformers.datasets.template.mm_plugin")
    made_by = pytest.importorskip("paddleformers.transformers.qwen2_vl.image_processor_fast").Qwen2VLImageProcessorFast
    image_of = pytest.importorskip("PIL.Image").new
    sizes, settings = SETTINGS[name]
    processor = type("Processor", (), {"image_processor": made_by(**settings), "model_input_names": ()})()
    plugin = plugins.get_mm_plugin(f"qwen{2 if sizes == QWEN2_5 else 3}_vl", image_token="<i>", video_token="<v>")
    monkeypatch.setattr(plugin, "_img_download", lambda size: image_of("RGB", size[::-1]))
    drawn = np.random.default_rng(1).integers(20, 1400, (12, 2)).tolist()
    images = [*map(tuple, drawn), (448, 448), (720, 1280), (1280, 720), (10, 12), (20, 7000), (7000, 20), (768, 768)]
    theirs = plugin._get_mm_inputs(images, [], [], processor)["image_grid_thw"].tolist()
    mine = processor_in(written(tmp_path, **settings), sizes)
    assert [list(mine.grid(*size)) for size in images] == theirs


def test_grids_by_hand():
    """By hand: 768 x 768 pixels at most, then to whole tokens."""
    assert templates_size(720, 1280) == (576, 1024)
    assert Processor(14, 2, 3136, 12845056).grid(448, 448) == (1, 32, 32)
    assert Processor(16, 2, 65536, 16777216).grid(448, 448) == (1, 28, 28)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"image_processor_type": "Glm4vImageProcessor"}, "how Glm4vImageProcessor resizes is not known here"),
        ({"do_resize": False}, "give the grids as a .npz file"),
        ({"size": {"height": 3}}, "got [14, 2, None, None]"),
        ({"patch_size": "a"}, "it needs whole numbers from 1 as patch_size, merge_size"),
        ({"patch_size": 16}, "has patches of 16 pixels and merges 2, its config.json 14 and 2"),
    ],
)
def test_settings_that_cannot_be_used(settings, words, tmp_path):
    """What was got, and what to do."""
    with pytest.raises(UsageError) as caught:
        processor_in(written(tmp_path, **settings), QWEN2_5)
    assert words in str(caught.value)


def test_a_folder_without_a_processor(tmp_path):
    with pytest.raises(UsageError, match="which says how large a"):
        processor_in(tmp_path, QWEN2_5)
