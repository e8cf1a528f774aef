"""Context parallelism of PaddleFormers' models in one process: what it refuses, and where it leaves all alone."""

from types import SimpleNamespace

import numpy as np
import paddle
import pytest
from hypothesis import given
from hypothesis import strategies as st
from paddleformers.nn.attention.interface import ALL_ATTENTION_FUNCTIONS
from paddleformers.nn.criterion.interface import CriterionLayer
from paddleformers.transformers.qwen3_vl import modeling
from training import SAMPLES, upstream_and_patched

from arrays import same_bits
from paddle_vl_sp.attention import ContextParallel
from paddle_vl_sp.formers import UpstreamChanged, apply_to_paddleformers, apply_to_qwen2_5_vl, apply_to_qwen3_vl, tiny
from paddle_vl_sp.formers.context import install, marker, setting, together
from paddle_vl_sp.formers.context.attention import INDICES
from paddle_vl_sp.formers.context.bounds import boundaries
from paddle_vl_sp.formers.context.step import Step
from paddle_vl_sp.testing import FakeGroup

TWO = ContextParallel("gather", group=FakeGroup(0, 2))


def batch_of(model, kind="image", **more):
    batch = tiny.draw_batch(SAMPLES[kind], 64)
    return batch | {"position_ids": tiny.positions(model, batch)} | more


def trained():
    model = tiny.tiny_qwen3_vl()
    loss = model(**batch_of(model)).loss
    loss.backward()
    return [loss.numpy(), *tiny.gradients_of(model).values()]


@pytest.mark.parametrize("setting", ["auto", "ring", ContextParallel("ulysses", group=FakeGroup(0, 1))], ids=str)
def test_one_rank_alone_is_upstream(setting):
    """Bit-exact: no topology, or a group of one."""
    upstream, _ = upstream_and_patched(trained)
    with apply_to_qwen3_vl(context_parallel=setting):
        assert same_bits(trained(), upstream)


def test_what_is_changed_is_put_back():
    """Attention functions, criterion, forwards: the same objects; applied twice, the second is undone alone."""
    before = dict(ALL_ATTENTION_FUNCTIONS), CriterionLayer.__dict__["forward"]
    with apply_to_qwen3_vl(context_parallel="auto") as report:
        assert "Qwen3VLForConditionalGenerationDeprecated.forward" in report.replaced
        with apply_to_qwen3_vl(context_parallel=TWO):
            assert dict(ALL_ATTENTION_FUNCTIONS) != before[0]
        assert CriterionLayer.__dict__["forward"] is not before[1]
    assert dict(ALL_ATTENTION_FUNCTIONS) == before[0]
    assert CriterionLayer.__dict__["forward"] is before[1]


def test_a_changed_criterion_is_an_error_also_when_not_strict(monkeypatch):
    """The sequence would be cut and the loss would be each rank's own."""
    monkeypatch.setattr(CriterionLayer, "forward", lambda self, logits, labels, loss_mask=None: logits.sum())
    with pytest.raises(UpstreamChanged, match=r"CriterionLayer.forward has fingerprint"):
        apply_to_qwen3_vl(strict=False, context_parallel="auto")
    apply_to_qwen3_vl(strict=False)


def test_a_changed_model_is_an_error_also_when_not_strict(monkeypatch):
    """It would train whole on every rank, and its gradients would be summed."""
    monkeypatch.setattr(modeling.Qwen3VLTextModel, "_deepstack_process", lambda self, hidden, mask, levels: hidden)
    with pytest.raises(UpstreamChanged, match=r"_deepstack_process .*; leave context_parallel out"):
        apply_to_qwen3_vl(strict=False, context_parallel="auto")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("rings", r"attention must be one of 'auto', 'gather', .* got 'rings'"),
        ("both", r'attention="both" needs groups='),
        (3, r"context_parallel must be a word or a ContextParallel, got 3"),
    ],
)
def test_a_setting_that_says_nothing(setting, message):
    with pytest.raises(ValueError, match=message):
        apply_to_qwen3_vl(context_parallel=setting)


def _without_labels(batch):
    return {key: value for key, value in batch.items() if key != "labels"}


REFUSED = {
    "attention dropout": (
        {"attention_dropout": 0.1},
        {},
        r"takes no attention dropout, got attention_dropout=0.1",
    ),
    "padding in front": ({}, {"attention_mask": "front"}, r"padding at the end of a row only"),
    "labels at padding": (
        {},
        {"attention_mask": "behind"},
        r"labels at padding, .* must be -100",
    ),
    "a mask of four axes": (
        {},
        {"attention_mask": "square"},
        r"takes an attention_mask \[B, 64\], got \[2, 1, 64, 64\]",
    ),
    "indices that pack nothing": ({}, {INDICES: "reverse"}, r"of sample 0 are no packed causal segments"),
    "indices of four bounds": ({}, {INDICES: "four"}, r"must be \[2, 1, 64, 1\] .* got \[2, 1, 64, 4\]"),
    "embeddings": ({}, {"inputs_embeds": "embeds"}, r"by its input_ids, and this batch has inputs_embeds"),
    "stages": ({"pipeline_model_parallel_size": 2}, {}, r"pipeline_model_parallel_size=2: the cut"),
    "experts": ({"expert_model_parallel_size": 2}, {}, r"expert_model_parallel_size=2 and no tensor"),
    "windows": ({"layer_types": ["sliding_attention"] * 4}, {}, r"takes no sliding windows"),
    "more tokens": ({"num_nextn_predict_layers": 1}, {}, r"takes no multi-token prediction, got num_nextn"),
}


def special(word, model):
    mask = np.ones((2, 64), dtype="int64")
    if word == "front":
        mask[0, :3] = 0
    elif word == "behind":
        mask[0, -3:] = 0
    rows = np.arange(64, dtype="int32")[::-1].reshape(1, 1, 64, 1)
    return {
        "front": lambda: mask,
        "behind": lambda: mask,
        "square": lambda: np.ones((2, 1, 64, 64), dtype="float32"),
        "reverse": lambda: np.tile(rows, (2, 1, 1, 1)),
        "four": lambda: np.zeros((2, 1, 64, 4), dtype="int32"),
        "embeds": lambda: np.zeros((2, 64, 64), dtype="float32"),
    }[word]()


@pytest.mark.parametrize("case", REFUSED)
def test_what_it_takes_not_is_refused_by_name(case):
    """Before anything is cut or sent."""
    text, more, message = REFUSED[case]
    model = tiny.tiny_qwen3_vl()
    for name, value in text.items():
        setattr(model.config.text_config, name, value)
    batch = batch_of(model)
    if case == "embeddings":
        batch = {key: value for key, value in batch.items() if "pixel" not in key and "grid" not in key}
    batch |= {name: paddle.to_tensor(special(word, model)) for name, word in more.items()}
    with apply_to_qwen3_vl(context_parallel=TWO), pytest.raises(ValueError, match=message):
        model(**batch)


def test_a_part_of_the_logits_is_refused():
    """Each rank has those of its own part."""
    model = tiny.tiny_qwen3_vl()
    with apply_to_qwen3_vl(context_parallel=TWO), pytest.raises(ValueError, match="logits_to_keep under context"):
        model(**batch_of(model), logits_to_keep=1)


def test_a_placeholder_mask_of_the_instance_is_refused():
    """Only PaddleFormers' own forward would ask it."""
    model = tiny.tiny_qwen3_vl()
    model.model.get_placeholder_mask = lambda *args, **kwargs: None
    with apply_to_qwen3_vl(context_parallel=TWO), pytest.raises(ValueError, match="has its own get_placeholder_mask"):
        model(**batch_of(model))


ALREADY_CUT = {
    "no positions": ({"position_ids": None}, r"need the position_ids of their 64 places, got none"),
    "whole positions": ({"position_ids": [3, 2, 128]}, r"of their 64 places, got \[3, 2, 128\]"),
    "a mask": ({"attention_mask": [2, 64]}, r"take no attention_mask"),
    "indices of a part": ({INDICES: [2, 1, 64, 1]}, r"of the whole row, \[1, 1, 128, 1\], got \[2, 1, 64, 1\]"),
}


@pytest.mark.parametrize("case", ALREADY_CUT)
def test_ids_that_are_cut_already_and_miss_something(case, monkeypatch):
    """All ranks of the group raise it."""
    more, message = ALREADY_CUT[case]
    monkeypatch.setattr(together, "agree_on", agreed)
    model = tiny.tiny_qwen3_vl()
    batch = batch_of(model) | {
        name: None if shape is None else paddle.ones(shape, dtype="int32") for name, shape in more.items()
    }
    setting = ContextParallel("gather", group=FakeGroup(0, 2), ids="cut")
    with apply_to_qwen3_vl(context_parallel=setting), pytest.raises(ValueError, match=message):
        model(**batch)


def agreed(numbers, error, group):
    if error is not None:
        raise error
    return np.asarray([numbers, [numbers[0], numbers[1] + 1]])


def test_ids_that_are_cut_unevenly(monkeypatch):
    """Both shapes."""
    monkeypatch.setattr(together, "agree_on", agreed)
    model = tiny.tiny_qwen3_vl()
    setting = ContextParallel("gather", group=FakeGroup(0, 2), ids="cut")
    with apply_to_qwen3_vl(context_parallel=setting), pytest.raises(ValueError, match=r"\[\[2, 64\], \[2, 65\]\]"):
        model(**batch_of(model))


def test_ids_that_no_layout_cuts_so():
    """61 places on each of two ranks: zigzag wants an even number."""
    model = tiny.tiny_qwen3_vl()
    batch = {name: x[..., :61] if x.shape[-1] == 64 else x for name, x in batch_of(model, "text").items()}
    setting = ContextParallel("gather", group=FakeGroup(0, 2), ids="cut")
    with pytest.raises(ValueError, match=r"ids of 61 places on each of 2 ranks are no cut .* of 62 places"):
        together._layout(setting, model.config.text_config, batch)


def test_an_axis_without_a_setting_is_refused(monkeypatch):
    """Upstream trains each rank on its own part alone, without a word."""
    topology = SimpleNamespace(get_sep_parallel_world_size=lambda: 2)
    monkeypatch.setattr("paddle.distributed.fleet.get_hybrid_communicate_group", lambda: topology)
    for build, apply in ((tiny.tiny_qwen3_vl, apply_to_qwen3_vl), (tiny.tiny_qwen2_5_vl, apply_to_qwen2_5_vl)):
        model = build()
        batch = tiny.draw_batch(SAMPLES["image"], 64, frames_apart=False)
        with apply(), pytest.raises(ValueError, match=r"sep_parallel_size=2 with Qwen.*PADDLE_VL_SP_CONTEXT_PARALLEL"):
            model(**batch)


def test_a_part_of_the_model_alone_is_not_cut():
    """In training its ranks' gradients would be summed all the same."""
    model = tiny.tiny_qwen3_vl()
    batch = _without_labels(batch_of(model))
    with apply_to_qwen3_vl(context_parallel=TWO), pytest.raises(ValueError, match=r"trains on a batch that is not cut"):
        model.model(**batch)


def test_evaluation_without_labels_and_generation_are_whole():
    """Bit-exact: each rank computes all of it, and nothing is sent."""
    model = tiny.tiny_qwen3_vl()
    model.eval()
    prompt = _without_labels(batch_of(model))

    def results():
        with paddle.no_grad():
            logits = model(**prompt).logits.numpy()
            tokens, _ = model.generate(**_without(prompt, "position_ids"), max_new_tokens=3)
        return logits, tokens.numpy()

    upstream = results()
    with apply_to_qwen3_vl(context_parallel=TWO):
        assert same_bits(results(), upstream)


def _without(batch, name):
    return {key: value for key, value in batch.items() if key != name}


def test_an_attention_that_came_later_is_noticed():
    """It would take the marker for row indices."""
    model = tiny.tiny_qwen3_vl()
    with apply_to_qwen3_vl(context_parallel=TWO):
        name = "of somebody"
        ALL_ATTENTION_FUNCTIONS.register(name, lambda module, q, k, v, **_: (v, None))
        model.config.text_config._attn_implementation = name
        try:
            with pytest.raises(ValueError, match=r"knows nothing of the attention 'of somebody', which is not of"):
                model(**batch_of(model, "text"))
        finally:
            ALL_ATTENTION_FUNCTIONS._global_mapping.pop(name)


def test_a_cut_that_not_everybody_saw():
    """An attention, or a criterion, of somebody's own."""
    step = Step(SimpleNamespace(), SimpleNamespace(local_len=4), (0, 1), None, 1, 8, num_layers=2)
    marker.cut_in(step.marker, "the first layer")
    with pytest.raises(ValueError, match=r"the batch of Linear, and the attention of 1 of 2 layers crossed the ranks"):
        step.require_use(paddle.nn.Linear(1, 1), has_labels=False)
    marker.cut_in(step.marker, "the second")
    step.require_use(None, has_labels=False)
    with pytest.raises(ValueError, match=r"its loss is not that of PaddleFormers' CriterionLayer"):
        step.require_use(None, has_labels=True)


@pytest.mark.parametrize("name", ["eager", "sdpa"])
def test_a_marker_is_no_mask_for_upstream(name):
    """A replay in the backward after revert() fails, and does not compute something else."""
    indices = marker.Cut(None, SimpleNamespace(local_len=4), None).marker()
    module = SimpleNamespace(training=True, config=SimpleNamespace(), is_causal=True)
    rows = paddle.rand([1, 1, 4, 8])
    with pytest.raises(ValueError, match="unpack"):
        ALL_ATTENTION_FUNCTIONS[name](module, rows, rows, rows, attn_mask_startend_row_indices=indices, scaling=1.0)


ODD = {
    "labels of another length": ({"labels": [2, 59]}, r"cuts arrays \[..., 2, 64\], as the ids are, got \[2, 59\]"),
    "positions of another length": ({"position_ids": [3, 2, 60]}, r"as the ids are, got \[3, 2, 60\]"),
    "a mask of another length": ({"attention_mask": [2, 60]}, r"an attention_mask \[B, 64\], got \[2, 60\]"),
    "indices of fewer samples": ({INDICES: [1, 1, 64, 1]}, r"must be \[2, 1, 64, 1\] .* got \[1, 1, 64, 1\]"),
}


@pytest.mark.parametrize("case", ODD)
def test_arrays_that_are_not_as_the_ids(case):
    """In one process each of them fails in its own way."""
    more, message = ODD[case]
    model = tiny.tiny_qwen3_vl()
    batch = batch_of(model, "text") | {name: paddle.ones(shape, dtype="int64") for name, shape in more.items()}
    with apply_to_qwen3_vl(context_parallel=TWO), pytest.raises(ValueError, match=message):
        model(**batch)


def test_labels_that_row_indices_hide():
    """They count in one process, where the keys of the padding see something."""
    model, rows = tiny.tiny_qwen3_vl(), np.tile(np.arange(64), (2, 1))
    rows[:, :50] = 50
    batch = batch_of(model, "text", **{INDICES: paddle.to_tensor(rows[:, None, :, None])})
    with apply_to_qwen3_vl(context_parallel=TWO), pytest.raises(ValueError, match=r"row indices hide .* must be -100"):
        model(**batch)


def test_another_label_that_is_ignored():
    model = tiny.tiny_qwen3_vl()
    model.config.text_config.ignored_index = 0
    with apply_to_qwen3_vl(context_parallel=TWO), pytest.raises(ValueError, match=r"of -100, got ignored_index=0"):
        model(**batch_of(model))


def test_a_family_that_is_not_named_is_refused():
    """Its ranks would all train on everything."""
    model = tiny.tiny_qwen3_vl()
    with apply_to_qwen2_5_vl(context_parallel=TWO), pytest.raises(ValueError, match=r"a batch that is not cut"):
        model(**batch_of(model))


def test_generation_in_training_mode_is_whole():
    """Exact: without a cache, and no gradient."""
    model = tiny.tiny_qwen3_vl()
    prompt = _without(_without_labels(batch_of(model)), "position_ids")

    def tokens():
        return model.generate(**prompt, max_new_tokens=2, use_cache=False)[0].numpy()

    upstream = tokens()
    with apply_to_qwen3_vl(context_parallel=TWO):
        assert same_bits(tokens(), upstream)


def test_an_earlier_report_cannot_be_taken_back_first():
    """The later setting needs its methods."""
    first, second = apply_to_qwen3_vl(context_parallel="auto"), apply_to_qwen3_vl(context_parallel=TWO)
    with pytest.raises(ValueError, match=r"turned on later is still on"):
        first.take_back()
    second.take_back()
    first.take_back()
    assert not setting.is_on()


def test_a_cut_that_is_forgotten(monkeypatch):
    """A backward after very many forwards."""
    monkeypatch.setattr(marker, "KEPT", 2)
    cut = marker.Cut(None, SimpleNamespace(local_len=4), None)
    first = cut.marker()
    assert marker.cut_in(first, None) is cut
    for _ in range(2):
        cut.marker()
    with pytest.raises(ValueError, match=r"is not known any more: more than 2 forwards"):
        marker.cut_in(first, None)


@pytest.mark.parametrize("indices", [None, paddle.zeros([1, 1, 4, 1], dtype="int32"), paddle.ones([0])], ids=str)
def test_row_indices_are_no_marker(indices):
    assert marker.cut_in(indices, None) is None


@given(st.lists(st.tuples(st.lists(st.integers(1, 5), max_size=4), st.integers(0, 4)), min_size=1, max_size=3))
def test_boundaries_of_packed_rows(rows):
    """Exact: segments of each row, and its padding as one more; rows one after the other."""
    length = max(sum(lengths) + padding for lengths, padding in rows) or 1
    indices, wanted = np.tile(np.arange(length), (len(rows), 1)), [0]
    for number, (lengths, _) in enumerate(rows):
        begin = 0
        for size in lengths:
            indices[number, begin : begin + size] = begin + size
            begin += size
            wanted.append(number * length + begin)
        if begin < length:
            wanted.append((number + 1) * length)
    assert boundaries(indices[:, None, :, None], length) == tuple(wanted)


@pytest.mark.parametrize("row", [[4, 3, 3, 4], [2, 3, 3, 4], [1, 3, 2, 4]])
def test_other_masks_are_refused(row):
    with pytest.raises(ValueError, match="of sample 0 are no packed causal segments"):
        boundaries(np.array(row), 4)


def test_the_trainer_leaves_the_batch_whole():
    """Its splitting along the sequence is switched off for models that cut themselves, and for no other."""
    seen = []
    args = SimpleNamespace(split_inputs_sequence_dim=True)
    get = install.whole_inputs(lambda self, inputs: seen.append(self.args.split_inputs_sequence_dim))
    with apply_to_paddleformers(families="qwen3_vl", context_parallel=TWO):
        for model in (tiny.tiny_qwen3_vl(), paddle.nn.Linear(2, 2)):
            get(SimpleNamespace(model=model, args=args), {})
    assert (seen, args.split_inputs_sequence_dim) == ([False, True], True)


@pytest.mark.parametrize("axis", [1, 2])
def test_a_family_without_context_parallelism_is_refused(monkeypatch, axis):
    """By an axis of two ranks alone as well: they would train on the whole batch each, and the gradients be summed."""
    topology = SimpleNamespace(get_sep_parallel_world_size=lambda: axis)
    monkeypatch.setattr("paddle.distributed.fleet.get_hybrid_communicate_group", lambda: topology)
    model = tiny.tiny_glm_ocr()
    with (
        apply_to_paddleformers(families="glm_ocr", context_parallel=TWO if axis == 1 else None),
        pytest.raises(ValueError, match=r"GlmOcrModel has no context parallelism: leave sep_parallel_size and"),
    ):
        model(**tiny.draw_batch([["image"]], 64))


def test_what_was_chosen_is_said_once_for_each_kind(monkeypatch):
    """Its reason has figures of the batch's length, which differ from batch to batch."""
    said = []
    monkeypatch.setattr(setting.logger, "info", lambda *args: said.append(args[0] % args[1:]))
    monkeypatch.setattr(setting, "_said", set())
    for length in (64, 128000):
        setting.say_once(ContextParallel("auto", group=FakeGroup(0, 2)).choose(4, 4, length))
    setting.say_once(TWO.choose(4, 4, 64))
    assert [line.partition(":")[0] for line in said] == [
        "context parallelism, ulysses over 2 ranks",
        "context parallelism, gather over 2 ranks",
    ]
