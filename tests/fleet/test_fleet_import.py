"""Without PaddleFleet, or with one that lacks a class, the import error says what to do."""

import subprocess
import sys

import pytest


def test_without_paddlefleet_the_import_says_what_to_install():
    """An ImportError that says what to install, in a process of its own."""
    code = "import sys; sys.modules['paddlefleet'] = None; import paddle_vl_sp.fleet"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "ImportError: paddle_vl_sp.fleet extends PaddleFleet" in done.stderr
    assert "install paddlefleet" in done.stderr


def test_classes_are_in_dir_before_they_are_made():
    """Those that are made when they are asked for, too."""
    from paddle_vl_sp import fleet

    assert {"VisualGPTEmbedding", "VisualDeepstack"} <= set(dir(fleet))


def test_a_class_whose_base_is_missing_says_so(monkeypatch):
    """An ImportError for a base that is missing, an AttributeError for a name that never was."""
    from paddle_vl_sp import fleet

    monkeypatch.setitem(sys.modules, "paddlefleet.models.qwen3_vl.embedding", None)
    monkeypatch.delitem(vars(fleet), "VisualQwen3VLTextEmbedding", raising=False)
    with pytest.raises(ImportError, match=r"Qwen3VLTextEmbedding of paddlefleet.* this PaddleFleet lacks"):
        fleet.VisualQwen3VLTextEmbedding  # noqa: B018
    with pytest.raises(AttributeError, match="no attribute 'VisualNothing'"):
        fleet.VisualNothing  # noqa: B018
