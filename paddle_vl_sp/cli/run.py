"""run: PaddleFormers' launcher with this package enabled, without a change to the YAML."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from paddle_vl_sp.cli.answer import PROBLEM, Answer, Problem, WrongUse
from paddle_vl_sp.cli.check_install import FORMERS
from paddle_vl_sp.cli.plugin_path import KEY, PLUGIN
from paddle_vl_sp.cli.quiet import quiet
from paddle_vl_sp.cli.selftest import all_devices

ALONE = ("-m", "paddleformers.cli.launcher")  # one process, on the CPU as well
ON_ALL_GPUS = ("-m", "paddleformers.cli.cli")  # paddleformers-cli: a process for each GPU
VISIBLE = ("CUDA_VISIBLE_DEVICES", "XPU_VISIBLE_DEVICES", "ASCEND_RT_VISIBLE_DEVICES")  # what that launcher reads
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
        raise Problem(f"paddleformers is not installed: {FORMERS}")
    if not arguments.alone:
        _check_devices(arguments)
    code = subprocess.run(command, stdout=sys.stderr if arguments.json else None, check=False).returncode
    return Answer(told | {"exit_code": code}, "", PROBLEM if code else 0)


def command_of(arguments: argparse.Namespace) -> list[str]:
    _check(arguments)
    how = ALONE if arguments.alone else ON_ALL_GPUS
    config = str(arguments.config)
    return [sys.executable, *how, arguments.action, config, f"{KEY}={PLUGIN}", *arguments.settings]


def _check_devices(arguments: argparse.Namespace) -> None:
    """PaddleFormers' launcher hands its list of devices on, and Paddle's refuses an empty one without saying why."""
    if any(os.environ.get(name) for name in VISIBLE):
        return
    with quiet():
        there = all_devices()
    if there == ["cpu"]:
        mend = shlex.join(["run", "--alone", arguments.action, str(arguments.config), *arguments.settings])
        raise WrongUse(
            "Paddle sees no GPU here, and PaddleFormers' launcher starts a process for each; one process on the CPU: "
            f"`{mend}`"
        )


def _check(arguments: argparse.Namespace) -> None:
    """PaddleFormers takes one file to execute: another one that is asked for must not be dropped silently."""
    if arguments.config.suffix not in CONFIGS or not arguments.config.is_file():
        raise WrongUse(f"{arguments.config}: there is no such file, or it is not one of {', '.join(CONFIGS)}")
    wrong = [setting for setting in arguments.settings if "=" not in setting]
    if wrong:
        raise WrongUse(f"settings are key=value, got {', '.join(wrong)}")
    named = [setting.partition("=")[2] for setting in arguments.settings if setting.startswith(f"{KEY}=")]
    for other in [*named, _named_in(arguments.config)]:
        if other and other != str(PLUGIN):
            raise WrongUse(
                f"{KEY} is {other!r} already, and PaddleFormers takes one: in that file, write "
                "`from paddle_vl_sp.formers import apply_to_qwen3_vl; apply_to_qwen3_vl()`, then start it as usual"
            )


def _yaml(text: str) -> Any:
    if importlib.util.find_spec("yaml") is None:  # PaddleFormers brings it
        return None
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error


def _named_in(config: Path) -> str:
    """The file to execute that the configuration names. What cannot be read is PaddleFormers' to tell."""
    text = config.read_text(encoding="utf-8", errors="replace")
    try:
        read = json.loads(text) if config.suffix == ".json" else _yaml(text)
    except ValueError:
        return ""
    return str(read.get(KEY) or "") if isinstance(read, dict) else ""
