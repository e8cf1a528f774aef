"""PaddleOCR-VL: its forward takes videos and never looks at them, so they are refused. Nothing else is changed."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from paddle.nn import Layer

from paddle_vl_sp.formers.context.setting import refuse_what_has_no_cut
from paddle_vl_sp.formers.contracts import never_reads
from paddle_vl_sp.formers.known import MODELS, Family, Replaced


def refusing_videos(original: Callable[..., Any]) -> Callable[..., Any]:
    """Refuses videos, which the original drops: their placeholders would be trained as text."""
    signature = inspect.signature(original)

    @functools.wraps(original)
    def forward(self: Layer, *args: Any, **kwargs: Any) -> Any:
        refuse_what_has_no_cut(self)
        if signature.bind(self, *args, **kwargs).arguments.get("pixel_values_videos") is not None:
            raise ValueError(
                f"{type(self).__name__} with videos: PaddleFormers' forward drops them without a word, and their "
                "placeholders stay text; leave videos out of the batch"
            )
        return original(self, *args, **kwargs)

    return forward


FAMILY = Family(
    "PaddleOCR-VL",
    f"{MODELS}.paddleocr_vl.modeling",
    is_optional=True,  # triton
    replaced=(Replaced("PaddleOCRVLForConditionalGeneration.forward", refusing_videos, ("6b734791d01fbd4a",)),),
    contract=(never_reads("PaddleOCRVLForConditionalGeneration.forward", "pixel_values_videos"),),
)
