"""A batch and a layout, from the flags of `inspect`. Numpy only."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from paddle_vl_sp.cli import UsageError
from paddle_vl_sp.cli.model_sizes import QWEN3_VL, Grid, ModelSizes
from paddle_vl_sp.layout import CP_MODES, REMAINDERS, SeqLayout, layouts_of_all_ranks

QWEN3_VL_IDS = (151655, 151656)
MASKS = ("mask", "visual_pos_masks")
GRIDS = ("image_grid_thw", "video_grid_thw")
CUTS = ("sequence", "flattened")
MAX_TOKENS, MAX_RANKS, MAX_COUNTED = 1 << 27, 4096, 1 << 36  # some seconds and GB; counted: by every rank all tokens

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Batch:
    mask: Mask  # [B, S]; where the cut is of the flattened batch, [1, B * S]
    grids: list[Grid]  # (t, h, w) in patches, of all images and videos; empty where they are not known
    layouts: list[SeqLayout]  # of every rank, cp after cp, sp within
    flattened: int | None = None  # B, where the mask is [1, B * S]
    sizes: ModelSizes = QWEN3_VL

    @property
    def samples(self) -> int:
        return len(self.mask) if self.flattened is None else self.flattened

    @property
    def seq_len(self) -> int:
        return self.mask.size // max(self.samples, 1)

    @property
    def cut(self) -> str:
        return CUTS[self.flattened is not None]

    @property
    def num_visual(self) -> int:
        return int(self.mask.sum())

    def __str__(self) -> str:
        one = self.layouts[0]
        share = self.num_visual / max(self.mask.size, 1)
        percent = f"{share:.0%}" if share > 0.01 or not share else f"{share:.2%}"
        packed = "" if one.cu_seqlens is None else f", {len(one.cu_seqlens) - 1} packed sequences"
        cut = f"cp {one.cp_size}" + (f" ({one.cp_mode})" if one.cp_size > 1 else "") + f" x sp {one.sp_size}"
        cut += " of the flattened batch" if self.cut == "flattened" else ""
        return f"B {self.samples}, S {self.seq_len}{packed}, {self.num_visual} visual tokens ({percent}), {cut}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    batch = parser.add_argument_group("the batch", "from a file, or made up: text around images and videos")
    batch.add_argument(
        "--npz",
        type=Path,
        metavar="FILE",
        help=f"input_ids [B, S] or a bool {' or '.join(MASKS)} [B, S]; optional: {', '.join(GRIDS)} [I, 3], cu_seqlens",
    )
    batch.add_argument("--ids", default=",".join(map(str, QWEN3_VL_IDS)), help="placeholder ids (default %(default)s)")
    batch.add_argument("--seq", type=int, metavar="S", help="length of every sample")
    batch.add_argument("--batch", type=int, metavar="B", help="number of samples (default 1)")
    for kind, size in (("images", "HxW"), ("video", "FxHxW")):
        text = "in pixels; given once for every sample, or once for each"
        batch.add_argument(f"--{kind}", action="append", metavar=f"{size},...", help=text)
    cut = parser.add_argument_group("the layout")
    cut.add_argument("--cp", type=int, default=1, help="context-parallel size (default 1)")
    cut.add_argument("--sp", type=int, default=1, help="sequence-parallel (tensor-parallel) size (default 1)")
    text = "what is cut: every sample, or, as by PaddleFormers' plain classes, the flattened batch [B * S]"
    cut.add_argument("--cut", choices=CUTS, default="sequence", help=f"{text} (default sequence)")
    cut.add_argument("--mode", choices=CP_MODES, default="zigzag", help="the context-parallel cut (default zigzag)")
    cut.add_argument("--remainder", choices=REMAINDERS, default="error", help="for lengths that do not divide")


def batch_of(arguments: argparse.Namespace, sizes: ModelSizes = QWEN3_VL) -> Batch:
    if arguments.npz is None:
        mask, grids, cu_seqlens = *_made_up(arguments, sizes), None
    else:
        mask, grids, cu_seqlens = _from_file(arguments.npz, _ids(arguments.ids), sizes)
    ranks = arguments.cp * arguments.sp
    if ranks > MAX_RANKS or ranks * mask.size > MAX_COUNTED:
        raise UsageError(
            f"--cp {arguments.cp} x --sp {arguments.sp} is {ranks:,} ranks for {mask.size:,} tokens: at most "
            f"{min(MAX_RANKS, MAX_COUNTED // max(mask.size, 1)):,} ranks are looked at"
        )
    samples = len(mask) if arguments.cut == "flattened" else None
    if samples is not None:
        if arguments.cp > 1:
            raise UsageError(f"--cut flattened is a cut of sequence parallelism: leave out --cp, got {arguments.cp}")
        mask = mask.reshape([1, -1])
    return Batch(mask, grids, _layouts(arguments, mask.shape[1], cu_seqlens), samples, sizes)


def _layouts(arguments: argparse.Namespace, seq_len: int, cu_seqlens: Sequence[int] | None) -> list[SeqLayout]:
    if arguments.cp < 1 or arguments.sp < 1:
        raise UsageError(f"--cp and --sp must be at least 1, got {arguments.cp} and {arguments.sp}")
    cut: dict[str, Any] = {"cp_mode": arguments.mode, "remainder": arguments.remainder, "cu_seqlens": cu_seqlens}
    try:
        return layouts_of_all_ranks(SeqLayout(seq_len, cp_size=arguments.cp, sp_size=arguments.sp, **cut))
    except ValueError as error:
        raise UsageError(str(error).replace("remainder='front'", "--remainder front")) from error


def _from_file(path: Path, ids: Sequence[int], sizes: ModelSizes) -> tuple[Mask, list[Grid], list[int] | None]:
    try:
        arrays = arrays_in(path)
        mask = _mask_in(arrays, ids)
        grids = [grid for name in GRIDS if name in arrays for grid in grids_in(arrays[name], name, sizes.merge)]
        num_tokens = sum(map(sizes.num_tokens, grids))
        if grids and num_tokens != mask.sum():
            raise UsageError(
                f"the grids make {num_tokens} visual tokens, the ids or mask have {mask.sum()}: "
                "check --ids and --model, or leave the grids out"
            )
        return mask, grids, _bounds_in(arrays, mask)
    except UsageError as error:
        raise UsageError(f"--npz {path}: {error}") from None


def arrays_in(path: Path) -> dict[str, npt.NDArray[Any]]:
    try:
        file = np.load(path)
        if isinstance(file, np.ndarray):
            raise ValueError("it is a single array without a name")
        with file:
            return {name: file[name] for name in file.files}
    except Exception as error:  # numpy raises many kinds for a broken file
        raise UsageError(
            f'it cannot be read ({error}): numpy.savez("{path.stem}.npz", name=array) makes one that can'
        ) from error


def _mask_in(arrays: dict[str, npt.NDArray[Any]], ids: Sequence[int]) -> Mask:
    name = next((name for name in (*MASKS, "input_ids") if name in arrays), None)
    if name is None:
        raise UsageError(f"it has {', '.join(arrays) or 'nothing'}; needed is input_ids or {' or '.join(MASKS)}")
    found = arrays[name]
    if found.ndim != 2 or found.dtype.kind not in "biu":
        got = f"{found.dtype} {list(found.shape)}"
        raise UsageError(f"{name} is [B, S], of whole numbers or bool, got {got}; one sample is [1, S]")
    return np.isin(found, ids) if name == "input_ids" else found.astype(bool)


def grids_in(grids: npt.NDArray[Any], name: str, merge: int) -> list[Grid]:
    """Of images or videos, [I, 3]."""
    if grids.ndim != 2 or grids.shape[1] != 3 or grids.dtype.kind not in "iu":
        got = f"{grids.dtype} {list(grids.shape)}"
        raise UsageError(f"{name} is whole numbers [I, 3], frames, height and width, got {got}")
    found = [(int(t), int(h), int(w)) for t, h, w in grids.tolist()]
    wrong = [grid for grid in found if min(grid) < 1 or grid[1] % merge or grid[2] % merge]
    if wrong:
        raise UsageError(f"{name} has {wrong[0]}; height and width are in patches, multiples of {merge}")
    return found


def _bounds_in(arrays: dict[str, npt.NDArray[Any]], mask: Mask) -> list[int] | None:
    packed = arrays.get("cu_seqlens")
    if packed is None:
        return None
    if packed.ndim != 1 or len(mask) != 1:
        got = f"shape {list(packed.shape)} with ids or mask of shape {list(mask.shape)}"
        raise UsageError(f"cu_seqlens is one row of bounds, for one packed row [1, S]; got {got}")
    bounds: list[int] = packed.tolist()
    return bounds


def _ids(text: str) -> list[int]:
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise UsageError(f"--ids must be numbers with commas between, got {text!r}") from None


def _made_up(arguments: argparse.Namespace, sizes: ModelSizes) -> tuple[Mask, list[Grid]]:
    batch = 1 if arguments.batch is None else arguments.batch
    if batch < 1 or arguments.seq < 1:
        raise UsageError(f"--batch and --seq must be at least 1, got {batch} and {arguments.seq}")
    if batch * arguments.seq > MAX_TOKENS:
        raise UsageError(
            f"--batch {batch} x --seq {arguments.seq} is more than the {MAX_TOKENS:,} tokens that are looked at one by "
            "one: fewer samples show the same, sample by sample"
        )
    per_sample: list[list[Grid]] = [[] for _ in range(batch)]
    for name in ("images", "video"):
        given = getattr(arguments, name) or [""]
        if len(given) not in (1, batch):
            raise UsageError(f"--{name} is given {len(given)} times for {batch} samples: once, or once for each")
        for sample, text in zip(per_sample, given * batch if len(given) == 1 else given, strict=True):
            sample += [_grid(size, name, sizes) for size in text.split(",") if size]
    lengths = [[sizes.num_tokens(grid) for grid in grids] for grids in per_sample]
    mask = np.stack([_placed(arguments.seq, own, sample) for sample, own in enumerate(lengths)])
    return mask, [grid for grids in per_sample for grid in grids]


def _grid(text: str, name: str, sizes: ModelSizes) -> Grid:
    """A size in pixels as patches, to the nearest whole token.  448x720 of patches of 16  ->  (1, 28, 44)"""
    form = "FxHxW" if name == "video" else "HxW"
    given = [int(number) if number.isdecimal() else 0 for number in text.lower().split("x")]
    if len(given) != len(form.split("x")) or min(given) < 1:
        raise UsageError(f"--{name} takes {form} in pixels, got {text!r}")
    frames = given[0] if name == "video" else 1
    height, width = (max(1, round(size / (sizes.patch * sizes.merge))) * sizes.merge for size in given[-2:])
    return (-(-frames // sizes.frames), height, width)


def _placed(seq_len: int, lengths: list[int], sample: int) -> Mask:
    """Images in a row with equally much text before, between and after:  . v v . v v .  [S]"""
    text = seq_len - sum(lengths)
    if text < 0:
        raise UsageError(f"sample {sample} has {sum(lengths)} visual tokens, more than --seq {seq_len}: make it longer")
    mask = np.zeros(seq_len, dtype=bool)
    for i, length in enumerate(lengths):
        begin = text * (i + 1) // (len(lengths) + 1) + sum(lengths[:i])
        mask[begin : begin + length] = True
    return mask
