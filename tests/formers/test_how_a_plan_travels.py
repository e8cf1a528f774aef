"""From the model's forward to its text model's: in recompute, twice, in threads, past wrappers and overrides."""

import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import paddle
import pytest
from paddleformers.transformers.qwen3_vl import modeling
from training import SAMPLES, loss_of

from paddle_vl_sp.carried import OfMask
from paddle_vl_sp.formers import apply_to_qwen3_vl, tiny
from text_wrappers import Recomputed, RecomputedOtherwise, Twice, Wrapped, wrap

pytestmark = pytest.mark.usefixtures("implementation")


def trained(wrapper, kind, patched):
    """Loss and every gradient."""
    model = wrap(tiny.tiny_qwen3_vl(), wrapper)
    batch = tiny.draw_batch(SAMPLES[kind], seed=3)

    def run():
        loss = loss_of(model, batch)
        loss.backward()
        return float(loss), {name: p.grad.numpy() for name, p in model.named_parameters() if p.grad is not None}

    if not patched:
        return run()
    with apply_to_qwen3_vl():
        return run()


def assert_same(got, wanted):
    assert got[0] == wanted[0]
    assert got[1].keys() == wanted[1].keys()
    for name, grad in wanted[1].items():
        assert np.array_equal(got[1][name], grad), name


@pytest.mark.parametrize("wrapper", [Recomputed, RecomputedOtherwise])
def test_recompute_around_the_text_model(wrapper):
    """Bit-exact: loss and the gradient of every parameter, as upstream's under the same wrapper."""
    wanted = trained(wrapper, "several", patched=False)
    assert_same(trained(wrapper, "several", patched=True), wanted)


@pytest.mark.parametrize("wrapper", [Wrapped, Twice])
@pytest.mark.parametrize("kind", ["image", "several", "video"])
def test_wrappers_around_the_text_model(wrapper, kind):
    """Bit-exact, with the text model run once or twice, and also under PADDLE_VL_SP_CHECK=1."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PADDLE_VL_SP_CHECK", "1")
        assert_same(trained(wrapper, kind, patched=True), trained(wrapper, kind, patched=False))


def test_one_model_in_several_threads():
    """Bit-exact: no result has another request's features. Threads change often, and positions are computed inside."""
    model = tiny.tiny_qwen3_vl()
    model.eval()
    batches = [tiny.draw_batch(SAMPLES[kind], seed=seed) for seed in range(6) for kind in ("image", "several")]

    def run(i):
        with paddle.no_grad():
            return float(model(**batches[i]).loss)

    interval = sys.getswitchinterval()
    with apply_to_qwen3_vl():
        wanted = [run(i) for i in range(len(batches))]
        sys.setswitchinterval(1e-5)
        try:
            with ThreadPoolExecutor(4) as pool:
                assert list(pool.map(run, [*range(len(batches))] * 4)) == wanted * 4
        finally:
            sys.setswitchinterval(interval)


def test_a_deepstack_method_of_the_instance():
    """Upstream calls it with its mask and so do we; bit-exact."""
    model = tiny.tiny_qwen3_vl()
    text, seen = model.model.language_model, []
    original = modeling.Qwen3VLTextModel._deepstack_process

    def own(hidden_states, visual_pos_masks, visual_embeds):
        seen.append(visual_pos_masks)
        return original(text, hidden_states, visual_pos_masks, visual_embeds)

    text._deepstack_process = own
    batch = tiny.draw_batch(SAMPLES["several"], seed=3)
    wanted = float(loss_of(model, batch))
    with apply_to_qwen3_vl():
        assert float(loss_of(model, batch)) == wanted
    assert all(isinstance(mask, paddle.Tensor) and mask.dtype == paddle.bool for mask in seen)
    assert len(seen) == 6


def test_a_placeholder_mask_of_the_instance():
    """It decides where the features go, as upstream: here one place to the right; bit-exact."""
    model = tiny.tiny_qwen3_vl()
    inner, batch = model.model, tiny.draw_batch(SAMPLES["several"], seed=3)
    elsewhere, original = float(loss_of(model, batch)), inner.get_placeholder_mask
    inner.get_placeholder_mask = lambda *args, **named: tuple(
        paddle.roll(mask.astype("int32"), 1, axis=1).astype("bool") for mask in original(*args, **named)
    )
    wanted = float(loss_of(model, batch))
    assert wanted != elsewhere
    with apply_to_qwen3_vl():
        assert float(loss_of(model, batch)) == wanted


def hooked(change):
    """A model whose text model's pre-hook changes what it is handed."""
    model = tiny.tiny_qwen3_vl()
    model.model.language_model.register_forward_pre_hook(
        lambda layer, args, named: (args, change(dict(named))), with_kwargs=True
    )
    return model


def flipped_in_place(named):
    mask = named["visual_pos_masks"]
    paddle.assign(mask.flip(1), output=mask)
    return named


def cleared_in_place(named):
    """The first sample loses its visual tokens, and the levels their rows."""
    mask = named["visual_pos_masks"]
    gone = int(mask[0].sum())
    mask[0] = False
    return named | {"deepstack_visual_embeds": [level[gone:] for level in named["deepstack_visual_embeds"]]}


def another_mask(named):
    return named | {"visual_pos_masks": named["visual_pos_masks"].flip(1)}


@pytest.mark.parametrize("change", [flipped_in_place, cleared_in_place, another_mask])
def test_a_mask_that_was_changed_on_the_way(change):
    """Bit-exact: the text model follows the mask that it gets, and not the plan of what it was."""
    batch = tiny.draw_batch(SAMPLES["several"], seed=3)
    wanted = float(loss_of(hooked(change), batch))
    with apply_to_qwen3_vl():
        assert float(loss_of(hooked(change), batch)) == wanted


def test_a_transposed_view_is_another_mask():
    """The same memory and shape, other strides."""
    mask = paddle.to_tensor(np.eye(4, k=1) > 0)
    known = OfMask(mask)
    assert known.is_for(mask)
    assert known.is_for(mask.detach())
    assert not known.is_for(mask.t())
    assert not known.is_for(mask.clone())


def test_a_tower_without_deepstack():
    """None for the levels, as an override may return: upstream runs it, bit for bit."""
    model, batch = tiny.tiny_qwen3_vl(), tiny.draw_batch(SAMPLES["image"], seed=3)
    original = model.model.get_image_features
    model.model.get_image_features = lambda *args: (original(*args)[0], None)
    wanted = float(loss_of(model, batch))
    with apply_to_qwen3_vl():
        assert float(loss_of(model, batch)) == wanted
