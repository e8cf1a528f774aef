"""What setup.py builds where nvcc is absent, fails, or is for another CUDA; with compilers that do next to nothing."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from compilers import unoptimized
from paddle_vl_sp.backends.load import library_path
from paddle_vl_sp.backends.record import build_info

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "paddle_vl_sp"
USUAL_CUDA = "/usr/local/cuda"
# What setup.py asks of Paddle, which takes a second to import; it says that it has CUDA. No nvcc in the usual place.
SETUP = """
import importlib.util, pathlib, runpy, sys
from types import SimpleNamespace
cuda, hidden = sys.argv[1:3]
file = importlib.util.find_spec("paddle").origin
folder = pathlib.Path(file).parent
facts = runpy.run_path(str(folder / "version" / "__init__.py"))
sys.modules["paddle"] = SimpleNamespace(
    __file__=file,
    sysconfig=SimpleNamespace(get_include=lambda: str(folder / "include")),
    version=SimpleNamespace(full_version=facts["full_version"], commit=facts["commit"], cuda=lambda: cuda),
    is_compiled_with_cuda=lambda: cuda != "False",
)
is_file = pathlib.Path.is_file
pathlib.Path.is_file = lambda self: is_file(self) and not (hidden and str(self).startswith(hidden))
sys.argv = ["setup.py", *sys.argv[3:]]
runpy.run_path("setup.py", run_name="__main__")
"""
# g++ for the build record and the link, an empty object for the other sources.
COMPILER = """#!/bin/sh
case "$*" in *build_record.cc* | *-shared*) exec g++ "$@" ;; esac
while [ $# -gt 0 ]; do [ "$1" = -o ] && out=$2; shift; done
exec g++ -fPIC -x c++ -c /dev/null -o "$out"
"""
NVCC = """#!/bin/sh
case "$*" in
  *--version*) echo "Cuda compilation tools, release 12.9, V12.9.86"; exit ;;
  *--dryrun*) exit ;;
esac
echo "$@" >> "$0.log"
case "$*" in *compute_35*) echo "nvcc fatal: Unsupported gpu architecture 'compute_35'" >&2; exit 1 ;; esac
while [ $# -gt 0 ]; do [ "$1" = -o ] && out=$2; shift; done
exec g++ -fPIC -x c++ -c /dev/null -o "$out"
"""
FAILING = "#!/bin/sh\necho 'nvcc fatal: no host compiler' >&2\nexit 1\n"

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")


def program(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


class Machine:
    """A folder with compilers, and the builds that are made with them."""

    def __init__(self, folder):
        self.folder, self.cuda = folder, folder / "cuda"
        for name in ("g++", "as", "ld", "sh"):
            (folder / "bin").mkdir(exist_ok=True)
            (folder / "bin" / name).symlink_to(shutil.which(name))
        program(folder / "cxx", COMPILER)

    def toolkit(self, nvcc=NVCC, library=True):
        program(self.cuda / "bin" / "nvcc", nvcc)
        (self.cuda / "lib64").mkdir()
        if library:
            (self.cuda / "lib64" / "libcudart_static.a").write_bytes(b"!<arch>\n")

    def build(self, paddle_cuda="12.6", hidden=USUAL_CUDA, **env):
        """The process and the record of the library; None where there is no library."""
        where = ("-b", str(self.folder / "lib"), "-t", str(self.folder / "temp"))
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", SETUP, paddle_cuda, hidden, "-q", "build_ext", *where],
            cwd=ROOT,
            env={name: value for name, value in os.environ.items() if not name.startswith(("CUDA", "PADDLE"))}
            | {"PATH": str(self.folder / "bin"), "CC": str(self.folder / "cxx"), "CXX": str(self.folder / "cxx")}
            | env,
            capture_output=True,
            text=True,
        )
        library = library_path(self.folder / "lib" / "paddle_vl_sp")
        return done, build_info(library) if library.is_file() else None

    def asked(self):
        """The architectures in nvcc's arguments, the same for every file."""
        lines = (self.cuda / "bin" / "nvcc.log").read_text().splitlines()
        (found,) = {tuple(re.findall(r"-gencode=arch=(\S+)", line)) for line in lines}
        return list(found)


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)


def last_words(done):
    """What stands between the two lines at the end."""
    return done.stderr.strip().split("\n")[-2]


WITHOUT_CUDA = {
    "no nvcc": ({}, {}, "no nvcc was found"),
    "a failing nvcc": ({"nvcc": FAILING}, {}, "nvcc failed on device.cu"),
    "an unknown architecture": ({}, {"PADDLE_CUDA_ARCH_LIST": "3.5"}, "nvcc failed on device.cu"),
    "another major version": (
        {},
        {"paddle_cuda": "13.0"},
        "nvcc was that of CUDA 12.9 and Paddle has CUDA 13.0",
    ),
    "no library of the runtime": ({"library": False}, {}, "they did not compile or link with CUDA"),
}


@pytest.mark.parametrize("name", WITHOUT_CUDA)
def test_without_cuda_code_there_are_operators_for_the_cpu(machine, name):
    """By the record in the library, and the last words of the build."""
    toolkit, given, why = WITHOUT_CUDA[name]
    if name != "no nvcc":
        machine.toolkit(**toolkit)
    done, info = machine.build(**{"CUDA_HOME": str(machine.cuda)} | given)
    assert (done.returncode, info and info["cuda"]) == (0, "0"), done.stderr
    assert info["why"].replace("_", " ") == why
    assert last_words(done) == (
        f"paddle_vl_sp: the operators are for the CPU only, since {why}: on a GPU, slower plain Paddle will be used"
    )


@pytest.mark.parametrize("number", range(len(WITHOUT_CUDA)), ids=list(WITHOUT_CUDA))
def test_cuda_code_that_is_required_fails_the_build(machine, number):
    """An error with the reason, and no library; required in one of two ways, in turn."""
    required = ({"PADDLE_VL_SP_BUILD": "require"}, {"PADDLE_VL_SP_CUDA": "1"})[number % 2]
    name, (toolkit, given, why) = list(WITHOUT_CUDA.items())[number]
    if name != "no nvcc":
        machine.toolkit(**toolkit)
    done, info = machine.build(**{"CUDA_HOME": str(machine.cuda)} | given | required)
    assert (done.returncode != 0, info) == (True, None)
    assert f"RuntimeError: CUDA operators are required: {why}; PADDLE_VL_SP_CUDA=0" in done.stderr


def test_a_paddle_for_the_cpu_needs_no_nvcc(machine):
    """No word about it, also where operators are required."""
    done, info = machine.build("False", PADDLE_VL_SP_BUILD="require")
    assert (done.returncode, info and info.get("why"), "CUDA" in done.stderr) == (0, None, False), done.stderr


@pytest.mark.parametrize(
    ("listed", "machine_code", "ptx"),
    [
        ("", "80,90", "90"),
        ("8.0;8.6", "80,86", "86"),
        ("9.0 8.0+PTX", "80,90", "80,90"),
        ("8.0,10.0", "80,100", "100"),
        ("9.0a", "90a", "90a"),
        ("8.0;9.0a", "80,90a", "80"),
    ],
)
def test_ptx_of_the_highest_architecture_and_of_those_that_ask(machine, listed, machine_code, ptx):
    """Exact, in nvcc's arguments and in the record; that of an architecture with a letter runs nowhere else."""
    machine.toolkit()
    done, info = machine.build(CUDA_HOME=str(machine.cuda), PADDLE_CUDA_ARCH_LIST=listed)
    assert (info and info["cuda"], info and info["ptx"]) == (machine_code, ptx), done.stderr
    wanted = [f"compute_{arch},code=sm_{arch}" for arch in machine_code.split(",")]
    assert machine.asked() == wanted + [f"compute_{arch},code=compute_{arch}" for arch in ptx.split(",")]


def test_architectures_that_are_no_numbers_are_refused(machine):
    """Also where everything is optional: it is the user's word."""
    machine.toolkit()
    done, info = machine.build(CUDA_HOME=str(machine.cuda), PADDLE_CUDA_ARCH_LIST="8.0;Hopper")
    assert (done.returncode != 0, info) == (True, None)
    assert "PADDLE_CUDA_ARCH_LIST must be numbers such as 8.0;9.0+PTX, got 8.0;Hopper" in done.stderr


@pytest.mark.parametrize("way", ["CUDA_HOME", "CUDA_PATH", "PATH"])
def test_nvcc_is_found_as_paddle_finds_it(machine, way):
    """By each way alone."""
    machine.toolkit()
    path = {"PATH": f"{machine.cuda / 'bin'}:{machine.folder / 'bin'}"}
    done, info = machine.build(**path if way == "PATH" else {way: str(machine.cuda)})
    assert (info or {}).get("cuda") == "80,90", done.stderr


@pytest.mark.skipif(not Path(USUAL_CUDA, "bin", "nvcc").is_file(), reason=f"no nvcc in {USUAL_CUDA}")
def test_nvcc_is_found_in_the_usual_place(machine):
    """With nothing in the environment: it fails on an architecture that does not exist."""
    done, info = machine.build("False", hidden="", PADDLE_VL_SP_CUDA="1", PADDLE_CUDA_ARCH_LIST="1.0")
    assert (done.returncode != 0, info) == (True, None)
    assert "CUDA operators are required: nvcc failed on device.cu" in done.stderr


def test_what_was_missing_is_built_the_next_time(machine):
    """Into the same folders, with no source changed."""
    assert machine.build()[1]["cuda"] == "0"
    machine.toolkit()
    done, info = machine.build(CUDA_HOME=str(machine.cuda))
    assert (info["cuda"], "why" in info) == ("80,90", False), done.stderr


def test_without_a_compiler_the_last_words_say_so(machine):
    """The build goes on, as the package works without operators."""
    done, info = machine.build(CC="no-such-compiler", CXX="no-such-compiler")
    assert (done.returncode, info) == (0, None)
    assert last_words(done).startswith("paddle_vl_sp: there are no operators, slower plain Paddle will be used: ")


def test_the_operators_of_a_build_whose_nvcc_failed_run_on_the_cpu(machine):
    """All of it compiled: the sum of what was added, and the reason in `backend()`."""
    machine.toolkit(FAILING)
    real = unoptimized(machine.folder) | {"PATH": os.environ["PATH"]}
    done, info = machine.build(CUDA_HOME=str(machine.cuda), **real)
    assert info, done.stderr
    target = machine.folder / "installed" / "paddle_vl_sp"
    shutil.copytree(PACKAGE, target, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    shutil.copy(library_path(machine.folder / "lib" / "paddle_vl_sp"), target)
    code = """
import numpy as np, paddle, paddle_vl_sp as v
plan = v.plan_visual(paddle.to_tensor(np.eye(4, dtype=bool)), None, v.SeqLayout(4), sequence_first=False)
print(v.add_rows(paddle.zeros([4, 4, 2]), paddle.ones([4, 2]), plan).sum().item(), v.backend())
"""
    env = os.environ | {"PYTHONPATH": str(target.parent), "PADDLE_VL_SP_BACKEND": "op"}
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, cwd=target.parent, env=env, capture_output=True, text=True)
    assert done.stdout.strip().endswith(", without CUDA: nvcc failed on device.cu"), done.stderr
    assert done.stdout.startswith("8.0 op on cpu: operators built for Paddle")
