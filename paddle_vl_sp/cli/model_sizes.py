"""The sizes of a model's vision tower, as its config.json has them; Qwen3-VL's where no model is given."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paddle_vl_sp.cli import UsageError
from paddle_vl_sp.vision.share import tower_alpha

DEFAULTS = {"temporal_patch_size": 2, "in_channels": 3}
NEEDED = ("patch_size", "spatial_merge_size", "hidden_size", "intermediate_size", "out_hidden_size", *DEFAULTS)

Grid = tuple[int, int, int]


@dataclass(frozen=True)
class ModelSizes:
    """What the tokens and the work of a tower and the bytes of its pixels and features follow from.

    patch   pixels of its side
    merge   patches of a token's side
    frames  of a temporal patch
    alpha   what a patch's linear layers cost, in patches of attention
    hidden  width of a feature row; None where no model says it, and so with levels
    """

    patch: int = 16
    merge: int = 2
    frames: int = DEFAULTS["temporal_patch_size"]
    channels: int = DEFAULTS["in_channels"]
    alpha: int = tower_alpha(1152, 4304)
    hidden: int | None = None
    levels: int | None = None

    @property
    def numbers_of_a_patch(self) -> int:
        return self.channels * self.frames * self.patch**2

    def num_tokens(self, grid: Grid) -> int:
        t, h, w = grid
        return t * h * w // self.merge**2


QWEN3_VL = ModelSizes()


def sizes_in(folder: Path) -> ModelSizes:
    """Of the folder that holds a model's config.json, or of that file."""
    file = folder / "config.json" if folder.is_dir() else folder
    if not file.is_file():
        raise UsageError(f"--model {folder}: there is no {file}; it is the folder with a model's config.json")
    tower = settings_in(file).get("vision_config")
    given = DEFAULTS | (tower if isinstance(tower, dict) else {})
    levels = given.get("deepstack_visual_indexes") or ()
    lacking = [name for name in NEEDED if not is_size(given.get(name))]
    if lacking:
        raise UsageError(f"--model {file}: its vision_config needs whole numbers from 1 as {', '.join(lacking)}")
    return ModelSizes(
        patch=given["patch_size"],
        merge=given["spatial_merge_size"],
        frames=given["temporal_patch_size"],
        channels=given["in_channels"],
        alpha=tower_alpha(given["hidden_size"], given["intermediate_size"]),
        hidden=given["out_hidden_size"],
        levels=len(levels) if isinstance(levels, list) else 0,
    )


def settings_in(file: Path) -> dict[str, Any]:
    """The object in one of a model's .json files."""
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(settings, dict):
            raise ValueError(f"it is a {type(settings).__name__}, not an object")
    except (OSError, ValueError) as error:
        raise UsageError(f"--model {file} is not the configuration of a model: {error}") from None
    return settings


def is_size(value: Any) -> bool:
    return isinstance(value, int) and value > 0
