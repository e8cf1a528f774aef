"""doctor: a healthy installation passes, and every known problem is found, named and given its fix."""

import json
import re
import shutil
import sys
from importlib import import_module
from types import SimpleNamespace

import paddle
import pytest
from commands import PACKAGE, call, call_json, call_without, python
from paddleformers.transformers.qwen3_vl import modeling

from paddle_vl_sp.backends import load
from paddle_vl_sp.cli import doctor, installation, main, model_class
from paddle_vl_sp.cli.doctor import check_contracts, check_operators, check_paddle, check_upstream
from paddle_vl_sp.cli.installation import FAIL, PASS, WARN, check_compilers, check_conflicts, check_versions
from paddle_vl_sp.cli.model_class import check_model_class
from paddle_vl_sp.formers import auto
from paddle_vl_sp.formers.families import FAMILIES

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
    """No FAIL, exit code 0; every part has its line, every line that is no PASS its fix, once."""
    code, found = call_json("doctor")
    checks = by_subject(found["checks"])
    assert (code, found["ok"]) == (0, True)
    parts = ("system", "paddle_vl_sp", "numpy and pyarrow", "compiler", "CUDA_HOME", "nvcc", "Paddle")
    assert checks.keys() >= {*parts, *REPLACED}
    if load.backend().name == "op":
        assert (checks["operators"]["state"], checks["backend"]["state"]) == (PASS, PASS)
    fixes = [check["fix"] for check in found["checks"] if check["state"] != PASS]
    without = {check["subject"] for check in found["checks"] if check["state"] != PASS and not check["fix"]}
    following = {check["subject"] for check in found["checks"] if check["because"]}
    assert without <= {"backend", *following}  # other lines have these fixes
    assert len({*filter(None, fixes)}) == len([*filter(None, fixes)])


def test_what_follows_from_a_missing_package_is_in_its_line():
    """One WARN line for paddlefleet, which names every class that cannot be used; in JSON each has its own."""
    if installation.importable("paddlefleet"):
        pytest.skip("paddlefleet is installed")
    checks = [installation.Check(**check) for check in call_json("doctor")[1]["checks"]]
    following = [check for check in checks if check.because == "paddlefleet"]
    assert len(following) > 3
    (warned,) = [line for line in doctor._report(checks).splitlines() if "WARN" in line and "leet" in line]
    for check in following:
        assert check.subject.removeprefix("upstream, ") in warned or check.message in warned


def class_line():
    (check,) = check_model_class()
    return check.state, check.message


def test_the_class_that_is_built_for_qwen3_vl_is_named(monkeypatch):
    """Without paddlefleet AutoModel builds none, and the plain class is named; with a stand-in the fleet class."""
    if not installation.importable("paddlefleet"):
        for name in [name for name in sys.modules if name.endswith("modeling_fleet")]:  # of another test's stand-in
            monkeypatch.delitem(sys.modules, name)
        state, message = class_line()
        assert (state, "would build Qwen3-VL on PaddleFleet, and fail without it" in message) == (WARN, True)
        assert message.endswith("your own code can build Qwen3VLForConditionalGenerationDeprecated")
    from stub_paddlefleet import stubbed_paddlefleet

    with stubbed_paddlefleet():
        built = "Qwen3VLForConditionalGeneration of paddleformers.transformers.qwen3_vl.modeling_fleet"
        assert class_line() == (PASS, f"{model_class.BUILT} build {built}: the fleet class, on PaddleFleet")


def test_other_releases_may_build_the_plain_class_or_none(monkeypatch):
    """By AutoModel's own answer; an answer that cannot be had is a warning, any other error a finding."""
    monkeypatch.setattr(auto, "class_of", lambda _: modeling.Qwen3VLForConditionalGenerationDeprecated)
    plain = "Qwen3VLForConditionalGenerationDeprecated of paddleformers.transformers.qwen3_vl.modeling"
    assert class_line() == (PASS, f"{model_class.BUILT} build {plain}: the plain class")
    monkeypatch.setattr(auto, "class_of", lambda name: {}[name])
    assert class_line()[0] == WARN
    monkeypatch.setattr(auto, "class_of", lambda _: import_module("no_such_package"))
    assert [check.state for check in doctor._quietly("it", check_model_class)] == [FAIL]


def test_a_family_that_cannot_be_imported_fails_where_applying_raises():
    """Not for want of paddlefleet, nor where the family needs what PaddleFormers does not install."""
    families = {family.name: family for group in FAMILIES.values() for family in group}
    states = {
        ("Qwen3-VL", "No module named 'paddleformers.transformers.qwen3_vl'"): FAIL,
        ("Qwen3-VL fleet", "No module named 'paddlefleet'"): WARN,
        ("PaddleOCR-VL", "name 'triton' is not defined"): WARN,
    }
    assert {(name, why): doctor._absent(families[name], why).state for name, why in states} == states


def test_operators_that_do_not_load_are_a_warning(monkeypatch):
    """Plain Paddle is used and is right; the reason and the fix are there."""
    loads = SimpleNamespace(name="python", reason="_ops.so does not load: bad ELF header")
    monkeypatch.setattr(load, "backend", lambda: loads)
    check = doctor._backend(installation.Check(PASS, "operators", "built for this Paddle"))
    assert (check.state, loads.reason in check.message, "pip install" in check.fix) == (WARN, True, True)


def test_nothing_stays_replaced():
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
    assert "known is 872f15937229ba1a (replaced by test_doctor" in changed.message
    assert checks["Qwen3-VL"].message.startswith("refused: Qwen3VLTextModel._deepstack_process has fingerprint")
    assert "strict=False" in checks["Qwen3-VL"].fix
    assert checks["Qwen3VLTextModel.forward"].state == PASS
    assert main(["doctor"]) == 1
    assert "FAIL  Qwen3VLTextModel._deepstack_process" in capsys.readouterr().out


def test_changed_parameters_of_what_is_called_are_found(monkeypatch):
    """get_image_features may be overridden, but not with other parameters."""
    monkeypatch.setattr(modeling.Qwen3VLModelDeprecated, "get_image_features", lambda self, pixels: None)
    check = by_subject(check_upstream())["Qwen3VLModelDeprecated.get_image_features"]
    assert (check.state, "takes (self, pixels), known is" in check.message) == (FAIL, True)


def test_every_family_says_what_it_is():
    """Known here, with what would be replaced; what is needed of a newer release can be tried, clause by clause."""
    checks = by_subject(check_upstream())
    assert checks["Qwen2.5-VL"].message == "known; 1 method would be replaced"
    code, found = call_json("doctor", "--contracts")
    clauses = [check for check in found["checks"] if check["subject"].startswith("contract, ")]
    assert (code, {check["state"] for check in clauses}) == (0, {PASS})
    assert {check["subject"] for check in clauses} >= {
        f"contract, {name}" for name in ("Qwen3-VL", "Qwen2.5-VL", "GLM-OCR")
    }
    assert any("adds the rows of its rank" in check["message"] for check in clauses)


def test_a_broken_clause_is_a_finding(monkeypatch):
    """With the clause and how it is broken."""
    method = modeling.Qwen3VLTextModel._deepstack_process
    monkeypatch.setattr(modeling.Qwen3VLTextModel, "_deepstack_process", lambda *given: method(*given) * 2)
    broken = [check for check in check_contracts() if check.state == FAIL]
    assert "adds the rows of its rank: TypeError" in broken[0].message


def test_a_class_that_is_gone_is_found(monkeypatch):
    """By each of its methods and its module; also __init__, which every object has."""
    monkeypatch.delattr(modeling, "Qwen3VLTextModel")
    checks = by_subject(check_upstream())
    for name in ("forward", "__init__"):
        check = checks[f"Qwen3VLTextModel.{name}"]
        assert (check.state, "not in paddleformers.transformers.qwen3_vl.modeling" in check.message) == (FAIL, True)


def test_methods_on_paddlefleet_are_judged_too():
    """With stand-ins for paddlefleet, under which PaddleFormers' real modules import: all are known."""
    from stub_paddlefleet import stubbed_paddlefleet

    with stubbed_paddlefleet():
        checks = by_subject(check_upstream())
    here = [family for group in FAMILIES.values() for family in group if family.name != "PaddleOCR-VL"]  # wants triton
    names = [method.name for family in here for method in (*family.replaced, *family.called)]
    assert len(names) > 11
    assert {name: checks[name].state for name in names} == dict.fromkeys(names, PASS)
    for name in ("GPTEmbedding", "GPTLMHead"):
        assert checks[f"gpt_layer_specs.{name}"].state == PASS
    for name in ("PaddleFleet's embedding", "PaddleFleet's LM head"):
        assert checks[name].message.startswith("known; models would be made of a subclass")


def test_paddlefleets_own_models_are_named(tmp_path):
    """A WARN where it has them, by its files alone; no line where it has none. The fake cannot be imported."""
    package = tmp_path / "paddlefleet"
    package.mkdir()
    (package / "__init__.py").write_text("raise AssertionError('imported')")
    assert "paddlefleet.transformers" not in by_subject(call_json("doctor", "--no-upstream", cwd=tmp_path)[1]["checks"])
    (package / "transformers").mkdir()
    (package / "transformers" / "__init__.py").touch()
    code, found = call_json("doctor", "--no-upstream", cwd=tmp_path)
    check = by_subject(found["checks"])["paddlefleet.transformers"]
    assert (code, check["state"]) == (0, WARN)
    assert "this release changes those of paddleformers.transformers alone" in check["message"]
    assert check["fix"].startswith("build models from paddleformers.transformers of PaddleFormers 1.2.0")


def test_the_plugin_without_paddleformers_says_what_is_missing():
    """The sentence of `apply_to_paddleformers`, and not that of an import in it."""
    run = "import runpy, sys; sys.modules['paddleformers'] = None; runpy.run_module('paddle_vl_sp.formers.plugin')"
    done = python(run)
    assert "ImportError: this changes PaddleFormers' classes, and paddleformers is not installed" in done.stderr


def test_the_switch_is_named(monkeypatch):
    """PADDLE_VL_SP=0 explains, once, why nothing is replaced."""
    assert by_subject(check_versions())["switches"].state == PASS
    monkeypatch.setenv("PADDLE_VL_SP", "0")
    check = by_subject(check_versions())["switches"]
    assert (check.state, check.fix) == (WARN, "unset PADDLE_VL_SP")
    assert "changes nothing in PaddleFormers" in check.message
    assert list(check_upstream()) == []


@pytest.mark.parametrize("name", ["PADDLE_VL_SP", "PADDLE_VL_SP_CHECK", "PADDLE_VL_SP_LOG", "PADDLE_VL_SP_BACKEND"])
def test_a_switch_with_an_unknown_word_fails_and_the_rest_is_checked(name):
    """A line that names it, with the words there are, and not a traceback of the first check that reads it."""
    code, found = call_json("doctor", **{name: "perhaps"})
    checks = by_subject(found["checks"])
    assert (code, checks["switches"]["state"]) == (1, FAIL)
    assert f"{name} is one of" in checks["switches"]["fix"]
    assert checks["backend"]["state"] in (PASS, WARN)
    assert checks.keys() >= {*REPLACED}


def test_operators_for_another_paddle_are_found(copy):
    """A library with another commit in it: both are named, the rest of the package works in plain Paddle."""
    with_operators()
    library = load.library_path(copy / "paddle_vl_sp")
    commit = load.build_info(library)["commit"].encode()
    library.write_bytes(library.read_bytes().replace(b"commit=" + commit, b"commit=" + b"0" * len(commit)))
    code, found = call_json("doctor", "--no-upstream", cwd=copy)
    checks = by_subject(found["checks"])
    assert checks["paddle_vl_sp"]["message"].endswith(str(copy / "paddle_vl_sp"))
    assert (code, checks["operators"]["state"], checks["backend"]["state"]) == (0, WARN, WARN)  # slower, and right
    assert f"was built for Paddle {paddle.version.full_version} (0000000000)" in checks["operators"]["message"]
    assert "--no-build-isolation" in checks["operators"]["fix"]
    assert call("selftest", cwd=copy).returncode == 0


def test_no_operators_at_all_is_a_warning(copy):
    """Plain Paddle is used and is right; PADDLE_VL_SP_BACKEND=op makes it a failure."""
    for library in (copy / "paddle_vl_sp").glob("_ops*.so"):
        library.unlink()
    code, found = call_json("doctor", "--no-upstream", cwd=copy)
    checks = by_subject(found["checks"])
    assert (code, checks["operators"]["state"], checks["backend"]["state"]) == (0, WARN, WARN)
    assert "pip install" in checks["operators"]["fix"]
    assert json.dumps(found).count("--no-build-isolation") == 1
    code, found = call_json("doctor", "--no-upstream", cwd=copy, PADDLE_VL_SP_BACKEND="op")
    checks = by_subject(found["checks"])
    assert (code, checks["backend"]["state"]) == (1, FAIL)
    assert json.dumps(found).count("--no-build-isolation") == 1


@pytest.mark.parametrize("cuda", ["", "13.0"])
def test_a_broken_cuda_home_is_found(monkeypatch, tmp_path, cuda):
    """Of a folder that does not exist and of one without nvcc; plain Paddle works all the same."""
    for home, why in ((tmp_path / "gone", "there is no such folder"), (tmp_path, "it has no bin/nvcc")):
        monkeypatch.setenv("CUDA_HOME", str(home))
        check = by_subject(check_compilers(cuda))["CUDA_HOME"]
        assert (check.state, why in check.message) == (WARN, True)
        assert "CUDA_HOME" in check.fix


def test_a_good_cuda_home_passes(monkeypatch, tmp_path):
    """Its nvcc is the one that is shown; of another major version than Paddle's CUDA it is of no use."""
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\necho nvcc\necho Cuda compilation tools, release 99.1\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    checks = by_subject(check_compilers("99.0"))
    assert checks["CUDA_HOME"].state == PASS
    assert (checks["nvcc"].state, checks["nvcc"].message) == (PASS, f"{nvcc}: Cuda compilation tools, release 99.1")
    check = by_subject(check_compilers("13.0"))["nvcc"]
    assert (check.state, "and Paddle has CUDA 13.0" in check.message) == (WARN, True)
    assert check.fix == "the toolkit of CUDA 13: export CUDA_HOME"


def test_a_compiler_that_does_not_run_is_a_warning(monkeypatch, tmp_path):
    """With its name and what the system says."""
    compiler = tmp_path / "g++"
    compiler.write_bytes(b"\x7fELF of another machine")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    check = by_subject(check_compilers(""))["compiler"]
    assert (check.state, check.message.startswith(f"{compiler} does not run: ")) == (WARN, True)


def test_missing_compilers_are_named(monkeypatch, tmp_path):
    """No g++ is a warning; no nvcc is one only where Paddle has CUDA."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(installation, "USUAL_NVCC", str(tmp_path / "nvcc"))
    for name in ("CXX", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    checks = by_subject(check_compilers(""))
    assert (checks["compiler"].state, checks["nvcc"].state) == (WARN, PASS)
    assert "apt install g++" in checks["compiler"].fix
    assert by_subject(check_compilers("13.0"))["nvcc"].state == WARN


def test_the_conflict_of_numpy_and_pyarrow_is_found(monkeypatch):
    """By their versions, and by an import that fails."""
    versions = {"numpy": "1.26.4", "pyarrow": "26.0.0"}
    monkeypatch.setattr(installation, "installed", lambda name: versions.get(name, ""))
    (check,) = check_conflicts()
    assert (check.state, check.fix) == (FAIL, 'pip install "pyarrow<26"')
    assert "numpy 1.26.4, pyarrow 26.0.0" in check.message
    versions["pyarrow"] = "25.0.0"
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert [check.state for check in check_conflicts()] == [FAIL]
    versions["pyarrow"] = ""
    assert [check.state for check in check_conflicts()] == [PASS]


def test_two_paddles_are_found(monkeypatch):
    """paddlepaddle and paddlepaddle-gpu overwrite each other's files."""
    versions = {"paddlepaddle": "3.3.1", "paddlepaddle-gpu": "3.2.0"}
    monkeypatch.setattr(installation, "installed", lambda name: versions.get(name, ""))
    check = by_subject(check_conflicts())["two Paddles"]
    assert (check.state, check.message) == (FAIL, "paddlepaddle 3.3.1 and paddlepaddle-gpu 3.2.0")


def test_an_old_paddle_is_named(monkeypatch):
    """Below 3.3 packages of operators break."""
    assert check_paddle().state == PASS
    monkeypatch.setattr(paddle.version, "full_version", "3.2.2")
    check = check_paddle()
    assert (check.state, "older than 3.3" in check.message) == (WARN, True)


def test_a_paddle_with_cuda_and_operators_without(monkeypatch):
    """They are used on the CPU only, which is a warning with the fix."""
    with_operators()
    monkeypatch.setattr(paddle, "is_compiled_with_cuda", lambda: True)
    check = by_subject(check_operators())["operators"]
    assert (check.state, "built without CUDA, since it was not asked for" in check.message) == (WARN, True)


def use_operators_with_cuda(monkeypatch, folder, **built):
    """A library in `folder`, of which only the record is there, under a Paddle with CUDA."""
    monkeypatch.setattr(load, "HERE", folder)
    record = " ".join(f"{key}={value}" for key, value in (load.running_paddle() | built).items())
    load.library_path(folder).write_text(f"vlsp-build {record} ")
    monkeypatch.setattr(paddle, "is_compiled_with_cuda", lambda: True)


def test_gpus_that_the_operators_cannot_run_on(monkeypatch, tmp_path):
    """By each GPU's number and architecture, what the library holds, and the fix; one that fits is no finding."""
    use_operators_with_cuda(monkeypatch, tmp_path, cuda="80,90", ptx="90")
    monkeypatch.setattr(paddle.device.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(paddle.device.cuda, "get_device_capability", lambda gpu: [(9, 0), (7, 5)][gpu])
    check = by_subject(check_operators())["operators"]
    assert check.state == WARN
    assert "plain Paddle is used on gpu:1: they hold machine code for sm_80, sm_90 and PTX of 90" in check.message
    assert "PADDLE_CUDA_ARCH_LIST=7.5" in check.message
    monkeypatch.setattr(paddle.device.cuda, "get_device_capability", lambda gpu: (12, 0))
    check = by_subject(check_operators())["operators"]
    assert (check.state, check.message.endswith("CPU and machine code for sm_80, sm_90 and PTX of 90")) == (PASS, True)


def test_why_there_is_no_cuda_code_is_told(monkeypatch, tmp_path):
    """In the words that the build has left in the library."""
    use_operators_with_cuda(monkeypatch, tmp_path, cuda="0", why="nvcc_failed")
    check = by_subject(check_operators())["operators"]
    assert (check.state, "was built without CUDA, since nvcc failed: plain" in check.message) == (WARN, True)


def test_without_paddle_the_rest_is_checked():
    """A FAIL with the fix, and no traceback."""
    done = call_without(["paddle"], "doctor", "--no-upstream")
    assert done.returncode == 1
    assert "FAIL  Paddle" in done.stdout
    assert "fix: `pip install paddlepaddle` (CPU; for a GPU" in done.stdout
    assert "install this package again" in done.stdout
    assert "Traceback" not in done.stderr


def test_without_paddleformers_the_rest_works():
    """A WARN with the fix, exit code 0; the self-test does not need it."""
    done = call_without(["paddleformers"], "doctor")
    assert done.returncode == 0, done.stdout
    assert re.search("WARN  paddleformers +not installed", done.stdout)
    assert done.stdout.count('fix: pip install "paddleformers==1.2.0" "pyarrow<26"') == 1
    assert not re.search("upstream", done.stdout)
    assert call_without(["paddleformers", "matplotlib"], "selftest").returncode == 0


def test_an_import_that_dies_is_a_finding(monkeypatch, capsys):
    """Whatever PaddleFormers raises while it is imported."""

    def dies():
        raise AttributeError("module 'numpy' has no attribute 'x'")

    monkeypatch.setattr(doctor, "check_upstream", dies)
    assert main(["doctor", "--json"]) == 1
    check = by_subject(json.loads(capsys.readouterr().out)["checks"])["upstream"]
    assert (check["state"], "AttributeError: module 'numpy'" in check["message"]) == (FAIL, True)
