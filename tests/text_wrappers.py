"""What users put around the text model of PaddleFormers' plain Qwen3-VL; none of it knows this package."""

import paddle
from paddle.distributed.fleet.utils import recompute
from paddleformers.transformers.qwen3_vl.modeling import BaseModelOutputWithPast


class Wrapped(paddle.nn.Layer):
    """Hands on what it gets."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def get_input_embeddings(self):
        return self.inner.get_input_embeddings()

    def forward(self, **given):
        return self.inner(**given)


class Recomputed(Wrapped):
    """Recomputes the whole text model in the backward."""

    reentrant = True

    def forward(self, inputs_embeds=None, visual_pos_masks=None, deepstack_visual_embeds=None, **rest):
        def run(embeds, mask, *levels):
            embeds = embeds.clone()  # which PaddleFormers reshapes in place under sequence parallelism
            given = {"inputs_embeds": embeds, "visual_pos_masks": mask, "deepstack_visual_embeds": list(levels) or None}
            return self.inner(**rest, **given).last_hidden_state

        levels = deepstack_visual_embeds or ()  # one by one: recompute knows no lists of tensors
        hidden = recompute(run, inputs_embeds, visual_pos_masks, *levels, use_reentrant=self.reentrant)
        return BaseModelOutputWithPast(last_hidden_state=hidden)


class RecomputedOtherwise(Recomputed):
    reentrant = False


class Twice(Wrapped):
    """R-Drop, self-distillation: runs the text model twice on one batch."""

    def forward(self, inputs_embeds=None, **given):
        runs = (self.inner(inputs_embeds=inputs_embeds.clone(), **given) for _ in range(2))
        first, second = (run.last_hidden_state for run in runs)
        return BaseModelOutputWithPast(last_hidden_state=first + 0.5 * second)


def wrap(model, wrapper):
    model.model.language_model = wrapper(model.model.language_model)
    return model
