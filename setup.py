"""Builds the one extension, paddle_vl_sp._ops, against the Paddle that is installed; everything else is in pyproject.

PADDLE_VL_SP_BUILD   auto (default): without Paddle or a compiler the package installs without operators
                     require: fail instead;  skip: never build
PADDLE_VL_SP_CUDA    auto (default): with CUDA where Paddle has it and nvcc is found;  0: never;  1: always
PADDLE_CUDA_ARCH_LIST, CUDA_HOME as Paddle understands them
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

SOURCES = Path("custom_ops")
BUILD = os.environ.get("PADDLE_VL_SP_BUILD", "auto")
CUDA = os.environ.get("PADDLE_VL_SP_CUDA", "auto")


def find_paddle():
    """The installed Paddle, or None where there is none or nothing is to be built."""
    if BUILD == "skip":
        return None
    try:
        import paddle
    except ImportError:
        if BUILD == "require":
            raise
        print("paddle_vl_sp: no Paddle to build against, so no operators; use --no-build-isolation", file=sys.stderr)
        return None
    return paddle


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    beside_home = Path(home) / "bin" / "nvcc" if home else None
    return str(beside_home) if beside_home and beside_home.exists() else shutil.which("nvcc")


def with_cuda(paddle) -> bool:
    if CUDA == "auto":
        return paddle.is_compiled_with_cuda() and find_nvcc() is not None
    return CUDA == "1"


def cuda_root(nvcc: str) -> Path:
    """Where nvcc says its headers and libraries are: the program that is called may be a wrapper somewhere else."""
    listing = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
    tops = [line.split("=", 1)[1].strip() for line in listing.splitlines() if line.startswith("#$ TOP=")]
    return Path(tops[0]).resolve() if tops else Path(nvcc).resolve().parent.parent


def cuda_architectures() -> list[str]:
    listed = os.environ.get("PADDLE_CUDA_ARCH_LIST", "8.0;9.0").replace(",", ";").replace(" ", ";")
    return [arch.strip().removesuffix("+PTX").replace(".", "") for arch in listed.split(";") if arch.strip()]


def operators(paddle) -> Extension:
    include, library = Path(paddle.sysconfig.get_include()), Path(paddle.__file__).parent / "base"
    built_for = {"paddle": paddle.version.full_version, "commit": paddle.version.commit, "cuda": "0"}
    extension = Extension(
        "paddle_vl_sp._ops",
        sources=sorted(str(path) for path in SOURCES.glob("*.cc")),
        depends=[str(path) for path in SOURCES.iterdir()],
        include_dirs=[str(include), str(include / "third_party")],
        define_macros=[("PADDLE_WITH_CUSTOM_KERNEL", None), ("PADDLE_EXTENSION_NAME", "_ops")],
        extra_compile_args=["-std=c++17", "-O3", "-g0", "-Wno-unused-parameter"],
        library_dirs=[str(library)],
        extra_link_args=["-l:libpaddle.so", f"-Wl,-rpath,{library}", "-Wl,--strip-debug"],
        language="c++",
        optional=BUILD != "require",
    )
    extension.cuda = with_cuda(paddle)
    if extension.cuda:
        root = cuda_root(find_nvcc() or "nvcc")
        built_for["cuda"] = ",".join(cuda_architectures())
        extension.include_dirs += [str(root / "include"), str(root / "include" / "cccl")]  # thrust, since CUDA 13
        extension.library_dirs.append(str(root / "lib64"))
        extension.define_macros.append(("VLSP_WITH_CUDA", None))
        extension.extra_link_args += ["-lcudart_static", "-ldl", "-lrt", "-lpthread"]
    record = " ".join(f"{key}={value}" for key, value in built_for.items())
    extension.define_macros.append(("VLSP_BUILD", f'"vlsp-build {record} "'))
    return extension


class BuildOperators(build_ext):
    """Compiles the .cu files with nvcc; they do not include Paddle, so the host compiler does all the rest."""

    def build_extension(self, ext: Extension) -> None:
        if ext.cuda:
            ext.extra_objects = [
                self.compile_cuda(path) for path in sorted(SOURCES.glob("*.cu")) if path.stem != "c_api"
            ]
        super().build_extension(ext)

    def compile_cuda(self, source: Path) -> str:
        target = Path(self.build_temp) / f"{source.stem}.cu.o"
        target.parent.mkdir(parents=True, exist_ok=True)
        archs = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in cuda_architectures()]
        nvcc = find_nvcc()
        if nvcc is None:
            raise RuntimeError("PADDLE_VL_SP_CUDA=1 but there is no nvcc: set CUDA_HOME or put nvcc on the PATH")
        self.spawn([nvcc, "-std=c++17", "-O3", *archs, "-Xcompiler=-fPIC", "-c", str(source), "-o", str(target)])
        return str(target)


paddle = find_paddle()
setup(ext_modules=[operators(paddle)] if paddle else [], cmdclass={"build_ext": BuildOperators})
