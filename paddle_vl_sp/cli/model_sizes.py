"""The sizes of a model's vision tower, as its config.json has them; Qwen3-VL's where no model is given."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paddle_vl_sp.cli import UsageError
from paddle_vl_sp.cli.batch import CHANNELS, FRAMES, MERGE, PATCH
from paddle_vl_sp.vision.share import tower_alpha

DEFAULTS = {"temporal_patch_size": FRAMES, "in_channels": CHANNELS}
NEEDED = ("patch_size", "spatial_merge_size", "hidden_size", "intermediate_size", "out_hidden_size", *DEFAULTS)


@dataclass(frozen=True)
class ModelSizes:
    """What the work of a tower and the bytes of its pixels and features follow from.

    alpha   what a patch's linear layers cost, in patches of attention
    pixels  numbers of a patch
    hidden  width of a feature row; None where no model says it, and so with levels
    """

    merge: int = MERGE
    alpha: int = tower_alpha(1152, 4304)
    pixels: int = CHANNELS * FRAMES * PATCH**2
    hidden: int | None = None
    levels: int | None = None


def sizes_in(folder: Path) -> ModelSizes:
    """Of the folder that holds a model's config.json, or of that file."""
    file = folder / "config.json" if folder.is_dir() else folder
    if not file.is_file():
        raise UsageError(f"--model {folder}: there is no {file}; it is the folder with a model's config.json")
    try:
        tower = json.loads(file.read_text(encoding="utf-8")).get("vision_config")
    except (OSError, ValueError, AttributeError) as error:
        raise UsageError(f"--model {file} is not the configuration of a model: {error}") from None
    given = DEFAULTS | (tower if isinstance(tower, dict) else {})
    levels = given.get("deepstack_visual_indexes") or ()
    lacking = [name for name in NEEDED if not _is_size(given.get(name))]
    if lacking:
        raise UsageError(f"--model {file}: its vision_config needs whole numbers from 1 as {', '.join(lacking)}")
    return ModelSizes(
        merge=given["spatial_merge_size"],
        alpha=tower_alpha(given["hidden_size"], given["intermediate_size"]),
        pixels=given["in_channels"] * given["temporal_patch_size"] * given["patch_size"] ** 2,
        hidden=given["out_hidden_size"],
        levels=len(levels) if isinstance(levels, list) else 0,
    )


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and value > 0
