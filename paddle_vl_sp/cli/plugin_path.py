"""plugin-path: the absolute path of the file that a PaddleFormers YAML names."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--yaml", action="store_true", help="print the whole line of the YAML")


def run(arguments: argparse.Namespace) -> int:
    path = Path(__file__).resolve().parent.parent / "formers" / "plugin.py"
    print(f"custom_register_path: {path}" if arguments.yaml else path)
    return 0
