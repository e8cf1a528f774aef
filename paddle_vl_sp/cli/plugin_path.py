"""plugin-path: the absolute path of the file that a PaddleFormers YAML names."""

from __future__ import annotations

import argparse
from pathlib import Path

from paddle_vl_sp.cli import Answer

PLUGIN = Path(__file__).resolve().parent.parent / "formers" / "plugin.py"
KEY = "custom_register_path"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--yaml", action="store_true", help="print the whole line of the YAML")


def run(arguments: argparse.Namespace) -> Answer:
    return Answer({KEY: str(PLUGIN)}, f"{KEY}: {PLUGIN}" if arguments.yaml else str(PLUGIN))
