"""GLM-OCR: images enter at the embedding, so one plan is all that it needs; videos are refused.

The model takes ids or embeddings, never both, so its positions are computed here as its own forward does. It has no
tensor or sequence parallelism.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from paddle.nn import Layer

from paddle_vl_sp.carried import LoadedPlans
from paddle_vl_sp.formers import tiny
from paddle_vl_sp.formers.context.setting import refuse_what_has_no_cut
from paddle_vl_sp.formers.contracts import equals_ours, fails_on_videos
from paddle_vl_sp.formers.known import MODELS, Called, Family, Replaced
from paddle_vl_sp.formers.merge import hide_pixels, kinds_to_merge, merge
from paddle_vl_sp.report import note_forward


def model_forward(original: Callable[..., Any]) -> Callable[..., Any]:
    """Inserts images by one plan and lets the original do the rest; refuses videos, on which the original fails."""
    signature = inspect.signature(original)

    @functools.wraps(original)
    def forward(self: Layer, *args: Any, **kwargs: Any) -> Any:
        refuse_what_has_no_cut(self)
        loaded = LoadedPlans.pop_from(kwargs)
        call = signature.bind(self, *args, **kwargs)
        given = call.arguments
        if given.get("pixel_values_videos") is not None:
            raise ValueError(
                f"{type(self).__name__} with videos: PaddleFormers' own forward fails on them, and looks for them at "
                "the placeholders of images; leave videos out of the batch"
            )
        kinds = kinds_to_merge(self, given)
        must_merge_itself = given.get("inputs_embeds") is not None or given.get("past_key_values") is not None
        if not kinds or must_merge_itself:
            return original(*call.args, **call.kwargs)
        merged = merge(self, given, kinds, loaded)
        note_forward(merged.plan, num_levels=0, group=None, syncs=merged.syncs)
        if given.get("position_ids") is None:
            grids = {name: given.get(name) for name in ("image_grid_thw", "video_grid_thw", "attention_mask")}
            given["position_ids"], self.rope_deltas = self.get_rope_index(given["input_ids"], **grids)
        hide_pixels(given, kinds, merged.embeds)
        given["input_ids"] = None
        return original(*call.args, **call.kwargs)

    return forward


FAMILY = Family(
    "GLM-OCR",
    f"{MODELS}.glm_ocr.modeling",
    replaced=(Replaced("GlmOcrModel.forward", model_forward, ("af1b597504b2fa21",)),),
    called=(
        Called("GlmOcrModel.get_image_features", ("self", "pixel_values", "image_grid_thw", "kwargs")),
        Called(
            "GlmOcrModel.get_rope_index", ("self", "input_ids", "image_grid_thw", "video_grid_thw", "attention_mask")
        ),
    ),
    contract=(equals_ours(tiny.tiny_glm_ocr, has_videos=False), fails_on_videos(tiny.tiny_glm_ocr)),
)
