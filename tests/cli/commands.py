"""The command line as a user calls it, in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import paddle_vl_sp

PACKAGE = Path(paddle_vl_sp.__file__).parent
PATHS = [str(PACKAGE.parent), os.environ.get("PYTHONPATH", "")]
ENV = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, PATHS))}  # from any folder this package is found


def _run(command, **more):
    return subprocess.run(command, capture_output=True, text=True, timeout=200, check=False, **more)


def python(code, **env):
    return _run([sys.executable, "-c", code], env=ENV | env)


def call(*arguments, cwd=None, **env):
    """In `cwd`, whose packages come first."""
    return _run([sys.executable, "-m", "paddle_vl_sp", *arguments], cwd=cwd, env=ENV | env)


def call_json(*arguments, cwd=None, **env):
    """(exit code, the object on stdout); fails if anything else is there."""
    done = call(*arguments, "--json", cwd=cwd, **env)
    return done.returncode, json.loads(done.stdout)


def call_without(modules, *arguments):
    """As `call`, in a process where these modules cannot be imported."""
    return python(
        f"import sys; sys.modules.update(dict.fromkeys({list(modules)!r})); "
        f"from paddle_vl_sp.cli import main; sys.exit(main({list(arguments)!r}))"
    )
