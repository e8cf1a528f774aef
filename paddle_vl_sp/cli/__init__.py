"""The command line: every command is a module of this package, imported when it is called."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence

COMMANDS = {  # command: (its module, with add_arguments(parser) and run(arguments) -> exit code; its help)
    "plugin-path": ("plugin_path", "where the file for PaddleFormers' custom_register_path is"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m paddle_vl_sp", description="Sequence-parallel VL training.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (module, told) in COMMANDS.items():
        command = commands.add_parser(name, help=told, description=told)
        importlib.import_module(f"{__name__}.{module}").add_arguments(command)
    given = parser.parse_args(arguments)
    chosen = importlib.import_module(f"{__name__}.{COMMANDS[given.command][0]}")
    return int(chosen.run(given))
