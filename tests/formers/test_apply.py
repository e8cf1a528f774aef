"""Applying and taking back: which methods are replaced, when they are left alone, and what is said about it."""

import importlib
import inspect
import logging
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import paddle
import paddleformers
import pytest
from paddleformers.transformers.qwen3_vl import modeling
from training import SAMPLES, importable, loss_of, modeling_fleet, module_of, moe_modeling

from paddle_vl_sp.formers import (
    PatchReport,
    UpstreamChanged,
    apply_to_paddleformers,
    apply_to_qwen2_5_vl,
    apply_to_qwen3_vl,
    fleet_copy,
    norms,
    revert,
    shared_tower,
    tiny,
    unread,
)
from paddle_vl_sp.formers.families import FAMILIES, NOT_SUPPORTED, QWEN3_VL
from paddle_vl_sp.formers.known import OURS, fingerprint, formers_version

ROOT = Path(__file__).parents[2]
MODULES = {"Qwen3-VL": modeling, "Qwen3-VL MoE": moe_modeling, "Qwen3-VL fleet": modeling_fleet}


def methods():
    """(class, method, Replaced) of all families."""
    return [
        (getattr(MODULES[family.name], method.name.partition(".")[0]), method.name.partition(".")[2], method)
        for family in QWEN3_VL
        for method in family.replaced
    ]


def functions():
    return [owner.__dict__[method] for owner, method, _ in methods()]


def test_revert_restores_the_very_same_functions():
    """Identity, of all methods."""
    before = functions()
    apply_to_qwen3_vl()
    assert all(hasattr(function, OURS) for function in functions())
    revert()
    assert all(a is b for a, b in zip(before, functions(), strict=True))
    assert len(before) == 11


def test_applying_twice_changes_nothing_more():
    """Identity; the second report says so, and its context gives back only what it took, which is nothing."""
    first = apply_to_qwen3_vl()
    once = functions()
    with apply_to_qwen3_vl() as second:
        assert all(a is b for a, b in zip(once, functions(), strict=True))
        assert first.replaced == second.replaced
        assert {line.why for line in second.lines if line.state == "replaced"} == {"was already"}
    assert all(a is b for a, b in zip(once, functions(), strict=True))


def test_context_manager_takes_back():
    """Identity, also after an error inside."""
    before = functions()
    with pytest.raises(ZeroDivisionError), apply_to_qwen3_vl():
        raise ZeroDivisionError
    assert all(a is b for a, b in zip(before, functions(), strict=True))


def test_families_by_name():
    """One or several, each once; an unknown one is an error that names those that are known."""
    report = apply_to_paddleformers(families="qwen3_vl")
    assert len(report.replaced) == len(set(report.replaced)) >= 11
    revert()
    assert apply_to_paddleformers(families=["qwen3_vl", "qwen3_vl"]) == report
    revert()
    assert apply_to_qwen2_5_vl().replaced == ["Qwen2_5_VLModel.forward"]
    revert()
    text_only = [f"{name}Model.forward" for name in ("Qwen2", "Qwen3", "Qwen3Moe", "Qwen3Next")]
    others = ["Qwen2_5_VLModel.forward", "GlmOcrModel.forward", *text_only]
    assert apply_to_paddleformers().replaced == [*report.replaced, *others]
    revert()
    assert not apply_to_paddleformers(families=()).replaced
    with pytest.raises(ValueError, match="families: qwen3_5 is not supported, it merges by itself"):
        apply_to_paddleformers(families="qwen3_5")
    with pytest.raises(ValueError, match=r"families must be one of 'qwen3_vl', .* got 'qwen4_vl'"):
        apply_to_paddleformers(families=["qwen3_vl", "qwen4_vl"])


def test_report_is_a_value_that_reads():
    """Every method by name; equal reports are equal."""
    report = apply_to_qwen3_vl()
    for _, _, method in methods():
        assert method.name in report.replaced
        assert method.name in str(report)
    assert isinstance(report, PatchReport)
    revert()
    assert apply_to_qwen3_vl() == report


def test_what_is_not_supported_is_in_the_report():
    """By name and with the reason, in the table, not in the log's line; modules that PaddleFormers has."""
    report = apply_to_paddleformers()
    named = set(report.names("not supported")) - {fleet_copy.COPY}  # of the PaddleFleet that is installed
    assert named == {f"paddleformers.transformers.{name}" for name in NOT_SUPPORTED}
    for name, why in NOT_SUPPORTED.items():
        assert why in str(report)
        assert why not in report.in_a_line()
        assert (Path(paddleformers.__file__).parent / "transformers" / name).is_dir()
    assert not set(NOT_SUPPORTED) & set(FAMILIES)


def test_models_built_before_and_after_are_alike():
    """A batch with image and video, which upstream refuses, passes through both; after revert it is refused again."""
    batch = tiny.draw_batch(SAMPLES["both"], seed=1)
    before = tiny.tiny_qwen3_vl()
    apply_to_qwen3_vl()
    after = tiny.tiny_qwen3_vl()
    assert float(loss_of(before, batch)) == float(loss_of(after, batch))
    revert()
    for model in (before, after):
        with pytest.raises(TypeError, match="new_zeros"):
            loss_of(model, batch)


def test_signatures_are_kept():
    """What inspects a forward sees upstream's parameters."""
    before = [inspect.signature(function) for function in functions()]
    apply_to_qwen3_vl()
    assert [inspect.signature(function) for function in functions()] == before


def test_fingerprints_are_those_of_the_known_version():
    """Each table entry matches PaddleFormers 1.2.0, and each replaced method has one."""
    if formers_version() != "1.2.0":
        pytest.skip(f"the table is for PaddleFormers 1.2.0, this is {formers_version()}")
    for owner, name, method in methods():
        assert fingerprint(owner.__dict__[name]) in method.sources
    for family in QWEN3_VL:
        with importable(family):
            assert not list(family.deviations(module_of(family), is_shared=True, is_cut=True))


def changed_deepstack(self, hidden_states, visual_pos_masks, visual_embeds):
    return hidden_states


@pytest.fixture(params=["ours", "upstream's"])
def changed(request, monkeypatch):
    """One method of the plain dense classes is another than the known one: somebody's, or in a newer PaddleFormers."""
    if request.param == "upstream's":
        monkeypatch.setattr(changed_deepstack, "__module__", modeling.__name__)
    monkeypatch.setattr(modeling.Qwen3VLTextModel, "_deepstack_process", changed_deepstack)


@pytest.mark.usefixtures("changed")
def test_changed_code_is_an_error_that_says_what():
    """The method, both fingerprints and the file; and nothing was replaced."""
    before = functions()
    known = next(m.sources[0] for _, _, m in methods() if m.name == "Qwen3VLTextModel._deepstack_process")
    with pytest.raises(UpstreamChanged, match=rf"Qwen3VLTextModel\._deepstack_process .*{known}.*test_apply.py:\d+"):
        apply_to_qwen3_vl()
    assert all(a is b for a, b in zip(before, functions(), strict=True))


@pytest.mark.usefixtures("changed")
def test_changed_code_is_left_alone_when_not_strict(caplog):
    """All methods of its family stay, the others are replaced; one warning."""
    before = modeling.Qwen3VLModelDeprecated.__dict__["forward"]
    with caplog.at_level(logging.WARNING, "paddle_vl_sp"):
        report = apply_to_qwen3_vl(strict=False)
    assert modeling.Qwen3VLModelDeprecated.__dict__["forward"] is before
    assert modeling.Qwen3VLTextModel.__dict__["_deepstack_process"] is changed_deepstack
    plain, others = (
        {m.name for f in QWEN3_VL for m in f.replaced if (f.name == "Qwen3-VL") == is_plain}
        for is_plain in (True, False)
    )
    assert set(report.names("left alone")) == plain
    assert (len(plain), len(others)) == (4, 7)
    assert others <= set(report.replaced)
    warnings = [record for record in caplog.records if record.name == "paddle_vl_sp"]
    assert len(warnings) == 1
    assert "left alone" in warnings[0].getMessage()


def test_a_module_that_has_moved_is_a_change(monkeypatch, caplog):
    """Not a run without the package: an error, or a warning that nothing is replaced."""
    for family in QWEN3_VL:
        monkeypatch.setitem(sys.modules, family.module, None)
    with pytest.raises(UpstreamChanged, match=r"qwen3_vl\.modeling of PaddleFormers .* cannot be imported"):
        apply_to_qwen3_vl()
    with caplog.at_level(logging.WARNING, "paddle_vl_sp"):
        assert not apply_to_qwen3_vl(strict=False).replaced
    assert "nothing of PaddleFormers is replaced" in caplog.text


def test_a_family_that_this_release_lacks_is_a_line(monkeypatch):
    """Where all families are meant: the others are replaced. One that was asked for by name is an error."""
    module = FAMILIES["glm_ocr"][0].module
    monkeypatch.setitem(sys.modules, module, None)
    with apply_to_paddleformers() as report:
        assert module in [line.name for line in report.lines if line.state == "absent"]
        assert "Qwen3VLModelDeprecated.forward" in report.replaced
    with pytest.raises(UpstreamChanged, match=r"glm_ocr\.modeling of PaddleFormers .* cannot be imported"):
        apply_to_paddleformers(families="glm_ocr")


def test_what_this_paddle_lacks_is_a_line(monkeypatch):
    """As LayerSpec, which Paddle 3.3.0 has not. An error of PaddleFormers' own is one here, too."""
    real = importlib.import_module

    def failing(error):
        def import_module(name, *rest):
            if name == FAMILIES["glm_ocr"][0].module:
                raise error
            return real(name, *rest)

        return import_module

    missing = ImportError("cannot import name 'LayerSpec'", name="paddle.distributed.fleet.meta_parallel")
    monkeypatch.setattr(importlib, "import_module", failing(missing))
    with apply_to_paddleformers() as report:
        assert "LayerSpec" in str(report)
    monkeypatch.setattr(importlib, "import_module", failing(ImportError("broken", name="paddleformers.nn.broken")))
    with pytest.raises(UpstreamChanged, match="cannot be imported: broken"):
        apply_to_paddleformers()


def test_changed_parameters_of_what_is_called(monkeypatch):
    """get_image_features may be overridden, but must take what we give it."""
    monkeypatch.setattr(modeling.Qwen3VLModelDeprecated, "get_image_features", lambda self, pixels: None)
    with pytest.raises(
        UpstreamChanged, match=r"takes \(self, pixels\), known is \(self, pixel_values, image_grid_thw\)"
    ):
        apply_to_qwen3_vl()


def test_what_somebody_put_over_ours_stays(caplog):
    """revert leaves it and says whose it is; once it is gone, revert takes ours back."""
    original = modeling.Qwen3VLTextModel.__dict__["_deepstack_process"]
    apply_to_qwen3_vl()
    ours = modeling.Qwen3VLTextModel.__dict__["_deepstack_process"]
    modeling.Qwen3VLTextModel._deepstack_process = changed_deepstack
    with caplog.at_level(logging.WARNING, "paddle_vl_sp"):
        revert()
    assert modeling.Qwen3VLTextModel.__dict__["_deepstack_process"] is changed_deepstack
    assert "test_apply has replaced it" in caplog.text
    modeling.Qwen3VLTextModel._deepstack_process = ours
    revert()
    assert modeling.Qwen3VLTextModel.__dict__["_deepstack_process"] is original


def test_switched_off_by_the_environment(monkeypatch):
    """PADDLE_VL_SP=0: nothing is touched and the report says why; other values are refused."""
    before = functions()
    monkeypatch.setenv("PADDLE_VL_SP", "0")
    assert "PADDLE_VL_SP=0" in str(apply_to_qwen3_vl())
    assert all(a is b for a, b in zip(before, functions(), strict=True))
    monkeypatch.setenv("PADDLE_VL_SP", "off")
    with pytest.raises(ValueError, match="must be 0 or 1, got 'off'"):
        apply_to_qwen3_vl()


@pytest.mark.parametrize("switch", ["1", "0"])
def test_audits_are_switched_on_and_off_with_the_rest(monkeypatch, switch):
    """PADDLE_VL_SP_AUDIT=1 without the plugin, and where PADDLE_VL_SP=0 leaves all else as it is."""
    from paddleformers.trainer import Trainer

    monkeypatch.setenv("PADDLE_VL_SP", switch)
    monkeypatch.setenv("PADDLE_VL_SP_AUDIT", "1")
    before = Trainer.training_step
    with apply_to_qwen3_vl():
        assert Trainer.training_step is not before
    assert Trainer.training_step is before


def test_switches_of_the_plugin_are_not_ignored_without_a_word(monkeypatch, caplog):
    """Each that is set and has no effect, with what code of one's own has instead; defaults are no matter."""
    monkeypatch.setattr("paddle_vl_sp.log._warned", set())
    monkeypatch.setattr(unread, "_read", [])
    for switch, value in {"VISION_DP": "data", "REPORT": "1", "STRICT": "1", "LOADER_PLANS": "0"}.items():
        monkeypatch.setenv(f"PADDLE_VL_SP_{switch}", value)
    with apply_to_qwen3_vl():
        pass
    said = [record.getMessage() for record in caplog.records if "has no effect" in record.getMessage()]
    assert said == [
        "paddle_vl_sp: PADDLE_VL_SP_VISION_DP=data has no effect: only the plugin reads it; instead there is "
        "apply_to_paddleformers(vision_dp=...)",
        "paddle_vl_sp: PADDLE_VL_SP_REPORT=1 has no effect: only the plugin reads it; instead there is "
        "report_to(trainer)",
    ]


def test_without_paddleformers_nothing_is_pretended(monkeypatch):
    """An ImportError that says what to install."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="paddleformers is not installed: pip install"):
        apply_to_qwen3_vl()


def test_the_check_switch_knows_two_words(monkeypatch):
    """0 and 1; anything else is refused with what was got."""
    from paddle_vl_sp.verify import checking

    for value, means in (("0", False), ("1", True)):
        monkeypatch.setenv("PADDLE_VL_SP_CHECK", value)
        assert checking() is means
    monkeypatch.setenv("PADDLE_VL_SP_CHECK", "yes")
    with pytest.raises(ValueError, match="PADDLE_VL_SP_CHECK must be 0 or 1, got 'yes'"):
        checking()


def test_backend_must_be_the_one_in_use():
    """An explicit choice must hold, and the error says how to get it."""
    from paddle_vl_sp import backend

    other = {"op": "python", "python": "op"}[backend().name]
    assert apply_to_qwen3_vl(backend=backend().name).replaced
    with pytest.raises(ValueError, match=f"set PADDLE_VL_SP_BACKEND={other} before"):
        apply_to_qwen3_vl(backend=other)
    with pytest.raises(ValueError, match="must be one of 'auto', 'op', 'python', got 'cuda'"):
        apply_to_qwen3_vl(backend="cuda")


def test_head_norms_of_models_built_from_now_on():
    """The one line is enough where it comes first; without sequence parallelism nothing is marked."""
    with apply_to_qwen3_vl():
        model = tiny.tiny_qwen3_vl()
    text = model.language_model
    attention = text.layers[1].self_attn
    for sequence_parallel in (False, True):  # True wants ranks to be built on: there the real run has it
        text.config.sequence_parallel = sequence_parallel
        norms.text_init(lambda self: None)(text)
        for norm in (attention.q_norm, attention.k_norm):
            assert getattr(norm.weight, "sequence_parallel", False) is sequence_parallel


def test_head_norms_of_a_given_model():
    """Marked under sequence parallelism only; the report has a line for it."""
    model = tiny.tiny_qwen3_vl()
    assert "a rank has all heads" in str(apply_to_qwen3_vl(model))
    attention = model.language_model.layers[0].self_attn
    assert not getattr(attention.q_norm.weight, "sequence_parallel", False)
    model.config.text_config.sequence_parallel = True
    assert "8 marked" in str(apply_to_qwen3_vl(model))
    assert attention.q_norm.weight.sequence_parallel
    assert attention.k_norm.weight.sequence_parallel


def test_vision_dp_wants_a_plain_model():
    """An error with the fix, and nothing is left replaced."""
    before = functions()
    with pytest.raises(ValueError, match=r"needs a plain model .* got Linear"):
        apply_to_qwen3_vl(paddle.nn.Linear(2, 2), vision_dp=True)
    assert all(a is b for a, b in zip(before, functions(), strict=True))


def test_vision_dp_marks_and_unmarks():
    """The tower's parameters, by apply and by revert; a second apply finds it done."""
    model = tiny.tiny_qwen3_vl()
    with pytest.raises(ValueError, match="vision_dp=True with sequence_parallel off: no trainer would sum"):
        apply_to_qwen3_vl(model, vision_dp=True)
    model.model.language_model.config.sequence_parallel = True
    assert "parameters marked" in str(apply_to_qwen3_vl(model, vision_dp=True))
    assert "was already shared" in str(apply_to_qwen3_vl(model, vision_dp=True))
    assert all(parameter.sequence_parallel for parameter in model.visual.parameters())
    model.visual.late = paddle.nn.Linear(2, 2)  # as LoRA adds them
    with pytest.raises(ValueError, match=r"2 parameters of the shared tower are not marked .* such as late\.weight"):
        shared_tower.encoded(model.model, None, None, None)
    revert()
    assert not any(parameter.sequence_parallel for parameter in model.visual.parameters())


def test_vision_dp_of_models_built_afterwards(monkeypatch):
    """Each is shared as it is built, or refused as it is built; with the classes its marks go too."""
    monkeypatch.setattr(shared_tower, "text_config", lambda inner: SimpleNamespace(sequence_parallel=True))
    report = apply_to_paddleformers(vision_dp=True)
    assert {"Qwen3VLModelDeprecated.__init__", "Qwen3VLModelDist.__init__"} <= set(report.replaced)
    models = [tiny.tiny_qwen3_vl(), tiny.tiny_qwen3_vl_moe()]
    for model in models:
        assert shared_tower.is_shared(model.model)
        assert all(parameter.sequence_parallel for parameter in model.visual.parameters())
    with pytest.raises(
        ValueError, match=r"PADDLE_VL_SP_VISION_DP=1, with Qwen3VLModelDist: .* cut over the tensor-par"
    ):
        modeling_fleet.Qwen3VLModelDist(None)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="sequence_parallel off: no trainer would sum"):
        tiny.tiny_qwen3_vl()
    revert()
    for model in models:
        assert not shared_tower.is_shared(model.model)
        assert not any(parameter.sequence_parallel for parameter in model.visual.parameters())
    assert not shared_tower.is_shared(tiny.tiny_qwen3_vl().model)


def test_an_unrelated_context_leaves_shared_towers_alone(monkeypatch):
    """Also those of subclasses with a constructor of their own: a trainer has read their marks by then."""
    monkeypatch.setattr(shared_tower, "text_config", lambda inner: SimpleNamespace(sequence_parallel=True))

    class Own(modeling.Qwen3VLModelDeprecated):
        def __init__(self, config):
            super().__init__(config)
            self.more = 1

    apply_to_paddleformers(vision_dp=True)
    models = [tiny.tiny_qwen3_vl().model, Own(tiny.tiny_qwen3_vl().config)]
    with apply_to_qwen2_5_vl():
        pass
    for model in models:
        assert shared_tower.is_shared(model)
        assert all(parameter.sequence_parallel for parameter in model.visual.parameters())


def test_vision_dp_marks_what_came_later():
    """LoRA after a model was shared: passing it in again marks the new parameters."""
    model = tiny.tiny_qwen3_vl()
    model.model.language_model.config.sequence_parallel = True
    apply_to_paddleformers(model, vision_dp=True)
    model.visual.late = paddle.nn.Linear(2, 2)
    assert "was already shared" in str(apply_to_paddleformers(model, vision_dp=True))
    assert model.visual.late.weight.sequence_parallel


def test_models_that_cannot_share_are_told():
    """A line for each family without sequence parallelism."""
    report = apply_to_paddleformers(families=["glm_ocr", "qwen2_5_vl"], vision_dp=True)
    (line,) = (line for line in report.lines if line.state == "left alone")
    assert (line.family, line.why) == ("GLM-OCR", "not shared: it has no sequence parallelism")


@pytest.mark.parametrize("model", ["qwen2_5_vl", 3])
def test_what_is_no_model_is_refused(model):
    """A name in its place is a slip; nothing is left replaced."""
    before = functions()
    with pytest.raises(ValueError, match=r"model must be a model, got .*; families are named by families="):
        apply_to_paddleformers(model)
    assert all(a is b for a, b in zip(before, functions(), strict=True))


def test_an_error_on_the_way_leaves_nothing_replaced(monkeypatch):
    """Identity of every function."""
    before = functions()
    monkeypatch.setattr("paddle_vl_sp.formers.patch.mark_head_norms", lambda model: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        apply_to_paddleformers(tiny.tiny_qwen3_vl())
    assert all(a is b for a, b in zip(before, functions(), strict=True))


def test_a_constructor_that_others_replaced_matters_only_for_vision_dp(monkeypatch):
    """Without it the constructor is upstream's business."""
    monkeypatch.setattr(modeling.Qwen3VLModelDeprecated, "__init__", changed_deepstack)
    apply_to_qwen3_vl()
    revert()
    with pytest.raises(UpstreamChanged, match=r"Qwen3VLModelDeprecated\.__init__ has fingerprint"):
        apply_to_qwen3_vl(vision_dp=True)


@pytest.mark.parametrize("strict", [True, False])
def test_a_module_that_fails_in_any_way_is_absent(monkeypatch, strict):
    """Of a family that needs more than others have: a line, and all others are replaced."""
    import_module = importlib.import_module

    def broken(name, *args):
        if name.endswith("paddleocr_vl.modeling"):
            raise AttributeError("module 'triton' has no attribute 'jit'")
        return import_module(name, *args)

    monkeypatch.setattr("paddle_vl_sp.formers.patch.importlib.import_module", broken)
    report = apply_to_paddleformers(strict=strict)
    assert "paddleformers.transformers.paddleocr_vl.modeling" in report.names("absent")
    assert len(report.replaced) >= 13


def test_vision_dp_again_after_a_revert():
    """The marks are there again, whoever has taken them away: revert, or the end of a context."""
    model = tiny.tiny_qwen3_vl()
    model.model.language_model.config.sequence_parallel = True
    for _ in range(2):
        with apply_to_qwen3_vl(model, vision_dp=True) as report:
            assert "parameters marked" in str(report)
            assert all(parameter.sequence_parallel for parameter in model.visual.parameters())
        assert not any(parameter.sequence_parallel for parameter in model.visual.parameters())
    apply_to_qwen3_vl(model, vision_dp=True)
    revert()
    apply_to_qwen3_vl(model, vision_dp=True)
    assert shared_tower.is_shared(model.model)
    assert all(parameter.sequence_parallel for parameter in model.visual.parameters())


def test_vision_dp_refuses_models_that_upstream_runs():
    """Their tower would be run by all, and its gradients summed: at once, and where the class changes later."""

    class Own(modeling.Qwen3VLModelDeprecated):
        def get_placeholder_mask(self, *args, **kwargs):
            return super().get_placeholder_mask(*args, **kwargs)

    model = tiny.tiny_qwen3_vl()
    model.model.language_model.config.sequence_parallel = True
    inner, known = model.model, type(model.model)
    inner.__class__ = Own
    with pytest.raises(ValueError, match=r"its own get_placeholder_mask \(Own\).* leave vision_dp out"):
        apply_to_qwen3_vl(model, vision_dp=True)
    inner.__class__ = known
    apply_to_qwen3_vl(model, vision_dp=True)
    inner.__class__ = Own
    with pytest.raises(ValueError, match="its own get_placeholder_mask"):
        loss_of(model, tiny.draw_batch(SAMPLES["image"]))


def ran(code, **environment):
    env = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)


def run_python(code, **environment):
    return ran(code, **environment).stdout


def test_the_package_imports_neither_paddle_nor_paddleformers():
    """Only paddle_vl_sp.formers does."""
    code = "import sys, paddle_vl_sp; print([n for n in ('paddle', 'paddleformers') if n in sys.modules])"
    assert run_python(code).strip() == "[]"


def test_command_line_without_paddle():
    """--help and plugin-path import no Paddle; the path is that of the plugin."""
    code = "import sys; from paddle_vl_sp.cli import main; main(['plugin-path']); print('paddle' in sys.modules)"
    path, imported = run_python(code).split()
    assert Path(path).name == "plugin.py"
    assert Path(path).is_file()
    assert imported == "False"


PLUGIN = """
import subprocess, sys
from paddleformers.cli.hparams.parser import _load_custom_template
_load_custom_template(subprocess.check_output([sys.executable, "-m", "paddle_vl_sp", "plugin-path"], text=True).strip())
from paddleformers.transformers.qwen3_vl.modeling import Qwen3VLTextModel
print("OURS", hasattr(Qwen3VLTextModel._deepstack_process, "_paddle_vl_sp_original"))
"""


@pytest.mark.parametrize(("switch", "replaced"), [("1", True), ("0", False)])
def test_plugin_as_paddleformers_loads_it(switch, replaced):
    """By PaddleFormers' own loader of custom_register_path; without paddlefleet its classes are absent, by a line."""
    done = ran(PLUGIN, PADDLE_VL_SP=switch)
    assert f"OURS {replaced}" in done.stdout
    absent = "1 absent (No module named 'paddlefleet')"
    told = "Qwen3-VL: 4 replaced; Qwen2.5-VL: 1 replaced; GLM-OCR: 1 replaced; "
    told = f"{told}Qwen3-VL MoE: {absent}; Qwen3-VL fleet: {absent}" if replaced else "left as it is: PADDLE_VL_SP=0"
    assert done.stderr.count("paddle_vl_sp: PaddleFormers") == 1
    assert told in done.stderr


SWITCHED = (
    PLUGIN
    + """
from paddleformers.cli.train.sft import workflow
from paddleformers.transformers.qwen3_vl.modeling import Qwen3VLModelDeprecated
for function in (workflow.mm_collate_fn, Qwen3VLModelDeprecated.__init__):
    print("OURS", hasattr(function, "_paddle_vl_sp_original"))
"""
)


@pytest.mark.parametrize(("switch", "replaced"), [("1", True), ("0", False)])
def test_the_plugins_switches(switch, replaced):
    """Plans of the loader, and a shared tower, in what the plugin replaces; else neither."""
    done = ran(
        SWITCHED, PADDLE_VL_SP_LOADER_PLANS=switch, PADDLE_VL_SP_VISION_DP=switch, PADDLE_VL_SP_FAMILIES="qwen3_vl"
    )
    assert done.stdout.split() == ["OURS", "True", *["OURS", str(replaced)] * 2]
    assert ("the data loader plans" in done.stderr) == replaced
    assert "has no effect" not in done.stderr


STRICT = """
from paddleformers.transformers.qwen3_vl.modeling import Qwen3VLTextModel
Qwen3VLTextModel._deepstack_process = lambda self, hidden_states, visual_pos_masks, visual_embeds: hidden_states
"""


def test_the_plugin_leaves_unknown_code_alone_if_told_to():
    """PADDLE_VL_SP_STRICT=0: a warning; else PaddleFormers ends the run with our message."""
    assert "these classes are left alone" in ran(STRICT + PLUGIN, PADDLE_VL_SP_STRICT="0").stderr
    with pytest.raises(subprocess.CalledProcessError) as failed:
        ran(STRICT + PLUGIN)
    assert "with strict=False these classes are left alone" in failed.value.stderr


def test_families_that_the_plugin_does_not_know_end_the_run():
    """By PaddleFormers, with our message."""
    with pytest.raises(subprocess.CalledProcessError) as failed:
        ran(PLUGIN, PADDLE_VL_SP_FAMILIES="qwen3_vl, qwen4_vl")
    assert "'qwen3', 'qwen3_next', got 'qwen4_vl'" in failed.value.stderr


def test_only_the_first_rank_says_what_was_done():
    """Nothing on another rank's stderr."""
    assert "paddle_vl_sp: PaddleFormers" not in ran(PLUGIN, PADDLE_TRAINER_ID="1").stderr


def test_at_level_debug_every_method_is_told():
    """By name."""
    assert "Qwen3VLTextModel._deepstack_process" in ran(PLUGIN, PADDLE_VL_SP_LOG="debug").stderr
