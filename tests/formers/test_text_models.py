"""The text-only models in one process: upstream's where nothing is cut, and what context parallelism refuses."""

from types import SimpleNamespace

import paddle
import pytest
from training import module_of

from arrays import same_bits
from paddle_vl_sp.attention import ContextParallel
from paddle_vl_sp.formers import apply_to_paddleformers, apply_to_qwen3_next, tiny
from paddle_vl_sp.formers.contracts.ranks import as_rank
from paddle_vl_sp.formers.families import qwen3_next, text
from paddle_vl_sp.testing import FakeGroup
from text_models import BUILDERS

NAMES = ("qwen2", "qwen3", "qwen3_next")
TWO = ContextParallel("gather", group=FakeGroup(0, 2))


def batch_of(**more):
    return tiny.draw_batch([[], []], 24) | more


def trained(build):
    model = build()
    loss = model(**batch_of())[0]
    loss.backward()
    return [loss.numpy(), *tiny.gradients_of(model).values()]


@pytest.mark.parametrize("setting", [None, "auto", ContextParallel("ulysses", group=FakeGroup(0, 1))], ids=str)
@pytest.mark.parametrize("model", BUILDERS)
def test_one_rank_alone_is_upstream(model, setting):
    """Bit-exact: no setting, no topology, or a group of one."""
    upstream = trained(BUILDERS[model])
    with apply_to_paddleformers(families=NAMES, context_parallel=setting):
        assert same_bits(trained(BUILDERS[model]), upstream)


@pytest.mark.parametrize("model", BUILDERS)
def test_evaluation_without_labels_is_whole(model):
    """Bit-exact: each rank computes all of it, and nothing is sent."""
    model = BUILDERS[model]()
    model.eval()
    ids = batch_of()["input_ids"]

    def logits():
        with paddle.no_grad():
            return [model(ids, return_dict=True).logits.numpy()]

    upstream = logits()
    with apply_to_paddleformers(families=NAMES, context_parallel=TWO):
        assert same_bits(logits(), upstream)


@pytest.mark.parametrize("model", BUILDERS)
def test_an_axis_without_a_setting_is_refused(model, monkeypatch):
    """Upstream trains each rank on its own part alone, without a word."""
    topology = SimpleNamespace(get_sep_parallel_world_size=lambda: 2)
    model = BUILDERS[model]()
    monkeypatch.setattr("paddle.distributed.fleet.get_hybrid_communicate_group", lambda: topology)
    with apply_to_paddleformers(families=NAMES), pytest.raises(ValueError, match=r"sep_parallel_size=2 with Qwen"):
        model(**batch_of())


@pytest.mark.parametrize("model", BUILDERS)
def test_a_part_of_the_model_alone_is_not_cut(model):
    """In training its ranks' gradients would be summed all the same."""
    model = BUILDERS[model]()
    told = pytest.raises(ValueError, match=r"trains on a batch that is not cut")
    with apply_to_paddleformers(families=NAMES, context_parallel=TWO), told:
        model.model(batch_of()["input_ids"])


@pytest.mark.parametrize(
    ("settings", "more", "message"),
    [
        ({"output_router_logits": True}, {}, r"takes no loss of the router, got output_router_logits=True: turn"),
        ({}, {"output_router_logits": True}, r"takes no loss of the router, got output_router_logits: leave it out"),
        ({"sequence_parallel": True}, {}, r"takes no sequence_parallel with linear attention"),
    ],
)
def test_what_it_takes_not_is_refused_by_name(settings, more, message):
    """Before anything is cut or sent."""
    model = BUILDERS["qwen3_next"]()
    for name, value in settings.items():
        setattr(model.config, name, value)
    with apply_to_qwen3_next(context_parallel=TWO), pytest.raises(ValueError, match=message):
        model(**batch_of(**more))


def test_a_length_that_is_not_this_ranks_part_is_refused():
    """The plain classes shape the rows of their attention by max_sequence_length under sequence parallelism."""
    model = BUILDERS["qwen3"]()
    parallel = {"tensor_model_parallel_size": 2, "sequence_parallel": True, "max_sequence_length": 24}
    for name, value in parallel.items():
        setattr(model.config, name, value)
    told = pytest.raises(ValueError, match=r"need max_sequence_length=12, this rank's part .* of 24, got 24")
    with apply_to_paddleformers(families="qwen3", context_parallel=TWO), as_rank(0, 2), told:
        model(**batch_of())


def test_what_is_changed():
    """Nothing but one forward each until a sequence is to be cut; Qwen3-Next alone by its own function."""
    model_forward, *cut = (method.name for method in qwen3_next.FAMILY.methods(is_cut=True))
    with apply_to_qwen3_next() as report:
        assert report.replaced == [model_forward]
    with apply_to_qwen3_next(context_parallel="auto") as report:
        assert report.replaced == [model_forward, *cut]
    module = module_of(text.QWEN3)
    before = module.Qwen3Model.forward
    with apply_to_paddleformers(families="qwen3"):
        assert module.Qwen3Model.forward is not before
    assert module.Qwen3Model.forward is before
