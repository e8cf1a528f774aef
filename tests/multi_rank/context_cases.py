"""Context parallelism of PaddleFormers' plain models on real ranks: one batch after the other, against one process."""

import dataclasses
import os
from types import SimpleNamespace
from unittest import mock

import numpy as np
import paddle
import paddle.distributed as dist

from grid import grid_of, two_times_two
from paddle_vl_sp import audit_gradients
from paddle_vl_sp.attention import ContextParallel
from paddle_vl_sp.formers import apply_to_paddleformers, own_part, tiny
from paddle_vl_sp.formers.audit import audit_step
from paddle_vl_sp.formers.context import plain
from paddle_vl_sp.formers.context.bounds import boundaries
from paddle_vl_sp.log import logger
from paddle_vl_sp.plan import VisualPlan
from paddle_vl_sp.sequence.batch import shard_batch
from paddle_vl_sp.settings import CHECK
from paddle_vl_sp.testing import tensor_parallel
from stub_paddlefleet import stubbed_paddlefleet

with stubbed_paddlefleet():  # once imported, the module stays
    import paddleformers.transformers.qwen3_vl_moe.modeling  # noqa: F401

FAMILIES = ("qwen3_vl", "qwen2_5_vl")
RECOMPUTE = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}


@dataclasses.dataclass(frozen=True)
class Case:
    name: str
    samples: tuple
    seq_len: int = 64
    model: str = "tiny_qwen3_vl"
    text: dict = dataclasses.field(default_factory=dict)
    segments: tuple = ()  # of each sample: the ends of packed segments; what follows the last is padding
    has_positions: bool = True
    labeled: int = 10**6  # the first positions, which keep their labels
    num_padded: int = 0
    vision_dp: bool = False

    def batch(self, model):
        batch = tiny.draw_batch(self.samples, self.seq_len, seed=1, frames_apart="2_5" not in self.model)
        labels = np.full_like(batch["labels"].numpy(), -100)
        labels[:, : self.labeled] = batch["labels"].numpy()[:, : self.labeled]
        for row, ends in zip(labels, self.segments, strict=False):
            row[ends[-1] :] = -100
        labels[0, self.seq_len - self.num_padded :] = -100
        batch["labels"] = paddle.to_tensor(labels)
        if self.has_positions:
            batch["position_ids"] = tiny.positions(model, batch)
        if self.segments:
            batch["attn_mask_startend_row_indices"] = paddle.to_tensor(self.row_indices())
        if self.num_padded:
            mask = np.ones_like(labels)
            mask[0, -self.num_padded :] = 0
            batch["attention_mask"] = paddle.to_tensor(mask)
        return batch

    def row_indices(self):
        """As PaddleFormers' collator makes them: [B, 1, S, 1], the padding's rows are the positions themselves."""
        rows = np.tile(np.arange(self.seq_len, dtype=np.int32), (len(self.samples), 1))
        for row, ends in zip(rows, self.segments, strict=True):
            for begin, end in zip((0, *ends), ends, strict=False):
                row[begin:end] = end
        return rows[:, None, :, None]


IMAGES, BOTH = (("image",), ("image", "image")), (("image", "video"), ("video",))
CUT = ("images", "images and videos", "packed, each segment divides")
CASES = (
    Case("images and videos", BOTH),
    Case("packed, each segment divides", (("image", "image"),), segments=((24, 64),)),
    Case("images", IMAGES),
    Case("images and videos, padded to divide", BOTH, 61),
    Case("videos of three samples", (("video",), ("video", "video"), ())),
    Case("text only", ((), ())),
    Case("one rank without labels", IMAGES, labeled=8),
    Case("one rank without visual tokens", (("image",),), 160),
    Case("packed", (("image", "image"),), segments=((23, 64),)),
    Case("packed rows with their own segments and padding", IMAGES, 63, segments=((20, 45), (31, 40, 58))),
    Case("no positions", IMAGES, has_positions=False),
    Case("full recompute", BOTH, text=RECOMPUTE),
    Case("padding behind", IMAGES, num_padded=9),
    Case("shared tower", BOTH, 24, vision_dp=True),
    Case("shared tower, one rank without visual tokens", (("image",),), 160, vision_dp=True),
    Case("shared tower, packed", IMAGES, 63, segments=((20, 45), (31, 40, 58)), vision_dp=True),
    Case("shared tower, full recompute", BOTH, 61, text=RECOMPUTE, vision_dp=True),
    Case("filtered labels", (("image", "image"),), text={"use_filtered_label_loss": True}, labeled=8),
    Case("MoE", BOTH, 61, "tiny_qwen3_vl_moe"),
    Case("Qwen2.5-VL", BOTH, 61, "tiny_qwen2_5_vl"),
    Case("Qwen2.5-VL, packed", IMAGES, 63, "tiny_qwen2_5_vl", segments=((20, 45), (31, 40, 58))),
    Case("Qwen2.5-VL, shared tower", BOTH, model="tiny_qwen2_5_vl", vision_dp=True),
)

IMAGES_CASE = next(case for case in CASES if case.name == "images")
SHARED_CASE = next(case for case in CASES if case.name == "shared tower")


def trained(case, setting, group):
    """Loss and gradients, summed over the group."""
    with apply_to_paddleformers(
        families=FAMILIES, context_parallel=setting, vision_dp=case.vision_dp and bool(setting)
    ):
        model = getattr(tiny, case.model)(**case.text)
        batch = case.batch(model)
        if setting is not None and setting.ids == "cut":
            batch = cut_by(setting, batch)
        loss = model(**batch).loss
        loss.backward()
    grads = {}
    for name, parameter in model.named_parameters():
        grad = paddle.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
        if group is not None:
            dist.all_reduce(grad, group=group)
        grads[name] = grad.numpy()
    return float(loss), grads


one_process = {}  # by a case's name: loss and gradients


def of_one_process(case):
    if case.name not in one_process:
        one_process[case.name] = trained(case, None, None)
    return one_process[case.name]


def share_references(names):
    """Each rank computes some of them by itself, and all get them."""
    cases = [case for case in CASES if case.name in names]
    found = []
    own = {case.name: trained(case, None, None) for case in cases[dist.get_rank() :: dist.get_world_size()]}
    dist.all_gather_object(found, own)
    for some in found:
        one_process.update(some)


def cut_by(setting, batch):
    """This rank's ids, labels and positions; the rest whole."""
    indices = batch.get("attn_mask_startend_row_indices")
    length = batch["input_ids"].shape[1]
    bounds = None if indices is None else boundaries(indices.numpy(), length)
    chosen = setting.choose(4, 4, length, head_size=16, batch=batch["input_ids"].shape[0])
    layout = chosen.layout(length, bounds)
    cut = ("input_ids", "labels", "position_ids")
    share = shard_batch({name: batch[name] for name in cut}, layout, cu_seqlens=chosen.bounds_of_batch(length, bounds))
    return batch | share


def errors(got, wanted):
    """Of the loss, and of the worst parameter's gradient."""
    (loss, grads), (right_loss, right) = got, wanted
    worst = max(
        float(np.linalg.norm(grads[name] - right[name])) / float(np.linalg.norm(right[name]))
        for name in right
        if np.linalg.norm(right[name]) > 0
    )
    nothing = (
        max(float(np.abs(grads[name]).max()) for name in right if np.linalg.norm(right[name]) == 0)
        if any(np.linalg.norm(grad) == 0 for grad in right.values())
        else 0.0
    )
    return abs(loss - right_loss), max(worst, nothing)


def on_ranks(kinds, names):
    paddle.set_device("cpu")
    share_references(names)
    group, found = dist.get_group(0), {}
    for case in (case for case in CASES if case.name in names):
        wanted = of_one_process(case)
        for kind in kinds:
            found[case.name, kind] = errors(trained(case, ContextParallel(kind, group=group), group), wanted)
    return found


def of_sequence_parallelism(names):
    """Two times two ranks: fleet's sep axis, and inside it sequence parallelism over tensor-parallel groups."""
    paddle.set_device("cpu")
    with (
        tensor_parallel.enable_tensor_parallel_on_cpu(),
        mock.patch.object(tensor_parallel, "_is_gloo", return_value=True),
    ):
        cases = [case for case in CASES if case.name in names]
        wanted = [(tiny.weights_of(getattr(tiny, case.model)()), *trained(case, None, None)) for case in cases]
        grid = grid_of(dp_degree=1, mp_degree=2, sep_degree=2)
        return {case.name: _within(case, grid, *on_one) for case, on_one in zip(cases, wanted, strict=True)}


def _within(case, grid, weights, loss, right):
    tensor_group, group = grid.get_model_parallel_group(), grid.get_sep_parallel_group()
    local = -(-case.seq_len // 4) * 4 // 2  # this rank's part, padded to divide
    with apply_to_paddleformers(families=FAMILIES, context_parallel="gather", vision_dp=case.vision_dp):
        model = getattr(tiny, case.model)(**case.text, **tiny.tensor_parallel(2, local))
        tiny.load_weights(model, weights, tensor_group.rank, 2)
        own_loss = model(**case.batch(model)).loss
        own_loss.backward()
    tiny.sum_marked_gradients(model, tensor_group)
    grads, wanted = {}, {}
    for name, parameter in model.named_parameters():
        grad = paddle.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
        dist.all_reduce(grad, group=group)
        grads[name], wanted[name] = grad.numpy(), tiny.cut(name, right[name], tensor_group.rank, 2)
    return errors((float(own_loss), grads), (loss, wanted))


def a_wrong_plan():
    """Every feature row one position too early."""
    return mock.patch.object(own_part, "plan_visual", _turned)


def _turned(*args, **kwargs):
    plan = real_plan(*args, **kwargs)
    return VisualPlan.from_indices(plan.update_indices - 1, plan.gather_indices, plan.row_shape, plan.num_features)


real_plan = own_part.plan_visual


def positions_of_the_first():
    """Every rank takes the rotary positions of the first one."""
    own = plain.Step.own

    def wrong(self, x, fill):
        return x[..., : self.layout.local_len] if x.ndim == 3 else own(self, x, fill)

    return mock.patch.object(plain.Step, "own", wrong)


def own_means():
    """Every rank keeps the mean of its own tokens."""
    from paddle_vl_sp.formers.context import loss

    return mock.patch.object(loss, "global_mean", lambda total, count, group: (total / count, total))


FAULTS = {"a wrong plan": a_wrong_plan, "positions of the first": positions_of_the_first, "own means": own_means}


def with_faults():
    paddle.set_device("cpu")
    group, found = dist.get_group(0), {}
    wanted = of_one_process(IMAGES_CASE)
    for name, fault in FAULTS.items():
        with fault():
            found[name] = errors(trained(IMAGES_CASE, ContextParallel("gather", group=group), group), wanted)
    found["gradients not summed"] = errors(trained(IMAGES_CASE, ContextParallel("gather", group=group), None), wanted)
    return found


def on_two(kinds, names):
    return {
        "right": on_ranks(kinds, names),
        "faults": with_faults(),
        "audit": audited(),
        "cut": of_cut_ids(kinds, CUT),
        "checked": checked(),
        "arriving": rows_that_arrive(),
    }


def rows_that_arrive():
    """Of a shared tower: the rows of the main features and of each level on this rank, and those that its plan uses."""
    group, found = dist.get_group(0), []
    place = plain.replace_rows

    def placing(hidden, features, plan):
        found.append((features.shape[0], len(plan.update_indices)))
        return place(hidden, features, plan)

    with mock.patch.object(plain, "replace_rows", placing):
        trained(SHARED_CASE, ContextParallel("gather", group=group), group)
    return found


def checked():
    """With PADDLE_VL_SP_CHECK=1, under which the ranks also compare their ids."""
    group = dist.get_group(0)
    wanted = of_one_process(IMAGES_CASE)
    with mock.patch.dict(os.environ, {CHECK: "1"}):
        found = errors(trained(IMAGES_CASE, ContextParallel("gather", group=group), group), wanted)
        other = dataclasses.replace(IMAGES_CASE, samples=IMAGES[::-1]) if group.rank else IMAGES_CASE
        try:
            trained(other, ContextParallel("gather", group=group), group)
        except ValueError as error:
            return found, str(error)
    return found, "nothing was raised"


def of_cut_ids(kinds, names):
    """The batch is cut by the layout of the attention before the model gets it."""
    group, found = dist.get_group(0), {}
    for case in (case for case in CASES if case.name in names):
        wanted = of_one_process(case)
        for kind in kinds:
            setting = ContextParallel(kind, group=group, ids="cut")
            found[case.name, kind] = errors(trained(case, setting, group), wanted)
    return found


def audited():
    """What the audit says, which knows no reference: of the ranks' own gradients, and of their sums."""
    group, case = dist.get_group(0), IMAGES_CASE
    with apply_to_paddleformers(families=FAMILIES, context_parallel=ContextParallel("ring", group=group)):
        model = tiny.tiny_qwen3_vl()
        batch = case.batch(model)

        def sum_over_ranks():
            for parameter in model.parameters():
                dist.all_reduce(parameter.grad, group=group)

        found = [
            audit_gradients(lambda: model(**batch).loss, model, group, after=after) for after in (None, sum_over_ranks)
        ]
    return [sorted(set(audit.verdicts.values())) for audit in found], [audit.ok for audit in found]


def on_four(names, within):
    return {"both": of_a_product(names), "within": of_sequence_parallelism(within), "audit": audited_in_a_trainer()}


def audited_in_a_trainer():
    """What PADDLE_VL_SP_AUDIT=1 says of a trainer in the grid of two times two ranks; no forward is made."""
    args = SimpleNamespace(pipeline_model_parallel_size=1, sharding="", gradient_accumulation_steps=1)
    with mock.patch.object(logger, "warning") as warning:
        found = audit_step(SimpleNamespace(args=args, using_fleet_model=False), None, {}, None)
    return found, warning.call_args.args[0] % warning.call_args.args[1:]


def of_a_product(names):
    """Ring x Ulysses over two times two ranks."""
    paddle.set_device("cpu")
    group, found = dist.get_group(0), {}
    both = ContextParallel("both", group=group, groups=two_times_two())
    share_references(names)
    for case in (case for case in CASES if case.name in names):
        found[case.name] = errors(trained(case, both, group), of_one_process(case))
    return found
