"""A .jsonl data file of PaddleFormers, and its images' sizes: their headers are read, not their pixels."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paddle_vl_sp.cli import Problem, UsageError
from paddle_vl_sp.cli.terminal import Progress

FORM = '{"messages": [...], "images": ["a.png"]}, as PaddleFormers\' type "messages"'


@dataclass(frozen=True)
class Line:
    number: int  # from 1
    images: tuple[str, ...]  # as they are written: paths from the file's folder


def lines_in(path: Path) -> list[Line]:
    """Of every sample. Videos would have to be decoded: they are refused."""
    found, with_videos = [], []
    try:
        with path.open("rb") as file:
            for number, text in enumerate(file, 1):
                if text.strip():
                    sample = _sample(text, number)
                    found.append(Line(number, tuple(sample.get("images") or ())))
                    with_videos += [number] if sample.get("videos") else []
    except OSError as error:
        raise UsageError(f"it cannot be read: {error}") from None
    if with_videos:
        raise UsageError(
            f"{len(with_videos)} of {len(found)} samples have videos, first in line {with_videos[0]}, and their frames "
            "are not read here: give the grids of the whole data set as a .npz file, or leave these samples out"
        )
    if not found:
        raise UsageError(f"it has no line; each is {FORM}")
    return found


def _sample(text: bytes, number: int) -> dict[str, Any]:
    try:
        sample = json.loads(text)
    except ValueError as error:
        raise UsageError(f"line {number} is not JSON ({error}): a line is {FORM}") from None
    if not isinstance(sample, dict) or not isinstance(sample.get("messages"), list):
        raise UsageError(f"line {number} has no messages: a line is {FORM}")
    images = sample.get("images") or []
    if not isinstance(images, list) or not all(isinstance(image, str) for image in images):
        raise UsageError(f"line {number}: images must be a list of paths, got {str(images)[:60]}")
    return sample


def sizes_of(lines: Sequence[Line], folder: Path) -> list[list[tuple[int, int]]]:
    """Of each line the (height, width) of each image, in pixels."""
    try:
        from PIL import Image
    except ImportError:
        raise Problem("sizes of images are read by Pillow, which PaddleFormers needs too: pip install pillow") from None

    def size(number: int, written: str) -> tuple[int, int]:
        if written.startswith("http"):
            raise UsageError(f"line {number}: {written} is not downloaded here: give paths of files")
        try:
            with Image.open(folder / written) as image:
                return image.height, image.width
        except FileNotFoundError:
            raise UsageError(f"line {number}: there is no image {folder / written}") from None
        except Exception as error:  # Pillow raises many kinds for a broken file
            raise UsageError(f"line {number}: {folder / written} cannot be read as an image: {error}") from None

    found = []
    with Progress(len(lines)) as bar:
        for line in lines:
            found.append([size(line.number, image) for image in line.images])
            bar.advance("sizes of images")
    return found
