"""What users install: wheels with operators and without, in environments of their own; CUDA code where nvcc is."""

import importlib
import os
import re
import shutil
import struct
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import paddle
import pytest

from compilers import unoptimized
from paddle_vl_sp import __version__
from paddle_vl_sp.backends.record import build_info

ROOT = Path(__file__).parents[2]
NOT_SOURCE = shutil.ignore_patterns(".venv", ".git", "build", "*.so", "*.egg-info", "__pycache__", ".hypothesis")
LOAD = """
import sys, numpy as np, paddle, paddle_vl_sp as v
plan = v.plan_visual(paddle.to_tensor(np.eye(3, dtype=bool)), None, v.SeqLayout(3), sequence_first=True)
print(v.backend().name, v.backend().devices, plan.update_indices.tolist())
"""


def run(*command, cwd, **env):
    return subprocess.run(
        [sys.executable, *command], cwd=cwd, env=os.environ | env, capture_output=True, text=True, check=False
    )


def wheel_of(archive, folder, **env):
    done = run(
        *("-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-w", str(folder), str(archive)), cwd=folder, **env
    )
    return done, next(folder.glob("*.whl"), None)


STRAY = ("paddle_vl_sp/_ops.cpython-310-x86_64-linux-gnu.so", "paddle_vl_sp/__pycache__/plan.pyc", "custom_ops/rows.o")


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """The source archive of the tree as it is, with things in it that builds leave behind."""
    source = tmp_path_factory.mktemp("source") / "tree"
    shutil.copytree(ROOT, source, ignore=NOT_SOURCE)
    for name in STRAY:
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).touch()
    done = run("setup.py", "-q", "sdist", "-d", "..", cwd=source, PADDLE_VL_SP_BUILD="skip")
    assert done.returncode == 0, done.stderr
    return next(source.parent.glob("*.tar.gz"))


def loaded_from(wheel, folder):
    """What a new process says that sees nothing but the wheel's content."""
    target = folder / "installed"
    zipfile.ZipFile(wheel).extractall(target)
    return run("-W", "ignore", "-c", LOAD, cwd=target, PYTHONPATH=str(target)).stdout.split("\n")[0]


def installed(wheel, folder):
    """The Python of a new environment that holds the wheel's content, and sees the Paddle that is here."""
    python = folder / "fresh" / "bin" / "python"
    venv.create(folder / "fresh", symlinks=True)
    done = run("-m", "pip", "--python", str(python), "install", "-q", "--no-deps", "--no-index", str(wheel), cwd=folder)
    assert done.returncode == 0, done.stderr
    there, here = (sysconfig.get_path("purelib", vars={"base": base}) for base in (folder / "fresh", sys.prefix))
    Path(there, "here.pth").write_text(here)  # as a line of a .pth, without what is installed here by its own .pth
    return python


def check_content(wheel):
    """The licence, the types and the modules of the source, and nothing else but at most one library; its path."""
    names = zipfile.ZipFile(wheel).namelist()
    assert [name for name in names if re.search(r"\.dist-info/.*LICENSE$", name)]
    info = {name for name in names if ".dist-info/" in name}
    libraries = {name for name in names if name.endswith(".so")}
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "paddle_vl_sp").rglob("*.py")}
    assert {*names} - info - libraries == modules | {"paddle_vl_sp/py.typed"}
    return libraries


def used_in(python, folder):
    """What the installed package says, by a script and by its command."""
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    commands = ([python, "-W", "ignore", "-c", LOAD], [python.with_name("paddle-vl-sp"), "plugin-path"])
    done = [subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True) for command in commands]
    plugin = Path(done[1].stdout.strip())
    assert plugin.is_file(), done[1].stderr
    assert plugin.is_relative_to(folder / "fresh")
    return done[0].stdout.split("\n")[0]


def test_the_source_archive_holds_what_a_build_needs(archive):
    """Every source of the operators and every module, the licence and the pages about it; nothing that builds leave."""
    with tarfile.open(archive) as opened:
        names = {name.partition("/")[2] for name in opened.getnames()}
    sources = [path for folder in ("custom_ops", "paddle_vl_sp") for path in (ROOT / folder).rglob("*.[pch]*")]
    needed = {path.relative_to(ROOT).as_posix() for path in sources if path.suffix not in (".pyc", ".o", ".so")}
    assert names >= needed | {"LICENSE", "README.md", "CHANGELOG.md", "CITATION.cff", "pyproject.toml", "setup.py"}
    assert not names & {*STRAY}


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
def test_the_wheel_with_operators_names_its_paddle_and_works_in_a_new_environment(archive, tmp_path):
    """By its name, what it holds, its size, and a plan made by the operators; no path of this machine in them."""
    done, wheel = wheel_of(archive, tmp_path, PADDLE_VL_SP_BUILD="require", **unoptimized(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    device = f"cu{paddle.version.cuda().replace('.', '')}" if paddle.is_compiled_with_cuda() else "cpu"
    this = f"cp{sys.version_info[0]}{sys.version_info[1]}"
    name = f"paddle_vl_sp-{__version__}+paddle{paddle.version.full_version}.{device}-{this}-{this}-linux_"
    assert wheel.name.startswith(name)
    (library,) = check_content(wheel)
    content = zipfile.ZipFile(wheel).read(library)
    assert library.endswith(sysconfig.get_config_var("EXT_SUFFIX"))
    assert content.count(b"vlsp-build ") == 1
    assert str(Path(paddle.__file__).parent).encode() not in content
    assert wheel.stat().st_size < 1_000_000
    assert used_in(installed(wheel, tmp_path), tmp_path) == "op ('cpu',) [0, 4, 8]"


def test_the_wheel_without_operators_is_for_every_python_and_works_in_a_new_environment(archive, tmp_path):
    """By its name, what it holds, and a plan made with plain Paddle."""
    _, wheel = wheel_of(archive, tmp_path, PADDLE_VL_SP_BUILD="skip")
    assert wheel.name == f"paddle_vl_sp-{__version__}-py3-none-any.whl"
    assert not check_content(wheel)
    assert used_in(installed(wheel, tmp_path), tmp_path) == "python () [0, 4, 8]"


def test_without_a_compiler_the_package_installs_and_plain_paddle_is_used(archive, tmp_path):
    """By what the wheel holds and a plan made with its content alone."""
    _, wheel = wheel_of(archive, tmp_path, CC="no-such-compiler", CXX="no-such-compiler")
    assert not [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".so")]
    assert loaded_from(wheel, tmp_path) == "python () [0, 4, 8]"


def test_without_a_compiler_operators_that_are_required_fail_the_build(archive, tmp_path):
    """An error, and no wheel."""
    done, wheel = wheel_of(
        archive, tmp_path, CC="no-such-compiler", CXX="no-such-compiler", PADDLE_VL_SP_BUILD="require"
    )
    assert done.returncode != 0
    assert wheel is None


@pytest.fixture(scope="module")
def cuda_library(tmp_path_factory):
    """Built for sm_80 and sm_90 and linked against the installed Paddle; no GPU is needed for that."""
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc: the CUDA code is not compiled here")
    folder = tmp_path_factory.mktemp("cuda")
    where = ("-b", str(folder / "lib"), "-t", str(folder / "temp"))
    env = {"PADDLE_VL_SP_CUDA": "1", "PADDLE_VL_SP_BUILD": "require", "PADDLE_CUDA_ARCH_LIST": "8.0;9.0"}
    env |= unoptimized(folder)
    done = run("setup.py", "-q", "build_ext", *where, cwd=ROOT, **env)
    assert done.returncode == 0, done.stdout + done.stderr
    return next((folder / "lib").rglob("_ops*.so"))


def device_code(library):
    """What the fat binaries in a file hold, by their headers: ("ptx" or "machine code", architecture)."""
    content, found = library.read_bytes(), []
    for start in re.finditer(re.escape(struct.pack("<I", 0xBA55ED50)), content):
        _, _, header, size = struct.unpack_from("<IHHQ", content, start.start())
        at, end = start.start() + header, start.start() + header + size
        while at < end:
            kind, _, entry_header, entry_size = struct.unpack_from("<HHIQ", content, at)
            (architecture,) = struct.unpack_from("<I", content, at + 28)
            found.append(({1: "ptx", 2: "machine code"}[kind], architecture))
            at += entry_header + entry_size
    return found


def test_operators_with_cuda_say_what_they_were_built_for(cuda_library):
    """Exact architectures, in the record and in the device code of every file: PTX of the highest one."""
    info = build_info(cuda_library)
    assert (info["cuda"], info["ptx"]) == ("80,90", "90")
    assert set(device_code(cuda_library)) == {("machine code", 80), ("machine code", 90), ("ptx", 90)}
    assert device_code(cuda_library).count(("ptx", 90)) == device_code(cuda_library).count(("machine code", 80)) >= 2


def test_operators_with_cuda_register_run_on_the_cpu_and_refuse_what_does_not_fit(cuda_library):
    """Exact names and a plan on the CPU, in a process of its own."""
    code = f"""
import paddle
from paddle.utils.cpp_extension import load_op_meta_info_and_register_op
print(sorted(load_op_meta_info_and_register_op({str(cuda_library)!r})))
from paddle import _C_ops
ids = paddle.to_tensor([[1, 5, 5, 1]])
print([x.tolist() for x in _C_ops._run_custom_op("vlsp_plan", ids, None, [5], [1, 0, 1, 1, 0, 0], 4, False, -1, False)])
try:
    _C_ops._run_custom_op("vlsp_plan", ids, None, [5], [1, 0, 1, 3, 0, 0], 4, False, -1, False)
except ValueError as error:
    print("refused" if "the length 4 is not divisible by 3" in str(error) else error)
"""
    lines = run("-W", "ignore", "-c", code, cwd=cuda_library.parent).stdout.split("\n")
    names = ["vlsp_add_rows", "vlsp_add_rows_", "vlsp_add_rows_back", "vlsp_plan", "vlsp_replace_rows"]
    assert lines[:3] == [str(names), "[[1, 2], [0, 1], [2, 2]]", "refused"]


@pytest.mark.parametrize(
    ("old", "name", "new"),
    [
        ("consensus", "check_same", "comm.agree"),
        ("consensus", "fingerprint", "comm.agree"),
        ("emulate", "SubGroup", "testing.subgroup"),
        ("local", "wire_bytes", "comm.local_plan"),
        ("local", "plan_visual_local", "comm.local_plan"),
    ],
)
def test_modules_that_pages_of_0_1_0_name_are_still_there(old, name, new):
    """The same object, and a warning that says where it is now."""
    with pytest.warns(DeprecationWarning, match=f"paddle_vl_sp.{old} has moved to paddle_vl_sp.{new}"):
        found = getattr(importlib.import_module(f"paddle_vl_sp.{old}"), name)
    assert found is getattr(importlib.import_module(f"paddle_vl_sp.{new}"), name)
