"""A compiler for builds in tests: what it makes is loaded and called once, and need not be fast."""

import shutil


def unoptimized(folder):
    """Environment of a build whose C++ is compiled by g++ without optimization, by a program in this folder."""
    program = folder / "g++-O0"
    program.write_text(f'#!/bin/sh\nexec {shutil.which("g++")} "$@" -O0\n')
    program.chmod(0o755)
    return {"CC": str(program), "CXX": str(program)}
