"""doctor: a healthy installation passes, and every known illness is found, named and given its mend."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import paddle
import pytest
from commands import call, call_json, call_without
from paddleformers.transformers.qwen3_vl import modeling

import paddle_vl_sp
from paddle_vl_sp.backends import dispatch, load
from paddle_vl_sp.cli import check_install, doctor, main
from paddle_vl_sp.cli.check_operators import check_operators, check_paddle, check_parity
from paddle_vl_sp.cli.check_upstream import check_upstream
from paddle_vl_sp.cli.checkup import FAIL, PASS, WARN
from paddle_vl_sp.formers.families import QWEN3_VL

PACKAGE = Path(paddle_vl_sp.__file__).parent
REPLACED = ("Qwen3VLModelDeprecated.forward", "Qwen3VLTextModel.forward", "Qwen3VLTextModel._deepstack_process")


def by_subject(checks):
    return {check["subject"] if isinstance(check, dict) else check.subject: check for check in checks}


def with_operators():
    if load.backend().name != "op":
        pytest.skip(f"no custom operators: {load.backend().reason}")


@pytest.fixture
def copy(tmp_path):
    """The package in another place."""
    shutil.copytree(PACKAGE, tmp_path / "paddle_vl_sp", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def test_what_is_healthy_passes():
    """No FAIL, exit code 0; every part has its line, every line that is no PASS its mend."""
    code, found = call_json("doctor")
    checks = by_subject(found["checks"])
    assert (code, found["ok"]) == (0, True)
    parts = ("system", "paddle_vl_sp", "numpy and pyarrow", "compiler", "CUDA_HOME", "nvcc", "Paddle")
    assert checks.keys() >= {*parts, *REPLACED}
    assert checks["parity"]["state"] == PASS
    mends = [check["mend"] for check in found["checks"] if check["state"] != PASS]
    without = [check["subject"] for check in found["checks"] if check["state"] != PASS and not check["mend"]]
    assert all(subject.startswith("upstream, ") for subject in without)  # paddlefleet's line has their mend
    assert len({*filter(None, mends)}) == len([*filter(None, mends)])


def test_nothing_stays_replaced_by_looking():
    """Identity."""
    before = modeling.Qwen3VLTextModel.forward
    list(check_upstream())
    assert modeling.Qwen3VLTextModel.forward is before


def test_a_changed_method_of_upstream_is_found(monkeypatch, capsys):
    """Both fingerprints and whose code it is; the other methods are still judged by themselves; exit code 1."""
    original = modeling.Qwen3VLTextModel._deepstack_process
    known = by_subject(check_upstream())["Qwen3VLTextModel._deepstack_process"]
    assert known.state == PASS
    monkeypatch.setattr(modeling.Qwen3VLTextModel, "_deepstack_process", lambda self, x, *_: original(self, x, *_))
    checks = by_subject(check_upstream())
    changed = checks["Qwen3VLTextModel._deepstack_process"]
    assert changed.state == FAIL
    assert "known is 5d2f3c34ae40ba01 (replaced by test_doctor" in changed.told
    assert "strict=False" in changed.mend
    assert checks["Qwen3VLTextModel.forward"].state == PASS
    assert main(["doctor"]) == 1
    assert "FAIL  Qwen3VLTextModel._deepstack_process" in capsys.readouterr().out


def test_changed_parameters_of_what_is_leant_on_are_found(monkeypatch):
    """get_image_features may be overridden, but not with other parameters."""
    monkeypatch.setattr(modeling.Qwen3VLModelDeprecated, "get_image_features", lambda self, pixels: None)
    check = by_subject(check_upstream())["Qwen3VLModelDeprecated.get_image_features"]
    assert (check.state, "takes (self, pixels), known is" in check.told) == (FAIL, True)


def test_a_class_that_is_gone_is_found(monkeypatch):
    """By its name and module."""
    monkeypatch.delattr(modeling, "Qwen3VLTextModel")
    check = by_subject(check_upstream())["Qwen3VLTextModel"]
    assert (check.state, "qwen3_vl.modeling" in check.told) == (FAIL, True)


def test_methods_on_paddlefleet_are_judged_too():
    """With stand-ins for paddlefleet, under which PaddleFormers' real modules import: all are known."""
    from stub_paddlefleet import stubbed_paddlefleet

    with stubbed_paddlefleet():
        checks = by_subject(check_upstream())
    names = [f"{owner}.{name}" for family in QWEN3_VL for owner, made in family.methods.items() for name in made]
    assert len(names) == 11
    assert {name: checks[name].state for name in names} == dict.fromkeys(names, PASS)


def test_the_switch_is_named(monkeypatch):
    """PADDLE_VL_SP=0 explains, once, why nothing is replaced; another value is wrong."""
    assert by_subject(check_install.check_versions())["switches"].state == PASS
    monkeypatch.setenv("PADDLE_VL_SP", "0")
    check = by_subject(check_install.check_versions())["switches"]
    assert (check.state, check.mend) == (WARN, "unset PADDLE_VL_SP")
    assert "changes nothing in PaddleFormers" in check.told
    assert list(check_upstream()) == []
    monkeypatch.setenv("PADDLE_VL_SP", "yes")
    (check,) = check_upstream()
    assert (check.state, "must be 0 or 1, got 'yes'" in check.told) == (FAIL, True)


def test_operators_for_another_paddle_are_found(copy):
    """A library with another commit in it: both are named, the rest of the package works in plain Paddle."""
    with_operators()
    (library,) = (copy / "paddle_vl_sp").glob("_ops*.so")
    commit = load.build_info(library)["commit"].encode()
    library.write_bytes(library.read_bytes().replace(b"commit=" + commit, b"commit=" + b"0" * len(commit)))
    code, found = call_json("doctor", "--no-upstream", cwd=copy)
    checks = by_subject(found["checks"])
    assert checks["paddle_vl_sp"]["told"].endswith(str(copy / "paddle_vl_sp"))
    assert code == 1
    assert checks["operators"]["state"] == FAIL
    assert f"was built for Paddle {paddle.version.full_version} (0000000000)" in checks["operators"]["told"]
    assert "--no-build-isolation" in checks["operators"]["mend"]
    assert checks["parity"]["state"] == PASS


def test_no_operators_at_all_is_a_warning(copy):
    """Plain Paddle serves and is right; PADDLE_VL_SP_BACKEND=op makes it a failure."""
    for library in (copy / "paddle_vl_sp").glob("_ops*.so"):
        library.unlink()
    code, found = call_json("doctor", "--no-upstream", cwd=copy)
    checks = by_subject(found["checks"])
    assert (code, checks["operators"]["state"], checks["serving"]["state"]) == (0, WARN, WARN)
    assert "pip install" in checks["operators"]["mend"]
    assert json.dumps(found).count("--no-build-isolation") == 1
    code, found = call_json("doctor", "--no-upstream", cwd=copy, PADDLE_VL_SP_BACKEND="op")
    checks = by_subject(found["checks"])
    assert (code, checks["serving"]["state"], checks["parity"]["state"]) == (1, FAIL, FAIL)
    assert json.dumps(found).count("--no-build-isolation") == 1


def test_wrong_results_are_found(monkeypatch):
    """An addition that forgets a row: the place, both numbers, and how to go on without operators."""
    right = dispatch.add_rows
    monkeypatch.setattr(dispatch, "add_rows", lambda h, f, update, gather, i: right(h, f, update[1:], gather[1:], i))
    check = check_parity()
    assert check.state == FAIL
    assert "expected" in check.told
    assert "PADDLE_VL_SP_BACKEND=python" in check.mend


@pytest.mark.parametrize(("has_cuda", "state"), [(False, WARN), (True, FAIL)])
def test_a_broken_cuda_home_is_found(monkeypatch, tmp_path, has_cuda, state):
    """Of a folder that is not there and of one without nvcc; worse where Paddle has CUDA."""
    for home, why in ((tmp_path / "gone", "there is no such folder"), (tmp_path, "it has no bin/nvcc")):
        monkeypatch.setenv("CUDA_HOME", str(home))
        check = by_subject(check_install.check_compilers(has_cuda))["CUDA_HOME"]
        assert (check.state, why in check.told) == (state, True)
        assert "CUDA_HOME" in check.mend


def test_a_good_cuda_home_passes(monkeypatch, tmp_path):
    """Its nvcc is the one that is shown."""
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\necho Cuda compilation tools, release 99.1\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    checks = by_subject(check_install.check_compilers(True))
    assert (checks["CUDA_HOME"].state, checks["nvcc"].told) == (PASS, f"{nvcc}: Cuda compilation tools, release 99.1")


def test_missing_compilers_are_named(monkeypatch, tmp_path):
    """No g++ is a warning; no nvcc is one only where Paddle has CUDA."""
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("CXX", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    checks = by_subject(check_install.check_compilers(False))
    assert (checks["compiler"].state, checks["nvcc"].state) == (WARN, PASS)
    assert "apt install g++" in checks["compiler"].mend
    assert by_subject(check_install.check_compilers(True))["nvcc"].state == WARN


def test_the_clash_of_numpy_and_pyarrow_is_found(monkeypatch):
    """By their versions, and by an import that fails."""
    versions = {"numpy": "1.26.4", "pyarrow": "26.0.0"}
    monkeypatch.setattr(check_install, "installed", lambda name: versions.get(name, ""))
    (check,) = check_install.check_clashes()
    assert (check.state, check.mend) == (FAIL, 'pip install "pyarrow<26"')
    assert "numpy 1.26.4, pyarrow 26.0.0" in check.told
    versions["pyarrow"] = "25.0.0"
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (check,) = check_install.check_clashes()
    assert check.state == FAIL
    versions["pyarrow"] = ""
    (check,) = check_install.check_clashes()
    assert check.state == PASS


def test_two_paddles_are_found(monkeypatch):
    """paddlepaddle and paddlepaddle-gpu overwrite each other's files."""
    versions = {"paddlepaddle": "3.3.1", "paddlepaddle-gpu": "3.2.0"}
    monkeypatch.setattr(check_install, "installed", lambda name: versions.get(name, ""))
    check = by_subject(check_install.check_clashes())["two Paddles"]
    assert (check.state, check.told) == (FAIL, "paddlepaddle 3.3.1 and paddlepaddle-gpu 3.2.0")


def test_an_old_paddle_is_named(monkeypatch):
    """Below 3.3 packages of operators break."""
    assert check_paddle().state == PASS
    monkeypatch.setattr(paddle.version, "full_version", "3.2.2")
    check = check_paddle()
    assert (check.state, "older than 3.3" in check.told) == (WARN, True)


def test_a_paddle_with_cuda_and_operators_without(monkeypatch):
    """They serve the CPU only, which is a warning with the mend."""
    with_operators()
    monkeypatch.setattr(paddle, "is_compiled_with_cuda", lambda: True)
    check = by_subject(check_operators())["operators"]
    assert (check.state, "built without CUDA" in check.told) == (WARN, True)


def test_without_paddle_all_else_is_told():
    """A FAIL with the mend, and no traceback."""
    done = call_without(["paddle"], "doctor", "--no-upstream")
    assert done.returncode == 1
    assert "FAIL  Paddle" in done.stdout
    assert "mend: `pip install paddlepaddle` (CPU; for a GPU" in done.stdout
    assert "install this package again" in done.stdout
    assert "Traceback" not in done.stderr


def test_without_paddleformers_the_rest_works():
    """A WARN with the mend, exit code 0; self-test and inspect do not need it."""
    done = call_without(["paddleformers"], "doctor")
    assert done.returncode == 0, done.stdout
    assert re.search("WARN  paddleformers +not installed", done.stdout)
    assert done.stdout.count('mend: pip install "paddleformers==1.2.0" "pyarrow<26"') == 1
    assert not re.search("upstream", done.stdout)
    assert call_without(["paddleformers", "matplotlib", "rich"], "selftest", "--quick").returncode == 0


def test_an_import_that_dies_is_a_finding(monkeypatch):
    """Whatever PaddleFormers raises while it is imported."""
    from paddle_vl_sp.cli import check_upstream as upstream

    def dies():
        raise AttributeError("module 'numpy' has no attribute 'x'")

    monkeypatch.setattr(upstream, "check_upstream", dies)
    (check,) = doctor._of_upstream()
    assert (check.state, "AttributeError: module 'numpy'" in check.told) == (FAIL, True)


def test_words_can_be_pasted():
    """No colour, no control characters; a summary in the end."""
    words = call("doctor", "--no-upstream").stdout
    assert words.isprintable() or set(words) - set(filter(str.isprintable, words)) == {"\n"}
    assert words.splitlines()[-1].endswith("PASS")


@pytest.mark.parametrize("name", ["PADDLE_VL_SP_CHECK", "PADDLE_VL_SP_LOG", "PADDLE_VL_SP_BACKEND"])
def test_a_switch_with_an_unknown_word_fails_and_the_rest_is_looked_at(name, monkeypatch):
    """What names it, with the words there are, and not a traceback of the first check that reads it."""
    monkeypatch.setenv(name, "perhaps")
    done = subprocess.run(
        [sys.executable, "-m", "paddle_vl_sp", "doctor", "--json"], capture_output=True, text=True, check=False
    )
    checks = {check["subject"]: check for check in json.loads(done.stdout)["checks"]}
    assert done.returncode == 1
    assert checks["switches"]["state"] == "FAIL"
    assert f"{name} is one of" in checks["switches"]["mend"]
    assert checks["serving"]["state"] in ("PASS", "WARN")
