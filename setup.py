"""Builds the one extension, paddle_vl_sp._ops, against the Paddle that is installed; everything else is in pyproject.

PADDLE_VL_SP_BUILD     auto (default): without Paddle or a compiler the package installs without operators, and where
                       the CUDA code cannot be built, with those for the CPU; both are said at the end
                       require: fail instead, and the version names the Paddle, as in 0.2.0+paddle3.3.1.cpu
                       skip: never build, and the wheel is for every Python and machine
PADDLE_VL_SP_CUDA      auto (default): with CUDA where Paddle has it;  0: never;  1: always, or fail
PADDLE_CUDA_ARCH_LIST  8.0;9.0 (default); +PTX behind a number adds its PTX, the highest number has it anyway
CUDA_HOME, CUDA_PATH   where nvcc is, as Paddle understands them
"""

from __future__ import annotations

import copy
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.egg_info import egg_info
from setuptools.errors import BaseError, CCompilerError

SOURCES = Path("custom_ops")
BUILD = os.environ.get("PADDLE_VL_SP_BUILD", "auto")
CUDA = os.environ.get("PADDLE_VL_SP_CUDA", "auto")
MUST_HAVE_CUDA = CUDA == "1" or (BUILD == "require" and CUDA != "0")
USUAL_CUDA = "/usr/local/cuda"
BUILD_ERRORS = (BaseError, CCompilerError)
notes: list[str] = []  # what is less than it could be, said at the end


class NoCuda(Exception):
    """Why the operators have no CUDA code, in words that the library records for `doctor`."""


def find_paddle():
    """The installed Paddle, or None where there is none or nothing is to be built."""
    if BUILD == "skip":
        return None
    try:
        import paddle
    except ImportError:
        if BUILD == "require":
            raise
        notes.append("there are no operators, since there is no Paddle to build against; use --no-build-isolation")
        return None
    return paddle


def find_nvcc() -> str:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or ""
    places = [Path(home) / "bin" / "nvcc" if home else "", shutil.which("nvcc") or "", Path(USUAL_CUDA, "bin", "nvcc")]
    found = next((str(place) for place in places if place and Path(place).is_file()), "")
    if not found:
        raise NoCuda("no nvcc was found")
    return found


def check_versions(nvcc: str, paddle_cuda: str) -> None:
    """Raises where nvcc is of another major version than Paddle's CUDA; a Paddle for the CPU has none."""
    done = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False)
    release = re.search(r"release (\d+)(\.\d+)?", done.stdout)
    wanted = paddle_cuda.split(".")[0]
    if release and wanted.isdecimal() and release[1] != wanted:
        raise NoCuda(f"nvcc was that of CUDA {release[0].removeprefix('release ')} and Paddle has CUDA {paddle_cuda}")


def cuda_root(nvcc: str) -> Path:
    """Where nvcc says its headers and libraries are: the program that is called may be a wrapper somewhere else."""
    listing = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
    tops = [line.split("=", 1)[1].strip() for line in listing.splitlines() if line.startswith("#$ TOP=")]
    return Path(tops[0]).resolve() if tops else Path(nvcc).resolve().parent.parent


def cuda_architectures() -> tuple[list[str], list[str]]:
    """Those to compile machine code for and those whose PTX is embedded, such as "90".

    Later GPUs compile PTX for themselves, but not that of an architecture with a letter.
    """
    listed = re.split("[;, ]+", os.environ.get("PADDLE_CUDA_ARCH_LIST") or "8.0;9.0")
    parsed = [re.fullmatch(r"(\d+)\.?(\d)([af]?)(\+PTX)?", arch) for arch in listed if arch]
    if None in parsed or not parsed:
        raise ValueError(f"PADDLE_CUDA_ARCH_LIST must be numbers such as 8.0;9.0+PTX, got {';'.join(listed)}")
    known = sorted({(int(arch[1] + arch[2]), arch[3]): None for arch in parsed})
    ptx = {(int(arch[1] + arch[2]), arch[3]) for arch in parsed if arch[4]}
    ptx |= {max((arch for arch in known if not arch[1]), default=known[-1])}
    return [f"{number}{letter}" for number, letter in known], [f"{number}{letter}" for number, letter in sorted(ptx)]


def operators(paddle) -> Extension:
    """For the CPU; `with_cuda` makes the other form of it."""
    include, library = Path(paddle.sysconfig.get_include()), Path(paddle.__file__).parent / "base"
    extension = Extension(
        "paddle_vl_sp._ops",
        sources=sorted(str(path) for path in SOURCES.glob("*.cc")),
        depends=[str(path) for path in SOURCES.iterdir()],
        include_dirs=[str(include), str(include / "third_party")],
        define_macros=[("PADDLE_WITH_CUSTOM_KERNEL", None), ("PADDLE_EXTENSION_NAME", "_ops")],
        extra_compile_args=["-std=c++17", "-O3", "-g0", "-Wno-unused-parameter", f"-ffile-prefix-map={include}=paddle"],
        library_dirs=[str(library)],
        # A wheel has no path of the machine that built it: Paddle's library is in the process before this one is.
        extra_link_args=["-l:libpaddle.so", "-Wl,-rpath,$ORIGIN/../paddle/base", "-Wl,--strip-debug"],
        language="c++",
        optional=BUILD != "require" and CUDA != "1",
    )
    extension.built_for = {"paddle": paddle.version.full_version, "commit": paddle.version.commit, "cuda": "0"}
    extension.wants_cuda = CUDA == "1" or (CUDA == "auto" and paddle.is_compiled_with_cuda())
    extension.paddle_cuda = str(paddle.version.cuda())
    return extension


class BuildOperators(build_ext):
    """Compiles the .cu files with nvcc; they do not include Paddle, so the host compiler does all the rest."""

    def build_extension(self, ext: Extension) -> None:
        self.force = True  # a library that is there may be for another Paddle, or without CUDA
        try:
            if not (ext.wants_cuda and self.build_with_cuda(ext)):
                self.build_with(ext)
        except BUILD_ERRORS as error:
            notes.append(f"there are no operators, slower plain Paddle will be used: {error}")
            raise

    def build_with_cuda(self, ext: Extension) -> bool:
        """False where it failed and need not be."""
        try:
            self.build_with(self.with_cuda(ext))
        except (NoCuda, *BUILD_ERRORS) as error:
            why = str(error) if isinstance(error, NoCuda) else "they did not compile or link with CUDA"
            if MUST_HAVE_CUDA:
                raise RuntimeError(f"CUDA operators are required: {why}; PADDLE_VL_SP_CUDA=0 does without") from error
            ext.built_for["why"] = why.replace(" ", "_")
            notes.append(f"the operators are for the CPU only, since {why}: on a GPU, slower plain Paddle will be used")
            return False
        return True

    def with_cuda(self, ext: Extension) -> Extension:
        nvcc = find_nvcc()
        check_versions(nvcc, ext.paddle_cuda)
        machine, ptx = cuda_architectures()
        ext, root = copy.deepcopy(ext), cuda_root(nvcc)
        ext.extra_objects = [
            self.compile_cuda(nvcc, path, machine, ptx) for path in sorted(SOURCES.glob("*.cu")) if path.stem != "c_api"
        ]
        ext.built_for |= {"cuda": ",".join(machine), "ptx": ",".join(ptx)}
        ext.include_dirs += [str(root / "include"), str(root / "include" / "cccl")]  # thrust, since CUDA 13
        ext.library_dirs.append(str(root / "lib64"))
        ext.define_macros.append(("VLSP_WITH_CUDA", None))
        ext.extra_link_args += ["-lcudart_static", "-ldl", "-lrt", "-lpthread"]
        return ext

    def compile_cuda(self, nvcc: str, source: Path, machine: list[str], ptx: list[str]) -> str:
        target = Path(self.build_temp) / f"{source.stem}.cu.o"
        target.parent.mkdir(parents=True, exist_ok=True)
        archs = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in machine]
        archs += [f"-gencode=arch=compute_{arch},code=compute_{arch}" for arch in ptx]
        try:
            self.spawn([nvcc, "-std=c++17", "-O3", *archs, "-Xcompiler=-fPIC", "-c", str(source), "-o", str(target)])
        except BUILD_ERRORS as error:
            raise NoCuda(f"nvcc failed on {source.name}") from error
        return str(target)

    def build_with(self, ext: Extension) -> None:
        record = " ".join(f"{key}={value}" for key, value in ext.built_for.items())
        ext = copy.copy(ext)
        ext.define_macros = [*ext.define_macros, ("VLSP_BUILD", f'"vlsp-build {record} "')]
        super().build_extension(ext)


class VersionOfBuild(egg_info):
    """Adds "+paddle3.3.1.cpu" where operators are required, so that wheels for several Paddles can be told apart.

    A source archive is for all of them, and where operators may be missing nothing can be promised.
    """

    def finalize_options(self) -> None:
        if BUILD == "require" and "sdist" not in sys.argv:
            version = re.sub(r"[^a-z0-9]+", ".", paddle.version.full_version.lower())
            device = f"cu{paddle.version.cuda().replace('.', '')}" if paddle.is_compiled_with_cuda() else "cpu"
            self.tag_build = f"+paddle{version}.{device}"
        super().finalize_options()


paddle = find_paddle()
setup(
    ext_modules=[operators(paddle)] if paddle else [],
    cmdclass={"build_ext": BuildOperators, "egg_info": VersionOfBuild},
)
for note in notes:
    print(f"\n{'=' * 80}\npaddle_vl_sp: {note}\n{'=' * 80}\n", file=sys.stderr)
