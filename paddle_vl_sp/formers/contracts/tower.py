"""The vision tower and the head norms: what sharing the tower's work and summing gradients build on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import paddle
from paddle import Tensor

from paddle_vl_sp.comm.grads import head_norms
from paddle_vl_sp.formers import tiny
from paddle_vl_sp.formers.known import Clause, Family
from paddle_vl_sp.formers.merge import KINDS, encoded_rows

GRIDS = {"image": [(1, 4, 4), (1, 2, 4), (1, 4, 2)], "video": [(2, 4, 4), (1, 2, 4)]}
CLOSE = 1e-4  # a tower over fewer patches sums in another order


def encodes_item_by_item(build: Callable[[], Any]) -> Clause:
    """No image sees another one, no frame another frame: what each rank encodes is what one rank would."""

    def broken(_: Family, __: Any) -> str:
        model = build().model
        for part in ("spatial_merge_size", "config"):
            if not hasattr(model.visual, part):
                return f"the tower has no {part}"
        pixels = paddle.rand([sum(t * h * w for t, h, w in GRIDS["video"]), tiny.PATCH_SIZE])
        as_image, as_video = (_encoded(model, kind, pixels, GRIDS["video"]) for kind in GRIDS)
        if any((image != video).any() for image, video in zip(as_image, as_video, strict=True)):
            return "videos are not encoded as images are"
        for kind, grids in GRIDS.items():
            frames = [(1, height, width) for times, height, width in grids for _ in range(times)]
            pixels = paddle.rand([sum(t * h * w for t, h, w in grids), tiny.PATCH_SIZE])
            together = _encoded(model, kind, pixels, grids)
            parts = pixels.split([h * w for _, h, w in frames])
            apart = [_encoded(model, kind, part, [grid]) for part, grid in zip(parts, frames, strict=True)]
            for number, rows in enumerate(together):
                alone = np.concatenate([one[number] for one in apart])
                if rows.shape != alone.shape or not np.allclose(rows, alone, rtol=CLOSE, atol=CLOSE):
                    return f"{kind}s together are not {kind}s apart"
        return ""

    return Clause(f"{build.__name__}: the tower encodes each image, and each frame, by itself", broken, is_shared=True)


def has_unsummed_head_norms(build: Callable[[], Any]) -> Clause:
    """Ours have their gradients summed: all of them, and nothing else sums them."""

    def broken(_: Family, __: Any) -> str:
        model = build()
        text = model.model.language_model
        norms, wanted = head_norms(text), 2 * len(text.layers)
        if len(norms) != wanted:
            return f"{len(norms)} of {wanted} found"
        missing = [norm for norm in norms if not hasattr(norm, "enable_sequence_parallel")]
        if missing:
            return f"{len(missing)} of {wanted} cannot be marked"
        marked = [p for norm in norms for p in norm.parameters() if getattr(p, "sequence_parallel", False)]
        return f"{len(marked)} are marked without us" if marked else ""

    return Clause(f"{build.__name__}: q_norm and k_norm are there, and not marked for a sum", broken)


def _encoded(model: Any, kind: str, pixels: Tensor, grids: list[tuple[int, int, int]]) -> list[Any]:
    with paddle.no_grad():
        rows = encoded_rows(getattr(model, KINDS[kind][2])(pixels, paddle.to_tensor(grids)))
    return [rows.numpy()] if isinstance(rows, Tensor) else [rows[0].numpy(), *(level.numpy() for level in rows[1])]
