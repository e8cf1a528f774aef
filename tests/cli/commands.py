"""The command line as a user calls it, in a process of its own."""

import json
import os
import subprocess
import sys


def call(*arguments, cwd=None, **env):
    """In `cwd`, whose packages come first."""
    return subprocess.run(
        [sys.executable, "-m", "paddle_vl_sp", *arguments],
        env=os.environ | env,
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


def call_json(*arguments, cwd=None, **env):
    """(exit code, the object on stdout); fails if anything else is there."""
    done = call(*arguments, "--json", cwd=cwd, **env)
    return done.returncode, json.loads(done.stdout)


def call_without(modules, *arguments, **env):
    """As `call`, in a process where these modules cannot be imported."""
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({list(modules)!r})); "
        f"from paddle_vl_sp.cli import main; sys.exit(main({list(arguments)!r}))"
    )
    return subprocess.run(
        [sys.executable, "-c", code], env=os.environ | env, capture_output=True, text=True, timeout=200, check=False
    )
