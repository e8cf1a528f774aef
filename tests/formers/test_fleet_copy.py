"""PaddleFleet's own copy of PaddleFormers' models is left as it is, and that is said."""

import logging
import sys
from types import ModuleType

import paddle
import pytest
from paddleformers.transformers.qwen2_5_vl.modeling import Qwen2_5_VLModel

from paddle_vl_sp.formers import apply_to_paddleformers, apply_to_qwen2_5_vl, apply_to_qwen3_vl, fleet_copy

COPY = "paddlefleet.transformers"


@pytest.fixture
def fake(monkeypatch, tmp_path):
    """A PaddleFleet that cannot be imported, only looked into; the function adds the copy of the models to it."""
    package = tmp_path / "paddlefleet"
    package.mkdir()
    (package / "__init__.py").write_text("raise AssertionError('imported')")
    monkeypatch.delitem(sys.modules, "paddlefleet", raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr("paddle_vl_sp.log._warned", set())

    def add_copy():
        (package / "transformers").mkdir()
        (package / "transformers" / "__init__.py").touch()

    return add_copy


def test_it_is_found_without_an_import(fake, monkeypatch):
    """Of a package that is there, with and without it; of none; also of one that is imported, whose spec may lack."""
    assert not fleet_copy.is_installed()
    fake()
    assert fleet_copy.is_installed()
    assert "paddlefleet" not in sys.modules
    loaded = ModuleType("paddlefleet")
    monkeypatch.setitem(sys.modules, "paddlefleet", loaded)
    assert not fleet_copy.is_installed()
    loaded.__path__ = [f"{sys.path[0]}/paddlefleet"]
    assert fleet_copy.is_installed()
    monkeypatch.setitem(sys.modules, "paddlefleet", None)  # cannot be imported
    assert not fleet_copy.is_installed()


def test_the_report_and_the_log_say_that_it_is_left(fake, caplog):
    """A line and one warning, with where models are to come from; what PaddleFormers has is replaced all the same."""
    fake()
    caplog.set_level(logging.INFO)
    for _ in range(2):
        report = apply_to_qwen2_5_vl()
        assert report.replaced == ["Qwen2_5_VLModel.forward"]
        assert report.names("not supported") == [COPY]
    assert "this release changes those of paddleformers.transformers alone" in str(report)
    assert COPY not in report.in_a_line()
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert f"PaddleFleet has models of its own, {COPY}, and its classes are left as they are" in warnings[0]
    assert "build models from paddleformers.transformers of PaddleFormers 1.2.0" in warnings[0]


def test_nothing_is_said_where_it_is_not(fake, caplog, monkeypatch):
    """Nor where everything is switched off."""
    assert not apply_to_qwen2_5_vl().names("not supported")
    fake()
    monkeypatch.setenv("PADDLE_VL_SP", "0")
    assert COPY not in str(apply_to_qwen2_5_vl())
    assert not [record for record in caplog.records if record.levelno == logging.WARNING]


def test_a_model_of_it_is_refused():
    """By name, and before anything is replaced, also below a subclass; any other model is taken."""
    before = Qwen2_5_VLModel.forward
    theirs = type("Qwen3VLModel", (paddle.nn.Layer,), {"__module__": f"{COPY}.qwen3_vl.modeling"})
    for cls in (theirs, type("Mine", (theirs,), {})):
        with pytest.raises(ValueError, match=rf"model is {cls.__name__}, of .* {COPY}\.qwen3_vl\.modeling, and its"):
            apply_to_paddleformers(cls())
        assert Qwen2_5_VLModel.forward is before
    assert apply_to_qwen3_vl(paddle.nn.Linear(2, 2)).replaced


def test_without_paddleformers_it_is_named(fake, monkeypatch):
    """The error that PaddleFormers is not installed says that what PaddleFleet has in its place is not changed."""
    monkeypatch.setitem(sys.modules, "paddleformers", None)
    with pytest.raises(ImportError) as without:
        apply_to_paddleformers()
    assert COPY not in str(without.value)
    fake()
    with pytest.raises(ImportError, match=rf"not installed: pip .*; {COPY}, which PaddleFleet has instead, is not"):
        apply_to_paddleformers()
