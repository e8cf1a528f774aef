"""Context parallelism of PaddleFormers' text-only models on real ranks: one batch after the other, against one process.

Packed rows are compared with their segments, each run alone.
"""

import dataclasses
from typing import NamedTuple
from unittest import mock

import numpy as np
import paddle
import paddle.distributed as dist
from context_cases import own_means
from paddle.distributed.fleet.utils import recompute

from grid import two_times_two
from paddle_vl_sp.attention import ContextParallel, gated_delta_net_sp
from paddle_vl_sp.attention.chosen import ChosenAttention
from paddle_vl_sp.formers import apply_to_paddleformers, tiny
from text_models import BUILDERS

FAMILIES = ("qwen2", "qwen3", "qwen3_next")
RECOMPUTE = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}


@dataclasses.dataclass(frozen=True)
class Case:
    name: str
    model: str
    text: dict = dataclasses.field(default_factory=dict)
    batch: int = 2
    seq_len: int = 61
    segments: tuple = ()  # of each row: the ends of packed segments; what follows the last is padding
    labeled: int = 10**6  # the first positions, which keep their labels
    has_positions: bool = True
    recomputes: bool = False
    has_cache: bool = False  # in the configuration: upstream's recompute fails with it, so only where it is shared

    def build(self):
        if not self.recomputes:
            return BUILDERS[self.model](**self.text)
        if self.model != "qwen3_next":
            return BUILDERS[self.model](**self.text, **RECOMPUTE)
        model = BUILDERS[self.model](**self.text)  # PaddleFormers' has no recompute: here around every layer
        for layer in model.model.layers:
            layer.forward = recomputing(layer.forward)
        return model

    def arrays(self):
        """ids, labels and positions, [B, S] each."""
        drawn = tiny.draw_batch([[]] * self.batch, self.seq_len, seed=1)
        ids, labels = drawn["input_ids"].numpy(), drawn["labels"].numpy()
        positions = np.tile(np.arange(self.seq_len), (self.batch, 1))
        labels[:, self.labeled :] = -100
        for row, ends in enumerate(self.segments):
            labels[row, ends[-1] :] = -100
            for begin, end in zip((0, *ends), (*ends, self.seq_len), strict=True):
                positions[row, begin:end] -= begin
                labels[row, end - 1] = -100
        return ids, labels, positions

    def whole(self):
        """As PaddleFormers' collator packs: [B, 1, S, 1], the padding's rows are the positions themselves."""
        batch = dict(zip(("input_ids", "labels", "position_ids"), map(paddle.to_tensor, self.arrays()), strict=True))
        if not self.has_positions:
            del batch["position_ids"]
        if self.segments:
            rows = np.tile(np.arange(self.seq_len, dtype=np.int32), (self.batch, 1))
            for row, ends in zip(rows, self.segments, strict=True):
                for begin, end in zip((0, *ends), ends, strict=False):
                    row[begin:end] = end
            batch["attn_mask_startend_row_indices"] = paddle.to_tensor(rows[:, None, :, None])
        return batch

    def apart(self):
        """The same tokens, each segment a batch of its own."""
        if not self.segments:
            return [self.whole()]
        arrays = dict(zip(("input_ids", "labels", "position_ids"), self.arrays(), strict=True))
        return [
            {name: paddle.to_tensor(array[row : row + 1, begin:end]) for name, array in arrays.items()}
            for row, ends in enumerate(self.segments)
            for begin, end in zip((0, *ends), ends, strict=False)
        ]


LAYER = ("attention_mask", "past_key_values", "use_cache", "position_embeddings", "attn_mask_startend_row_indices")


def recomputing(forward):
    """As PaddleFormers' other models call their layers under recompute."""
    return lambda hidden_states, **given: recompute(forward, hidden_states, *(given.get(name) for name in LAYER))


OWN_BOUNDS = ((20, 45), (31, 40, 58))
CASES = (
    Case("Qwen3", "qwen3"),
    Case("Qwen3, no positions, full recompute", "qwen3", has_positions=False, recomputes=True, has_cache=True),
    Case("Qwen3, packed, with padding", "qwen3", segments=OWN_BOUNDS),
    Case("Qwen3, one rank without labels", "qwen3", labeled=8),
    Case("Qwen2, packed, full recompute", "qwen2", segments=OWN_BOUNDS, recomputes=True),
    Case("Qwen3 MoE, packed, full recompute", "qwen3_moe", segments=OWN_BOUNDS, recomputes=True),
    Case("Qwen3-Next", "qwen3_next"),
    Case("Qwen3-Next, packed, with padding", "qwen3_next", segments=OWN_BOUNDS),
    Case("Qwen3-Next, packed, full recompute", "qwen3_next", batch=1, segments=((7, 61),), recomputes=True),
    Case("Qwen3-Next, one rank without labels", "qwen3_next", labeled=8),
    Case("Qwen3-Next, one key head, no positions", "qwen3_next", {"linear_num_key_heads": 1}, has_positions=False),
)
BY_NAME = {case.name: case for case in CASES}
FAULTY = BY_NAME["Qwen3-Next"]


def alone(case, batches):
    """Loss and gradients of one process: the mean over the tokens of all batches."""
    model, total = case.build(), 0.0
    counts = [int((batch["labels"] != -100).sum()) for batch in batches]
    for batch, count in zip(batches, counts, strict=True):
        if count:
            loss = model(**batch)[0] * (count / sum(counts))
            loss.backward()
            total += float(loss)
    return total, gradients(model, None)


def shared(case, setting, group):
    """Loss and gradients, summed over the group."""
    with apply_to_paddleformers(families=FAMILIES, context_parallel=setting):
        model = case.build()
        model.config.use_cache = case.has_cache
        loss = model(**case.whole())[0]
        loss.backward()
    return float(loss), gradients(model, group)


def gradients(model, group):
    grads = {}
    for name, parameter in model.named_parameters():
        grad = paddle.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
        if group is not None:
            dist.all_reduce(grad, group=group)
        grads[name] = grad.numpy()
    return grads


class Errors(NamedTuple):
    """Relative but for the loss; the worst parameter's."""

    loss: float
    decay: float  # A_log and dt_bias: long sums of terms that cancel
    others: float


def errors(got, wanted):
    (loss, grads), (right_loss, right) = got, wanted
    found = {
        name: float(np.linalg.norm(grads[name] - right[name])) / (float(np.linalg.norm(right[name])) or 1.0)
        for name in right
    }
    decay = {name for name in found if name.endswith(("A_log", "dt_bias"))}
    worst = (max((found[name] for name in names), default=0.0) for names in (decay, found.keys() - decay))
    return Errors(abs(loss - right_loss), *worst)


def on_ranks(kinds):
    """Errors by case and kind, then those of upstream's own packed rows in one process, then those of faults."""
    paddle.set_device("cpu")
    group, found = dist.get_group(0), {}
    for case in CASES:
        wanted = alone(case, case.apart())
        for kind in kinds:
            found[case.name, kind] = errors(shared(case, ContextParallel(kind, group=group), group), wanted)
        if case.segments:
            found[case.name, "upstream"] = errors(alone(case, [case.whole()]), wanted)
    return found, with_faults(group, alone(FAULTY, FAULTY.apart()))


def of_a_product(names):
    """Four ranks: ring x Ulysses."""
    paddle.set_device("cpu")
    group, found = dist.get_group(0), {}
    both = ContextParallel("both", group=group, groups=two_times_two())
    for case in map(BY_NAME.get, names):
        found[case.name] = errors(shared(case, both, group), alone(case, case.apart()))
    return found


def states_of_its_own():
    """Every rank's linear attention begins with its own part of the sequence."""

    def alone(self, q, k, v, g, beta, *, conv_weight, **_):
        return gated_delta_net_sp(q, k, v, g, beta, group=None, conv_weight=conv_weight)

    return mock.patch.object(ChosenAttention, "gated_delta_net", alone)


FAULTS = {"states of its own": states_of_its_own, "own means": own_means}


def with_faults(group, wanted):
    setting, found = ContextParallel("gather", group=group), {}
    for name, fault in FAULTS.items():
        with fault():
            found[name] = errors(shared(FAULTY, setting, group), wanted)
    found["gradients not summed"] = errors(shared(FAULTY, setting, None), wanted)
    return found
