"""The images of a data set's samples, from a .jsonl file of PaddleFormers or as grids in an .npz file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from paddle_vl_sp.cli import UsageError
from paddle_vl_sp.cli.batch import GRIDS, arrays_in, grids_in
from paddle_vl_sp.cli.messages_file import lines_in, sizes_of
from paddle_vl_sp.cli.model_sizes import ModelSizes
from paddle_vl_sp.cli.processor import MOST_PIXELS, processor_in

NUMBERS = "images_per_sample"
LINES = (".jsonl", ".json")  # PaddleFormers reads both line by line

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Grids:
    """Of some samples, in patches: [I, 3] of each. shrunk: images that PaddleFormers makes smaller, if it is known."""

    of_samples: list[Integers]
    shrunk: int | None = None


@dataclass(frozen=True, eq=False)
class DataSet:
    images: Sequence[int]  # of each sample, how many
    read: Callable[[Sequence[int]], Grids]


def data_set_in(path: Path, model: Path | None, sizes: ModelSizes) -> DataSet:
    try:
        return _of_lines(path, model, sizes) if path.suffix in LINES else _of_arrays(path, sizes)
    except UsageError as error:
        raise _named(path, error) from None


def _named(path: Path, error: UsageError) -> UsageError:
    return UsageError(f"--dataset {path}: {error}")


def _of_lines(path: Path, model: Path | None, sizes: ModelSizes) -> DataSet:
    if model is None:
        raise UsageError("a .jsonl file needs --model FOLDER, which has config.json and preprocessor_config.json")
    processor, lines = processor_in(model, sizes), lines_in(path)

    def read(samples: Sequence[int]) -> Grids:
        try:
            pixels = sizes_of([lines[sample] for sample in samples], path.parent)
        except UsageError as error:
            raise _named(path, error) from None
        grids = [[processor.grid(*size) for size in own] for own in pixels]
        shrunk = sum(height * width > MOST_PIXELS for own in pixels for height, width in own)
        return Grids([np.array(own, dtype=np.int64).reshape(-1, 3) for own in grids], shrunk)

    return DataSet([len(line.images) for line in lines], read)


def _of_arrays(path: Path, sizes: ModelSizes) -> DataSet:
    arrays, name = arrays_in(path), GRIDS[0]
    if name not in arrays or NUMBERS not in arrays:
        raise UsageError(f"it has {', '.join(arrays) or 'nothing'}; needed are {name} and {NUMBERS}")
    grids = np.array(grids_in(arrays[name], name, sizes.merge), dtype=np.int64).reshape(-1, 3)
    numbers = arrays[NUMBERS]
    if numbers.ndim != 1 or numbers.dtype.kind not in "iu" or not len(numbers) or numbers.min() < 0:
        raise UsageError(f"{NUMBERS} is whole numbers [D], got {numbers.dtype} {list(numbers.shape)}")
    if numbers.sum() != len(grids):
        raise UsageError(f"{NUMBERS} is {int(numbers.sum())} in all, and there are {len(grids)} grids")
    by_sample = np.split(grids, np.cumsum(numbers)[:-1])
    return DataSet(numbers.tolist(), lambda samples: Grids([by_sample[sample] for sample in samples]))
