"""run: PaddleFormers' launcher with this package enabled, without a change to the YAML."""

from __future__ import annotations

import argparse
import importlib.util
import re
import shlex
import subprocess
import sys
from pathlib import Path

from paddle_vl_sp.cli.answer import PROBLEM, Answer, Problem, WrongUse
from paddle_vl_sp.cli.plugin_path import KEY, PLUGIN

ALONE = ("-m", "paddleformers.cli.launcher")  # one process, on the CPU as well
ON_ALL_GPUS = ("-m", "paddleformers.cli.cli")  # paddleformers-cli: a process for each GPU
CONFIGS = (".yaml", ".yml", ".json")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=["train"], help="what PaddleFormers is to do")
    parser.add_argument("config", type=Path, help="the YAML or JSON that PaddleFormers takes")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="handed on to PaddleFormers")
    parser.add_argument("--dry-run", action="store_true", help="print the command only")
    parser.add_argument("--alone", action="store_true", help="one process here, without paddle.distributed.launch")


def run(arguments: argparse.Namespace) -> Answer:
    command = command_of(arguments)
    told = {"command": command}
    if arguments.dry_run:
        return Answer(told, shlex.join(command))
    if importlib.util.find_spec("paddleformers") is None:
        raise Problem('paddleformers is not installed: pip install "paddle-vl-sp[formers]"')
    code = subprocess.run(command, stdout=sys.stderr if arguments.json else None, check=False).returncode
    return Answer(told | {"exit_code": code}, "", PROBLEM if code else 0)


def command_of(arguments: argparse.Namespace) -> list[str]:
    _check(arguments)
    how = ALONE if arguments.alone else ON_ALL_GPUS
    config = str(arguments.config)
    return [sys.executable, *how, arguments.action, config, f"{KEY}={PLUGIN}", *arguments.settings]


def _check(arguments: argparse.Namespace) -> None:
    """PaddleFormers takes one file to execute: another one that is asked for must not be dropped silently."""
    if arguments.config.suffix not in CONFIGS or not arguments.config.is_file():
        raise WrongUse(f"{arguments.config}: there is no such file, or it is not one of {', '.join(CONFIGS)}")
    wrong = [setting for setting in arguments.settings if "=" not in setting]
    if wrong:
        raise WrongUse(f"settings are key=value, got {', '.join(wrong)}")
    named = [setting for setting in arguments.settings if setting.startswith(f"{KEY}=")]
    named += re.findall(rf'^\s*"?{KEY}"?\s*:.*$', arguments.config.read_text(), re.MULTILINE)
    if any(str(PLUGIN) not in name for name in named):
        raise WrongUse(
            f"{named[0].strip()!r} is asked for already, and PaddleFormers takes one {KEY}: in that file, write "
            "`from paddle_vl_sp.formers import apply_to_qwen3_vl; apply_to_qwen3_vl()`, then start it as usual"
        )
