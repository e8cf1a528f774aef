"""PaddleFormers' whole fleet Qwen3-VL, tiny, on CPU ranks: settings, weights cut for a rank, errors against one rank.

It builds PaddleFormers' model over the PaddleFleet that is installed, and needs nothing else of either.
"""

import contextlib
import dataclasses

import numpy as np
import paddle
import paddle.distributed as dist

from paddle_vl_sp import RunReport, apply_to_qwen3_vl
from paddle_vl_sp.formers import PlanningCollate, tiny, tiny_fleet
from paddle_vl_sp.testing.tensor_parallel import enable_tensor_parallel_on_cpu, init_tensor_parallel

SEQ_LEN, STEPS = 64, 5
IMAGES = ([["image"] * 7, ["image"] * 6], 2)
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
EXPERTS = tiny.EXPERTS | {"rope_parameters": tiny.TEXT["rope_scaling"]}
SIDES = ("upstream", "one line")


@dataclasses.dataclass(frozen=True)
class Setting:
    """A model and what it is given: samples by kinds and a seed, micro-batch by micro-batch."""

    name: str
    batches: tuple = (IMAGES,)
    text: dict = dataclasses.field(default_factory=dict)
    vision: dict = dataclasses.field(default_factory=dict)
    tied: bool = False
    frozen: str = ""  # the part that is
    packed: bool = False
    experts: bool = False  # the MoE model, whose experts must be whole on every rank

    @property
    def reference(self):
        """The same without what must not change the result."""
        return dataclasses.replace(self, text={}, vision={})


SETTINGS = (
    Setting("images"),
    Setting("one rank has all images", (([["image", "image"], ["image"]], 1),)),
    Setting("images and text", (([["image"] * 6, [], ["image", "image"]], 0),)),
    Setting("text only", (([[], []], 5),)),
    Setting("videos", (([["video"] * 3, ["video"] * 2], 0),)),
    Setting("images and videos", (([["image"] * 3, ["video"] * 3], 5),)),
    Setting("empty layer in the head", text={"num_empty_layers_add_in_head": 1}),
    Setting("full recompute", text=FULL, vision=FULL),
    Setting("packed", packed=True),
    Setting("accumulation of 2", (IMAGES, ([["image"] * 3, []], 4))),
    Setting("frozen tower", frozen="vision_model"),
    Setting("frozen text", frozen="language_model"),
    Setting("tied embeddings", tied=True),
    Setting("MoE", experts=True),
)


def build(setting, nranks=1, sequence_parallel=True):
    """With random weights that are nowhere zero or one, the same in every process."""
    make, config_class = classes(setting)
    text = tiny.tensor_parallel(nranks, SEQ_LEN, sequence_parallel) if nranks > 1 else {"max_sequence_length": SEQ_LEN}
    text |= {"tie_word_embeddings": setting.tied} | (EXPERTS if setting.experts else {})
    config = config_class(
        text_config=tiny.TEXT | text | setting.text,
        vision_config=tiny.VISION | {"num_heads": 4, "tensor_model_parallel_size": nranks} | setting.vision,
        tie_word_embeddings=setting.tied,
        **tiny.TOKENS,
    )
    config.tensor_model_parallel_size = nranks
    config.sequence_parallel = sequence_parallel and nranks > 1
    model = make(config)
    model.train()
    for name, parameter in model.named_parameters():
        if setting.frozen and f".{setting.frozen}." in name:
            parameter.stop_gradient = True
    return model


def classes(setting):
    """The model's and its configuration's."""
    if setting.experts:
        from paddleformers.transformers.qwen3_vl_moe.configuration import Qwen3VLMoeConfig
        from paddleformers.transformers.qwen3_vl_moe.modeling import Qwen3VLMoeForConditionalGeneration

        return Qwen3VLMoeForConditionalGeneration, Qwen3VLMoeConfig
    from paddleformers.transformers.qwen3_vl.configuration import Qwen3VLConfig
    from paddleformers.transformers.qwen3_vl.modeling_fleet import Qwen3VLForConditionalGeneration

    return Qwen3VLForConditionalGeneration, Qwen3VLConfig


def load(model, weights, setting, rank=0, nranks=1):
    for name, parameter in model.named_parameters():
        part = cut(one_rank_name(name, setting), weights, rank, nranks)
        assert list(part.shape) == list(parameter.shape), name
        parameter.set_value(paddle.to_tensor(part))


def one_rank_name(name, setting):
    """The parameter's name in the model without empty layers: they shift the numbers of all that follow."""
    words = name.split(".")
    at = words.index("language_model") + 1 if "language_model" in words else 0
    if at and words[at].isdigit() and int(words[at]):
        words[at] = str(int(words[at]) - setting.text.get("num_empty_layers_add_in_head", 0))
    return ".".join(words)


def cut(name, weights, rank, nranks):
    """The part of a whole weight that a rank holds."""
    return tiny_fleet.cut(name, weights[name], rank, nranks)


def draw(setting, rope_by):
    """The micro-batches as numpy, with positions by the plain class: the fleet class has its start token fixed."""
    drawn = []
    for samples, seed in setting.batches:
        batch = tiny.draw_batch(samples, SEQ_LEN, seed)
        batch["position_ids"] = tiny.positions(rope_by, batch)
        if setting.packed:  # two documents a row: the position from which a key is no longer seen, [B, 1, S, 1]
            ends = np.repeat(np.array([27, SEQ_LEN], "int32"), [27, SEQ_LEN - 27]).reshape(1, 1, SEQ_LEN, 1)
            batch["attn_mask_startend_row_indices"] = paddle.to_tensor(np.repeat(ends, len(samples), axis=0))
        drawn.append({key: value.numpy() for key, value in batch.items()})
    return drawn


def step(model, batches):
    """The mean loss and the gradients of one optimizer step."""
    tiny.drop_gradients(model)
    total = 0.0
    for batch in batches:
        loss = model(**{key: paddle.to_tensor(value) for key, value in batch.items()}).loss / len(batches)
        loss.backward()
        total += float(loss)
    return total, tiny.gradients_of(model)


def reference(setting, weights, batches):
    """Loss and gradients on one rank by upstream's own code, without empty layers and recompute.

    Upstream cannot have images and videos in one batch: there the samples run one by one, and are weighted by their
    number of labels.
    """
    model = build(setting.reference)
    load(model, weights, setting.reference)
    if setting.name != "images and videos":
        return step(model, batches)
    (batch,) = batches
    loss, gradients, count = 0.0, {}, int((batch["labels"] >= 0).sum())
    for i, (pixels, kind) in enumerate((("pixel_values", "image"), ("pixel_values_videos", "video"))):
        own = {key: batch[key][i : i + 1] for key in ("input_ids", "labels")}
        own |= {"position_ids": batch["position_ids"][:, i : i + 1]}
        own |= {key: batch[key] for key in (pixels, f"{kind}_grid_thw")}
        share = int((own["labels"] >= 0).sum()) / count
        own_loss, own_gradients = step(model, [own])
        loss += share * own_loss
        for name, gradient in own_gradients.items():
            gradients[name] = gradients.get(name, 0) + share * gradient
    return loss, gradients


def references():
    """{setting's name: (setting, whole weights, batches, (loss, gradients))}, all on one rank."""
    plain, found, weights = tiny.tiny_qwen3_vl(), {}, {}
    for setting in SETTINGS:
        kind = setting.tied, setting.experts
        if kind not in weights:
            weights[kind] = tiny_fleet.draw_weights(build(setting.reference))
        batches = draw(setting, plain)
        found[setting.name] = setting, weights[kind], batches, reference(setting, weights[kind], batches)
    return found


def errors(gradients, wanted, setting, rank, nranks):
    """Relative errors of this rank's gradients: worst parameter of each part, and the vision tower's whole norm.

    A gradient that is not there counts as zeros.
    """
    mine = {one_rank_name(name, setting): gradient for name, gradient in gradients.items()}
    parts = {"vision": [0.0], "text": [0.0], "qk norms": [0.0]}
    apart = size = 0.0
    for name in wanted:
        right = cut(name, wanted, rank, nranks)
        wrong = float(np.linalg.norm(mine.get(name, np.zeros_like(right)) - right))
        part = "vision" if ".vision_model." in name else "qk norms" if "q_norm" in name or "k_norm" in name else "text"
        parts[part].append(wrong / max(float(np.linalg.norm(right)), 1e-30))
        if part == "vision":
            apart, size = apart + wrong**2, size + float(np.linalg.norm(right)) ** 2
    unexpected = len(mine.keys() - wanted.keys())
    worst = {part: max(values) for part, values in parts.items()}
    return worst | {"vision norm": (apart / size) ** 0.5 if size else 0.0, "unexpected": unexpected}


def measured(given, nranks, sequence_parallel, side, plans=False):
    """What one rank finds of one setting: {"raised": ...} or errors, syncs and how far the ranks' copies are apart."""
    setting, weights, batches, (loss, gradients) = given
    group, found = dist.get_group(0), {}
    with apply_to_qwen3_vl() if side == "one line" else contextlib.nullcontext():
        model = build(setting, nranks, sequence_parallel)
        load(model, weights, setting, group.rank, nranks)
        if plans:
            ranks = nranks if sequence_parallel else 1
            collate = PlanningCollate(dict, (tiny.IMAGE, tiny.VIDEO), ranks, "sequence", tiny.MERGE)
            batches = [collate(batch) for batch in batches]
        try:
            with RunReport() as report:
                own_loss, _ = step(model, batches)
        except (ValueError, TypeError) as error:
            return {"raised": f"{type(error).__name__}: {error}"}
        tiny.sum_marked_gradients(model, group)
        found = errors(tiny.gradients_of(model), gradients, setting, group.rank, nranks)
        found |= {"loss": abs(own_loss - loss), "syncs": report.read().get("syncs_here", 0)}
        found["replicas"] = drift(model, batches, group)
    return found


def drift(model, batches, group):
    """The largest relative distance between the ranks' copies of a replicated parameter, after some AdamW steps."""
    trained = [parameter for parameter in model.parameters() if not parameter.stop_gradient]
    optimizer = paddle.optimizer.AdamW(1e-4, parameters=trained)
    for _ in range(STEPS):
        step(model, batches)
        tiny.sum_marked_gradients(model, group)
        optimizer.step()
    copies = [parameter for parameter in trained if not getattr(parameter, "is_distributed", False)]
    worst = 0.0
    for parameter in copies:
        first = parameter.detach().clone()
        dist.broadcast(first, group.ranks[0], group=group)
        worst = max(worst, float((parameter - first).norm() / first.norm()))
    return worst


def on_ranks(nranks, todo, wanted):
    """{(setting, sequence parallel, side, plans): what this rank finds} for each of `todo`."""
    with enable_tensor_parallel_on_cpu():
        init_tensor_parallel(nranks)
        return {
            (name, sequence_parallel, side, plans): measured(wanted[name], nranks, sequence_parallel, side, plans)
            for name, sequence_parallel, side, plans in todo
        }
