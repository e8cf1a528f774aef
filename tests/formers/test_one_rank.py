"""On one rank, where upstream is right: losses, gradients, logits and tokens are equal bit for bit."""

from unittest import mock

import numpy as np
import paddle
import pytest
from paddleformers.transformers.qwen3_vl import modeling
from training import BUILDERS, SAMPLES, batches, loss_of, recomputed, train, upstream_and_patched

from arrays import same_bits
from paddle_vl_sp.backends import dispatch
from paddle_vl_sp.comm import collectives
from paddle_vl_sp.formers import apply_to_qwen3_vl, text_levels, tiny
from paddle_vl_sp.testing import FakeGroup

FEW = 5  # one batch of every kind


@pytest.mark.parametrize("family", BUILDERS)
def test_twenty_training_steps(family):
    """Bit-exact: loss and every parameter gradient of 20 AdamW steps; images, videos, several a sample, text, B 1-4."""
    given = batches(20)
    assert {batch["input_ids"].shape[0] for batch in given} == {1, 2, 3, 4}
    upstream, patched = upstream_and_patched(lambda: train(BUILDERS[family](), given))
    for step, (wanted, got) in enumerate(zip(upstream, patched, strict=True)):
        assert same_bits(wanted, got), f"step {step}"
    assert len(upstream[0][1]) > len(upstream[3][1]), "the text-only batch gives the tower no gradient"
    assert upstream[0][0] > upstream[15][0] > 0, "it learns"


def frozen(part, family):
    model = BUILDERS[family]()
    for parameter in getattr(model, part).parameters():
        parameter.stop_gradient = True
    return model


VARIANTS = {
    "frozen language model": lambda family: frozen("language_model", family),
    "frozen tower": lambda family: frozen("visual", family),
    "full recompute": lambda family: recomputed(BUILDERS[family]()),
}


@pytest.mark.parametrize("family", BUILDERS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_variants(variant, family):
    """Bit-exact: five training steps of each."""
    upstream, patched = upstream_and_patched(lambda: train(VARIANTS[variant](family), batches(FEW)))
    assert same_bits(upstream, patched)


def test_recompute_is_real_and_changes_nothing():
    """Bit-exact: with and without; the layers run twice."""
    from paddleformers.transformers.qwen3_vl.modeling import Qwen3VLTextDecoderLayer as Layer

    runs = []
    handle = Layer.forward

    def counted(self, *args, **kwargs):
        runs.append(None)
        return handle(self, *args, **kwargs)

    with apply_to_qwen3_vl():
        plain = train(tiny.tiny_qwen3_vl(), batches(1))
        Layer.forward = counted
        try:
            again = train(recomputed(tiny.tiny_qwen3_vl()), batches(1))
        finally:
            Layer.forward = handle
    assert same_bits(plain, again)
    assert len(runs) == 2 * tiny.TEXT["num_hidden_layers"]


def test_data_parallel_training_is_not_told_that_a_group_is_missing():
    """No warning in one process of two without sequence parallelism, where there is nothing to sum."""
    with (
        apply_to_qwen3_vl(),
        mock.patch.object(collectives, "logger") as logger,
        mock.patch.multiple(collectives.dist, is_initialized=lambda: True, get_world_size=lambda *_: 2),
    ):
        loss_of(tiny.tiny_qwen3_vl(), batches(1)[0]).backward()
    logger.warning.assert_not_called()


@pytest.mark.parametrize("tower", ["float32", "float64"])
def test_gradient_accumulation(tower):
    """Bit-exact: gradients summed over four batches; also of a float64 tower under a float32 language model."""

    def accumulate():
        model = tiny.tiny_qwen3_vl()
        model.visual.to(dtype=tower)
        for batch in batches(4):
            loss_of(model, batch).backward()
        return tiny.gradients_of(model)

    upstream, patched = upstream_and_patched(accumulate)
    assert same_bits(upstream, patched)
    assert upstream["model.visual.merger.linear_fc2.weight"].dtype == tower


def test_lora():
    """Bit-exact: loss and adapter gradients; the keys of the state dict are the same."""
    from paddleformers.peft import LoRAConfig, LoRAModel

    targets = [".*language_model.*qkv_proj.*", ".*visual.*qkv.*", ".*visual.*linear_fc.*"]

    def run():
        paddle.seed(3)
        model = LoRAModel(tiny.tiny_qwen3_vl(), LoRAConfig(target_modules=targets, r=4, lora_alpha=8))
        model.mark_only_lora_as_trainable()
        model.train()
        loss = model(**batches(1)[0]).loss
        loss.backward()
        return float(loss), tiny.gradients_of(model), sorted(model.state_dict())

    upstream, patched = upstream_and_patched(run)
    assert same_bits(upstream[:2], patched[:2])
    assert upstream[2] == patched[2]
    assert len(upstream[1]) > 20


@pytest.mark.parametrize("family", BUILDERS)
def test_state_dict_keys(family):
    """The same keys in the same order, of a model that is built and has made a step upstream, and patched."""

    def run():
        model = BUILDERS[family]()
        train(model, batches(1))
        return list(model.state_dict())

    upstream, patched = upstream_and_patched(run)
    assert upstream == patched


@pytest.mark.parametrize(
    ("family", "kind"), [("dense", "image"), ("dense", "several"), ("dense", "video"), ("moe", "several")]
)
def test_eval_and_generate(family, kind):
    """Bit-exact: logits; tokens with and without cache, of a model that was built before the classes were replaced."""
    model = BUILDERS[family]()
    model.eval()
    batch = tiny.draw_batch(SAMPLES[kind], seed=4)
    prompt = {key: value for key, value in batch.items() if key != "labels"}

    @paddle.no_grad()
    def run():
        tokens = [
            model.generate(**prompt, max_new_tokens=4, use_cache=cache, decode_strategy="greedy_search")[0].numpy()
            for cache in (True, False)
        ]
        return [*tokens, model(**batch).logits.numpy()]

    upstream, patched = upstream_and_patched(run)
    assert same_bits(upstream, patched)


def ways_to_call(model, batch):
    """The forward with everything that callers pass besides."""
    ids = batch["input_ids"]
    padded = paddle.ones_like(ids)
    padded[0, :7] = 0
    packed = paddle.concat([paddle.arange(64)[None, None].expand([1, ids.shape[0], 64]), tiny.positions(model, batch)])
    embeds = model.get_input_embeddings()(ids)
    yield model(**batch).loss
    yield model(**batch, attention_mask=padded).loss
    yield model(**batch, position_ids=packed).loss
    yield model(**batch, output_hidden_states=True).hidden_states[2]
    yield model(**batch, use_cache=True).logits
    yield model(**{**batch, "inputs_embeds": embeds}).loss
    yield model(**{**batch, "inputs_embeds": embeds, "input_ids": None}, position_ids=tiny.positions(model, batch)).loss
    inner = {key: value for key, value in batch.items() if key not in ("labels", "input_ids")}
    yield model.model(ids, None, tiny.positions(model, batch), **inner)[0]  # positionally
    yield model.model(input_ids=ids, return_dict=False, **inner)[0]


def test_ways_to_call():
    """Bit-exact: masks, packed positions, given embeddings, with or without ids, positional, tuples."""
    model = tiny.tiny_qwen3_vl()
    model.eval()
    batch = tiny.draw_batch(SAMPLES["several"], seed=6)

    @paddle.no_grad()
    def run():
        return [value.numpy() for value in ways_to_call(model, batch)]

    upstream, patched = upstream_and_patched(run)
    assert same_bits(upstream, patched)


def test_masks_handed_to_the_text_model_by_others(monkeypatch):
    """Bit-exact: whoever calls the text model with mask and levels gets upstream's result, from one plan."""
    plans, build = [], dispatch.build_plan
    monkeypatch.setattr(dispatch, "build_plan", lambda *args: (plans.append(None), build(*args))[1])
    model = tiny.tiny_qwen3_vl()
    batch = tiny.draw_batch(SAMPLES["several"], seed=6)
    mask = batch["input_ids"] == tiny.IMAGE
    levels = [paddle.rand([int(mask.sum()), 64]) for _ in range(3)]

    def run():
        text = model.language_model(batch["input_ids"], visual_pos_masks=mask, deepstack_visual_embeds=levels)[0]
        return text.numpy()

    upstream, patched = upstream_and_patched(run)
    assert same_bits(upstream, patched)
    assert len(plans) == 1


class OwnText(modeling.Qwen3VLTextModel):
    """Takes some by name, and hands all on."""

    def forward(self, input_ids=None, inputs_embeds=None, visual_pos_masks=None, deepstack_visual_embeds=None, **known):
        return super().forward(
            input_ids=input_ids,
            inputs_embeds=inputs_embeds,
            visual_pos_masks=visual_pos_masks,
            deepstack_visual_embeds=deepstack_visual_embeds,
            **known,
        )


class OwnMask(modeling.Qwen3VLModelDeprecated):
    asked = 0

    def get_placeholder_mask(self, *args, **kwargs):
        OwnMask.asked += 1
        return super().get_placeholder_mask(*args, **kwargs)


class Narrow(modeling.Qwen3VLTextModel):
    """Hands on what PaddleFormers' model hands over, by name, and nothing else."""

    HANDED_OVER = ("input_ids", "position_ids", "attention_mask", "past_key_values", "inputs_embeds")
    VISUAL = ("visual_pos_masks", "deepstack_visual_embeds")

    def forward(self, **named):
        known = {name: named.get(name) for name in (*self.HANDED_OVER, *self.VISUAL)}
        return super().forward(**known, return_dict=True)


class OwnAddition(modeling.Qwen3VLTextModel):
    """Adds in its own way, by the mask that PaddleFormers hands it."""

    def _deepstack_process(self, hidden_states, visual_pos_masks, visual_embeds):
        assert visual_pos_masks.dtype == paddle.bool
        assert visual_pos_masks.ndim == 2
        return super()._deepstack_process(hidden_states, visual_pos_masks, 2 * visual_embeds)


class Deaf(modeling.Qwen3VLTextModel):
    def forward(self, inputs_embeds=None, **_):
        return modeling.BaseModelOutputWithPast(last_hidden_state=self.norm(inputs_embeds))


@pytest.mark.parametrize("kind", ["several", "both"])
@pytest.mark.parametrize("target", ["Qwen3VLTextModel", "Qwen3VLModelDeprecated"])
def test_wrappers_put_over_ours_change_nothing(target, kind, monkeypatch):
    """Bit-exact: a timer, say, that knows nothing of us and keeps no attributes.

    PaddleFormers' metaclass drops return_dict on the way to it, with us or without.
    """
    batch = tiny.draw_batch(SAMPLES[kind], 96, seed=3)
    model = tiny.tiny_qwen3_vl()
    with apply_to_qwen3_vl():
        wanted = float(loss_of(model, batch))
        owner = getattr(modeling, target)
        inner = owner.forward
        monkeypatch.setattr(
            owner, "forward", lambda self, *a, **named: inner(self, *a, **{**named, "return_dict": True})
        )
        assert float(loss_of(model, batch)) == wanted
        monkeypatch.undo()


def test_a_text_model_that_never_calls_paddleformers():
    """As upstream on one rank, bit for bit; under sequence parallelism an error, since no gradient is completed."""
    model, batch = tiny.tiny_qwen3_vl(), batches(1)[0]
    model.language_model.__class__ = Deaf
    wanted = float(loss_of(model, batch))
    with apply_to_qwen3_vl():
        assert float(loss_of(model, batch)) == wanted
        model.language_model.config.sequence_parallel = True
        with pytest.raises(ValueError, match="the forward of Deaf did not reach PaddleFormers' own"):
            loss_of(model, batch)


def test_an_error_on_the_way_leaves_nothing_behind(monkeypatch):
    """Bit-exact: the next forward of the same model, of text after images, is that of a model without the error."""
    text = tiny.draw_batch(SAMPLES["text"])
    with apply_to_qwen3_vl():
        wanted = float(loss_of(tiny.tiny_qwen3_vl(), text))
        model = tiny.tiny_qwen3_vl()
        before = set(vars(model.language_model))

        def fail(*args, **named):
            raise ZeroDivisionError

        monkeypatch.setattr(modeling.Qwen3VLTextModel, "forward", fail)  # over ours, which never runs
        with pytest.raises(ZeroDivisionError):
            loss_of(model, batches(1)[0])
        monkeypatch.undo()
        assert set(vars(model.language_model)) == before
        assert float(loss_of(model, text)) == wanted


@pytest.mark.parametrize("part", [OwnText, Narrow, OwnMask, OwnAddition])
def test_subclasses_with_methods_of_their_own_are_asked(part):
    """Bit-exact; deepstack is added by plan all the same, but where it is the addition that is theirs."""

    def run():
        model = tiny.tiny_qwen3_vl()
        (model.model if part is OwnMask else model.language_model).__class__ = part
        return train(model, batches(2))

    OwnMask.asked = 0
    upstream, patched = upstream_and_patched(run)
    assert same_bits(upstream, patched)
    assert any("deepstack" in name for name in patched[0][1])
    assert OwnMask.asked == (4 if part is OwnMask else 0)


def test_what_hooks_keep_stays_as_it_was():
    """Bit-exact: the outputs of the layers, and the gradients of a loss on one of them (distillation)."""

    def run():
        model, kept = tiny.tiny_qwen3_vl(), []
        for layer in model.language_model.layers:
            layer.register_forward_post_hook(lambda _layer, _inputs, output: kept.append(output[0]))
        loss = loss_of(model, batches(1)[0]) + (kept[0] ** 2).mean()
        loss.backward()
        return [output.numpy() for output in kept], tiny.gradients_of(model)

    assert same_bits(*upstream_and_patched(run))


def test_a_second_backward_and_gradients_of_a_part():
    """Bit-exact: retain_graph, and paddle.grad of a few parameters."""

    def run():
        model = tiny.tiny_qwen3_vl()
        loss = loss_of(model, batches(1)[0])
        part = list(model.model.visual.deepstack_merger_list[0].parameters())
        of_part = [grad.numpy() for grad in paddle.grad(loss, part, retain_graph=True)]
        loss.backward(retain_graph=True)
        loss.backward()
        return of_part, tiny.gradients_of(model)

    assert same_bits(*upstream_and_patched(run))


def test_too_few_features():
    """An error with both numbers, before anything is computed."""
    batch = tiny.draw_batch([["image"], ["image"]], seed=1)
    batch["input_ids"][0, 60] = tiny.IMAGE
    visual = int((batch["input_ids"] == tiny.IMAGE).sum())
    model = tiny.tiny_qwen3_vl()
    with apply_to_qwen3_vl(), pytest.raises(ValueError, match=f"has {visual} visual tokens but {visual - 1} feature"):
        loss_of(model, batch)


@pytest.mark.parametrize("ranks", [[0, 1], [4, 5], [5, 4]])
@pytest.mark.parametrize("rank", [0, 1])
def test_the_rank_within_the_group_says_which_rows(monkeypatch, rank, ranks):
    """Exact: the group's place counts, not a global rank; of the flattened batch, as the plain classes cut it."""
    mask = np.random.default_rng(0).random((2, 8)) < 0.5
    number, own = int(mask.sum()), slice(8 * rank, 8 * rank + 8)
    monkeypatch.setattr("paddle.distributed.get_rank", lambda *_: ranks[rank])
    levels, group = [paddle.ones([number, 3])], FakeGroup(rank, 2, ranks)
    plan, _ = text_levels._of_this_rank(paddle.to_tensor(mask), levels, group, is_own_part=False)
    assert plan.row_shape == (1, 8)
    assert plan.update_indices.tolist() == np.flatnonzero(mask.ravel()[own]).tolist()
    assert plan.gather_indices.tolist() == (np.cumsum(mask) - 1)[own][mask.ravel()[own]].tolist()


def test_sequence_parallel_without_a_group():
    """An error with the mend, not a guess."""
    model = tiny.tiny_qwen3_vl()
    model.config.text_config.sequence_parallel = True
    with apply_to_qwen3_vl(), pytest.raises(ValueError, match=r"no tensor-parallel group: call .*fleet\.init with"):
        loss_of(model, tiny.draw_batch(SAMPLES["image"]))


def under_amp_o1():
    model = tiny.tiny_qwen3_vl()
    with paddle.amp.auto_cast(level="O1", dtype="bfloat16"):
        return model, loss_of(model, batches(1)[0])


def under_amp_o2():
    model = paddle.amp.decorate(tiny.tiny_qwen3_vl(), level="O2", dtype="bfloat16")
    with paddle.amp.auto_cast(level="O2", dtype="bfloat16"):
        return model, loss_of(model, batches(1)[0])


def with_a_float32_tower_under_a_bfloat16_model():
    model = tiny.tiny_qwen3_vl()
    model.bfloat16()
    model.visual.float()
    return model, loss_of(model, batches(1)[0])


@pytest.mark.parametrize(
    "forward", [under_amp_o1, under_amp_o2, with_a_float32_tower_under_a_bfloat16_model], ids=lambda f: f.__name__
)
def test_mixed_precision_on_a_gpu(forward):
    """Bit-exact, where there is a device for it."""
    if not paddle.is_compiled_with_cuda() or not paddle.device.cuda.device_count():
        pytest.skip("no CUDA device: on the CPU AMP does nothing and bfloat16 has no kernels for this model")
    paddle.set_device("gpu")

    def run():
        model, loss = forward()
        loss.backward()
        return float(loss), tiny.gradients_of(model)

    upstream, patched = upstream_and_patched(run)
    assert same_bits(upstream, patched)
