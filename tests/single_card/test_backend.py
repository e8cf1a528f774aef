"""Which implementation serves is decided once, said aloud, and never aborts the process."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import paddle_vl_sp
from paddle_vl_sp.backends import load
from paddle_vl_sp.settings import BACKEND

PACKAGE = Path(paddle_vl_sp.__file__).parent
SHOW = "import paddle_vl_sp; print(paddle_vl_sp.backend())"
USE = """
import numpy as np, paddle, paddle_vl_sp as v
plan = v.plan_visual(paddle.to_tensor(np.eye(4, dtype=bool)), None, v.SeqLayout(4), sequence_first=False)
out = v.add_rows(paddle.zeros([4, 4, 2], "bfloat16"), paddle.ones([4, 2], "bfloat16"), plan)
print(out.astype("float32").sum().item())
print(v.backend())
"""


def python(code, path=PACKAGE.parent, **env):
    """The last line and all output of a new process that sees the package at `path`."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env=os.environ | {"PYTHONPATH": str(path)} | env,
        cwd=path,
        capture_output=True,
        text=True,
    )
    return done, done.stdout.strip().splitlines()


@pytest.fixture
def copy(tmp_path):
    """The package's Python files in another place, and its operators where it has them."""
    shutil.copytree(PACKAGE, tmp_path / "paddle_vl_sp", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def with_operators():
    if load.backend().name != "op":
        pytest.skip("no custom operators: the header of this report says why")


@pytest.mark.skipif(shutil.which("g++") is None or BACKEND in os.environ, reason="no g++, or another choice")
def test_with_a_compiler_the_operators_are_what_is_tested():
    """Without them, hundreds of tests skip or run in plain Paddle, and all is green."""
    assert load.backend().name == "op", f"{load.backend()}; {load.rebuild()}"


def test_python_can_be_asked_for():
    """The result and the reason, without a warning."""
    done, lines = python(USE, PADDLE_VL_SP_BACKEND="python")
    assert lines == ["8.0", "python: PADDLE_VL_SP_BACKEND=python"]
    assert "WARNING" not in done.stderr


def test_operators_can_be_asked_for():
    """The result and the reason."""
    with_operators()
    _, lines = python(USE, PADDLE_VL_SP_BACKEND="op")
    assert lines[0] == "8.0"
    assert lines[1].startswith("op on cpu")


def test_an_unknown_choice_is_refused():
    """Refused with the choices and what was got."""
    done, _ = python(SHOW, PADDLE_VL_SP_BACKEND="cuda")
    assert "PADDLE_VL_SP_BACKEND must be one of 'auto', 'op', 'python', got 'cuda'" in done.stderr


def test_without_operators_plain_paddle_serves_and_says_so_once(copy):
    """The same result, one warning with one way out; insisting is an error."""
    for library in (copy / "paddle_vl_sp").glob("_ops*.so"):
        library.unlink()
    done, lines = python(USE, copy)
    assert lines[0] == "8.0"
    assert lines[1] == f"python: there are no compiled operators in {copy / 'paddle_vl_sp'}"
    assert done.stderr.count("the custom operators are not available, plain Paddle is used") == 1
    assert done.stderr.count("pip install") + done.stderr.count("start from another folder") == 1
    done, _ = python(SHOW, copy, PADDLE_VL_SP_BACKEND="op")
    assert (
        "OperatorsUnavailable: PADDLE_VL_SP_BACKEND=op requires the operators: there are no compiled operators"
        in done.stderr
    )


@pytest.fixture
def elsewhere(monkeypatch, tmp_path):
    """This package as if it stood in an empty folder, with nothing else installed."""
    monkeypatch.setattr(load, "HERE", tmp_path / "paddle_vl_sp")
    monkeypatch.setattr("importlib.metadata.distributions", lambda name: [])
    return tmp_path


def test_the_mend_of_a_source_tree_is_an_editable_install(elsewhere, monkeypatch):
    """The exact command, and the compiler where there is none."""
    assert "in the folder of the source: pip install" in load.rebuild()
    (elsewhere / "custom_ops").mkdir()
    assert load.rebuild().endswith(f"--editable {elsewhere}")
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert load.rebuild().startswith("install a C++ compiler (apt install g++), then pip install")


def test_a_source_tree_in_front_of_the_installed_package_is_told(elsewhere, monkeypatch):
    """By the folder of the installed package, only where that has operators."""
    installed = elsewhere / "site-packages" / "paddle_vl_sp"
    installed.mkdir(parents=True)
    found = SimpleNamespace(locate_file=lambda name: elsewhere / "site-packages" / name)
    monkeypatch.setattr("importlib.metadata.distributions", lambda name: [found])
    assert "start from another folder" not in load.rebuild()
    load.library_path(installed).touch()
    assert f"finds the installed package in {installed}" in load.rebuild()


def test_operators_of_another_paddle_are_never_loaded(copy):
    """The same result in plain Paddle and both versions in the reason; insisting is an error."""
    with_operators()
    library = load.library_path(copy / "paddle_vl_sp")
    info = load.build_info(library)
    content = library.read_bytes()
    here, other = f"commit={info['commit']} ".encode(), f"commit={'0' * len(info['commit'])} ".encode()
    assert here in content
    library.write_bytes(content.replace(here, other))
    done, lines = python(USE, copy)
    assert lines[0] == "8.0"
    assert f"built for Paddle {info['paddle']} (0000" in lines[1]
    assert done.returncode == 0
    done, _ = python(SHOW, copy, PADDLE_VL_SP_BACKEND="op")
    assert "OperatorsUnavailable" in done.stderr


def test_a_damaged_library_is_not_the_end(copy):
    """The same result in plain Paddle, and the file in the reason."""
    with_operators()
    library = load.library_path(copy / "paddle_vl_sp")
    marker = library.read_bytes().split(b"vlsp-build ")[1].split(b"\0")[0]
    library.write_bytes(b"not a library, vlsp-build " + marker + b"\0")
    done, lines = python(USE, copy)
    assert done.returncode == 0
    assert lines[0] == "8.0"
    assert f"{library.name} does not load" in lines[1]


def test_what_a_library_was_built_for_is_read_without_loading_it():
    """Exact: the running Paddle, without CUDA."""
    with_operators()
    import paddle

    library = load.library_path(PACKAGE)
    assert load.build_info(library) == {
        "paddle": paddle.version.full_version,
        "commit": paddle.version.commit,
        "cuda": "0",
    }


def test_layouts_and_plans_on_the_host_import_no_paddle():
    """Nothing of Paddle among the modules of a new process."""
    code = """
import sys, numpy as np, paddle_vl_sp as v
mask, layout = np.ones((1, 4), dtype=bool), v.SeqLayout(4, sp_size=2)
v.plan_visual(mask, None, layout, sequence_first=True, num_features=4, padded=True).check()
print([name for name in sys.modules if name.startswith("paddle") and not name.startswith("paddle_vl_sp")])
"""
    assert python(code)[1] == ["[]"]


def test_of_two_pythons_side_by_side_each_takes_its_own_operators(copy):
    """One whose name sorts last is broken and stays unread; without its own, the others are named."""
    with_operators()
    own = load.library_path(copy / "paddle_vl_sp")
    for other in ("cpython-310", "cpython-399"):
        (own.parent / f"_ops.{other}-x86_64-linux-gnu.so").write_bytes(b"of another Python")
    _, lines = python(USE, copy)
    assert lines[0] == "8.0"
    assert lines[1].startswith("op on cpu")
    own.unlink()
    _, lines = python(USE, copy)
    assert lines[1].endswith(
        "for this Python, only _ops.cpython-310-x86_64-linux-gnu.so, _ops.cpython-399-x86_64-linux-gnu.so"
    )
