"""What holds for every command: exit codes, JSON, colour, and no Paddle before it is needed."""

import json
import os
import pty
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from commands import call, call_json

from paddle_vl_sp.cli import COMMANDS, _parser, main, terminal

BATCH = ("--seq", "64", "--images", "64x64")


@pytest.mark.parametrize("arguments", [["--help"], *([name, "--help"] for name in COMMANDS)], ids=" ".join)
def test_help_imports_no_paddle(arguments):
    """In a process of its own; exit code 0."""
    code = (
        "import sys, atexit; from paddle_vl_sp.cli import main\n"
        "atexit.register(lambda: print([n for n in sys.modules if n in ('paddle', 'paddleformers', 'matplotlib')]))\n"
        f"main({arguments!r})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage:")
    assert done.stdout.endswith("[]\n")


def test_inspect_needs_no_paddle():
    """Numbers of a batch come from numpy alone."""
    call = f"main({['inspect', *BATCH]!r}); assert 'paddle' not in sys.modules"
    code = f"import sys; from paddle_vl_sp.cli import main; {call}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


@pytest.mark.parametrize(
    "arguments",
    [[], ["no-such"], ["inspect"], ["plot", *BATCH], ["inspect", *BATCH, "--sp", "5"], ["bench", "no-such"]],
    ids=" ".join,
)
def test_wrong_use_is_exit_code_2_with_a_mend_on_stderr(arguments, capsys):
    """stdout stays empty."""
    try:
        code = main(arguments)
    except SystemExit as left:
        code = left.code
    told = capsys.readouterr()
    assert (code, told.out) == (2, "")
    assert told.err


def test_an_error_in_json_is_an_object(capsys):
    """With the mend, on stdout; stderr stays empty."""
    assert main(["inspect", *BATCH, "--sp", "5", "--json"]) == 2
    told = capsys.readouterr()
    assert "the next length that fits is 65" in json.loads(told.out)["error"]
    assert told.err == ""


def test_plugin_path_in_three_forms(capsys):
    """The path, the YAML's line, JSON: one path."""
    main(["plugin-path"])
    path = capsys.readouterr().out.strip()
    main(["plugin-path", "--yaml"])
    assert capsys.readouterr().out.strip() == f"custom_register_path: {path}"
    main(["plugin-path", "--json"])
    assert json.loads(capsys.readouterr().out) == {"custom_register_path": path}


def test_stdout_and_stderr_hold_nothing_of_other_packages():
    """Paddle and PaddleFormers write on both while they are imported."""
    done = call("doctor")
    assert done.stderr == ""
    assert all(line.startswith(("PASS", "WARN", "FAIL", "      mend:")) for line in done.stdout.splitlines()[:-1])
    code, found = call_json("selftest", "--quick")
    assert (code, found["ok"]) == (0, True)


PAGE = Path(__file__).parents[2] / "docs" / "command-line.md"
SHOWN = re.findall(r"^(?:python -m paddle_vl_sp|paddle-vl-sp|python .*paddle-vl-sp\)) (.+)$", PAGE.read_text(), re.M)


@pytest.mark.parametrize("line", SHOWN)
def test_every_command_of_the_page_is_one(line):
    """Its flags and choices are accepted; what the commands do is tested elsewhere."""
    assert _parser().parse_args(shlex.split(line)).command in COMMANDS


def test_the_page_has_every_command():
    """By its shell lines, or in the table."""
    shown = {shlex.split(line)[0] for line in SHOWN}
    assert shown | {"plugin-path"} == set(COMMANDS)
    assert "`plugin-path`" in PAGE.read_text()


def on_terminal(*arguments, **env):
    """What a terminal gets on stdout."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "paddle_vl_sp", *arguments],
        stdout=theirs,
        stderr=subprocess.DEVNULL,
        env={name: value for name, value in os.environ.items() if name != "NO_COLOR"} | {"TERM": "xterm"} | env,
    )
    os.close(theirs)
    told = b""
    while True:
        try:
            part = os.read(ours, 4096)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        told += part
    process.wait()
    os.close(ours)
    return told.decode()


def test_colour_on_a_terminal_only():
    """Not in a pipe, not under NO_COLOR, not on a dumb terminal."""
    assert "\033[" in on_terminal("inspect", *BATCH)
    assert "\033[" not in on_terminal("inspect", *BATCH, NO_COLOR="1")
    assert "\033[" not in on_terminal("inspect", *BATCH, TERM="dumb")
    assert "\033[" not in call("inspect", *BATCH).stdout


@pytest.mark.parametrize("with_rich", [True, False])
def test_a_bar_on_a_terminal_with_and_without_rich(with_rich, monkeypatch, capsys):
    """Something moves on stderr; nothing where it is no terminal."""
    if with_rich:
        pytest.importorskip("rich")
    else:
        monkeypatch.setitem(sys.modules, "rich", None)
    with terminal.Progress(2) as bar:
        bar.advance("nothing")
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(terminal, "has_colour", lambda stream=None: True)
    with terminal.Progress(2) as bar:
        assert (bar.rich is not None) == with_rich
        bar.starts("first")
        bar.advance("first")
        bar.advance("second")
    told = capsys.readouterr().err
    if not with_rich:
        assert "[#####     ] 1/2 first" in told
        assert told.endswith(terminal.CLEARED)


@pytest.mark.parametrize("device", ["cpu", "gpu:0"])
def test_a_plain_bar_has_room_for_every_case(device):
    """On 80 columns, with the numbers of both devices' cases."""
    from paddle_vl_sp.cli.parity import local_cases

    names = [case.name for case in local_cases(device)]
    counts = f"{2 * len(names)}/{2 * len(names)}"
    assert len(f"[{' ' * terminal.BAR_WIDTH}] {counts} {max(names, key=len)}") < 80


def test_what_a_terminal_cannot_write_is_escaped(tmp_path):
    """A name with an umlaut on a terminal of ASCII, on stdout and in JSON; no traceback."""
    done = call("plot", "--out", "f\u00fc.svg", *BATCH, cwd=tmp_path, PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stdout) == (0, "owners: f\\xfc.svg\n"), done.stderr
    assert (tmp_path / "f\u00fc.svg").exists()


def test_a_reader_may_leave():
    """As `head` does: no traceback."""
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "paddle_vl_sp", "inspect", *BATCH]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_table_puts_numbers_right_and_words_left():
    """By hand."""
    assert terminal.table(("name", "n"), [("a", 5), ("bcdef", 10)]) == "name    n\na       5\nbcdef  10"
