"""The patches that PaddleFormers' data path makes of an image, from its size and a model's preprocessor_config.json.

Twice an image is resized: by PaddleFormers' template, the same for all models, and by the model's image processor.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from paddle_vl_sp.cli import UsageError
from paddle_vl_sp.cli.model_sizes import Grid, ModelSizes, is_size, settings_in

FILE = "preprocessor_config.json"
DEFAULTS = {"patch_size": 14, "merge_size": 2}
DEFAULT_SIZE = {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280}
KNOWN = ("Qwen2VL", "Qwen2_5_VL", "Qwen3VL")
MOST_PIXELS, FEWEST_PIXELS, SHORTEST_SIDE, LONGEST_RATIO, LONG_RATIO = 768 * 768, 32 * 32, 28, 200, 180  # templates'


@dataclass(frozen=True)
class Processor:
    patch: int  # pixels of its side
    merge: int  # patches of a token's side
    min_pixels: int
    max_pixels: int

    def grid(self, height: int, width: int) -> Grid:
        """In patches."""
        factor = self.patch * self.merge
        height, width = smart_resize(*templates_size(height, width), factor, self.min_pixels, self.max_pixels)
        return 1, height // self.patch, width // self.patch


def processor_in(folder: Path, sizes: ModelSizes) -> Processor:
    """Of the model's folder, or of its config.json there."""
    file = (folder if folder.is_dir() else folder.parent) / FILE
    if not file.is_file():
        raise UsageError(f"--model {folder}: there is no {file}, which says how large a .jsonl file's images become")
    settings = settings_in(file)
    kind = settings.get("image_processor_type", KNOWN[0])
    if not str(kind).startswith(KNOWN) or not settings.get("do_resize", True):
        raise UsageError(f"--model {file}: how {kind} resizes is not known here: give the grids as a .npz file")
    size = settings.get("size")
    bounds = dict(size if isinstance(size, dict) else DEFAULT_SIZE)
    for name, place in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")):
        bounds[place] = settings.get(name) or bounds.get(place)
    found = DEFAULTS | settings
    numbers = [found["patch_size"], found["merge_size"], bounds["shortest_edge"], bounds["longest_edge"]]
    if not all(map(is_size, numbers)):
        raise UsageError(
            f"--model {file}: it needs whole numbers from 1 as patch_size, merge_size, and as min_pixels and "
            f"max_pixels or size.shortest_edge and size.longest_edge, got {numbers}"
        )
    if (found["patch_size"], found["merge_size"]) != (sizes.patch, sizes.merge):
        raise UsageError(
            f"--model {file} has patches of {found['patch_size']} pixels and merges {found['merge_size']}, its "
            f"config.json {sizes.patch} and {sizes.merge}: they must be of one model"
        )
    return Processor(*numbers)


def smart_resize(height: int, width: int, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """To multiples of `factor` with min_pixels to max_pixels in all, at nearly the same ratio.

    >>> smart_resize(720, 1280, 32, 65536, 589824)
    (576, 1024)
    """
    rows, columns = round(height / factor), round(width / factor)
    pixels = rows * columns * factor**2
    if pixels > max_pixels:
        scale = math.sqrt(height * width / max_pixels)
        rows, columns = (max(1, math.floor(side / scale / factor)) for side in (height, width))
    elif pixels < min_pixels:
        scale = math.sqrt(min_pixels / (height * width))
        rows, columns = (math.ceil(side * scale / factor) for side in (height, width))
    return rows * factor, columns * factor


def templates_size(height: int, width: int) -> tuple[int, int]:
    """What PaddleFormers' templates make of an image before the processor."""
    if height * width > MOST_PIXELS:
        height, width = _scaled(height, width, MOST_PIXELS)
    if height * width < FEWEST_PIXELS:
        height, width = _scaled(height, width, FEWEST_PIXELS)
    height, width = max(height, SHORTEST_SIDE), max(width, SHORTEST_SIDE)
    if width / height > LONGEST_RATIO:
        width = LONG_RATIO * height
    if height / width > LONGEST_RATIO:
        height = LONG_RATIO * width
    return height, width


def _scaled(height: int, width: int, pixels: int) -> tuple[int, int]:
    scale = math.sqrt(pixels / (height * width))
    return int(height * scale), int(width * scale)
