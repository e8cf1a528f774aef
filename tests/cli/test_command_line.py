"""What every command must do: exit codes, JSON, colour, and no Paddle before it is needed."""

import json
import os
import pty
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from commands import ENV, call, call_json, python

from paddle_vl_sp.cli import COMMANDS, _parser, main, terminal
from paddle_vl_sp.cli.plugin_path import KEY, PLUGIN

BATCH = ("--seq", "64", "--images", "64x64")
PAGE = Path(__file__).parents[2] / "docs" / "command-line.md"
SHOWN = re.findall(r"^(?:python -m paddle_vl_sp|paddle-vl-sp|python .*paddle-vl-sp\)) (.+)$", PAGE.read_text(), re.M)


@pytest.mark.parametrize("arguments", [["--help"], *([name, "--help"] for name in COMMANDS)], ids=" ".join)
def test_help_imports_no_paddle(arguments):
    """In a process of its own; exit code 0."""
    done = python(
        "import sys, atexit; from paddle_vl_sp.cli import main\n"
        "atexit.register(lambda: print([n for n in sys.modules if n in ('paddle', 'paddleformers', 'matplotlib')]))\n"
        f"main({arguments!r})"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage:")
    assert done.stdout.endswith("[]\n")


def test_inspect_needs_no_paddle():
    """Numbers of a batch come from numpy alone; nothing on stderr."""
    run = f"main({['inspect', *BATCH]!r}); assert 'paddle' not in sys.modules"
    done = python(f"import sys; from paddle_vl_sp.cli import main; {run}")
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("arguments", [[], ["no-such"], ["inspect"], ["inspect", *BATCH, "--sp", "5"]], ids=" ".join)
def test_wrong_usage_is_exit_code_2_with_a_message_on_stderr(arguments, capsys):
    """stdout stays empty."""
    try:
        code = main(arguments)
    except SystemExit as left:
        code = left.code
    printed = capsys.readouterr()
    assert (code, printed.out) == (2, "")
    assert printed.err


def test_an_error_in_json_is_an_object(capsys):
    """With the fix, on stdout; stderr stays empty."""
    assert main(["inspect", *BATCH, "--sp", "5", "--json"]) == 2
    printed = capsys.readouterr()
    assert "the next length that fits is 65" in json.loads(printed.out)["error"]
    assert printed.err == ""


def test_plugin_path_in_three_forms(capsys):
    """The path, the YAML's line, JSON: one path, of a file that exists."""
    main(["plugin-path"])
    path = capsys.readouterr().out.strip()
    assert Path(path).is_file()
    main(["plugin-path", "--yaml"])
    assert capsys.readouterr().out.strip() == f"custom_register_path: {path}"
    main(["plugin-path", "--json"])
    assert json.loads(capsys.readouterr().out) == {"custom_register_path": path}


def test_paddleformers_launcher_applies_the_file(tmp_path):
    """In one process, on a YAML without a model: it says what it did before the launcher stops at an unknown key."""
    (tmp_path / "x.yaml").write_text(f"stage: VL-SFT\noutput_dir: {tmp_path}\nno_such_key: 1\n")
    launcher = [
        sys.executable,
        "-m",
        "paddleformers.cli.launcher",
        "train",
        str(tmp_path / "x.yaml"),
        f"{KEY}={PLUGIN}",
    ]
    done = subprocess.run(launcher, env=ENV, capture_output=True, text=True, timeout=200, check=False)
    assert "paddle_vl_sp: PaddleFormers, Qwen3-VL: 4 replaced" in done.stderr
    assert "no_such_key" in done.stderr


def test_stdout_and_stderr_hold_nothing_of_other_packages():
    """Paddle and PaddleFormers write on both while they are imported."""
    done = call("doctor")
    assert done.stderr == ""
    assert all(line.startswith(("PASS", "WARN", "FAIL", "      fix:")) for line in done.stdout.splitlines()[:-1])
    code, found = call_json("selftest")
    assert (code, found["ok"]) == (0, True)


def test_the_page_shows_every_command_and_no_other():
    """By its shell lines, whose flags and choices are accepted, or in the table."""
    shown = {_parser().parse_args(shlex.split(line)).command for line in SHOWN}
    assert shown | {"plugin-path"} == set(COMMANDS)
    assert "`plugin-path`" in PAGE.read_text()


def on_terminal(*arguments, **env):
    """What a terminal gets on stdout."""
    ours, theirs = pty.openpty()
    env = {name: value for name, value in ENV.items() if name != "NO_COLOR"} | {"TERM": "xterm"} | env
    command = [sys.executable, "-m", "paddle_vl_sp", *arguments]
    process = subprocess.Popen(command, stdout=theirs, stderr=subprocess.DEVNULL, env=env)
    os.close(theirs)
    printed = b""
    try:
        while part := os.read(ours, 4096):
            printed += part
    except OSError:  # the other end is closed
        pass
    process.wait()
    os.close(ours)
    return printed.decode()


def test_colour_on_a_terminal_only():
    """Not in a pipe, not under NO_COLOR, not on a dumb terminal."""
    assert "\033[" in on_terminal("inspect", *BATCH)
    assert "\033[" not in on_terminal("inspect", *BATCH, NO_COLOR="1")
    assert "\033[" not in on_terminal("inspect", *BATCH, TERM="dumb")
    assert "\033[" not in call("inspect", *BATCH).stdout


def test_a_bar_on_a_terminal_only(monkeypatch, capsys):
    """By letters: half filled after one of two steps, cut to the terminal, cleared at the end; else nothing."""
    with terminal.Progress(2) as bar:
        bar.advance("nothing")
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(terminal, "has_colour", lambda stream=None: True)
    monkeypatch.setenv("COLUMNS", "44")
    with terminal.Progress(2) as bar:
        bar.advance("first, with a long name")
        bar.advance("second")
    lines = capsys.readouterr().err.split(terminal.CLEARED)
    assert lines[2] == f"[{'#' * 10}{' ' * 10}] 1/2   0 s  first, with a"[:43]
    assert lines[3:] == [f"[{'#' * 20}] 2/2   0 s  second", ""]


def test_what_a_terminal_cannot_write_is_escaped(tmp_path):
    """A name with an umlaut on a terminal of ASCII; no traceback."""
    done = call("inspect", "--out", "f\u00fc.svg", *BATCH, cwd=tmp_path, PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "picture: f\\xfc.svg"), done.stderr
    assert (tmp_path / "f\u00fc.svg").exists()


def test_the_reader_of_a_pipe_may_close_it():
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


@pytest.mark.parametrize("arguments", [("doctor", "--json"), ("inspect", *BATCH), ("plugin-path",)], ids=" ".join)
@pytest.mark.parametrize(("stdout", "said"), [(">/dev/full", "No space left on device"), (">&-", "stdout is closed")])
def test_an_answer_that_cannot_be_written_is_an_error(arguments, stdout, said):
    """Exit code 1 and one line that says why; no traceback, nothing more when Python ends."""
    done = shell(f"{shlex.join(arguments)} {stdout}")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(f"{arguments[0]}: the answer cannot be written: ")
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


def test_without_stderr_the_answer_is_the_same():
    """Nothing that a command opens gets the number of the closed stream."""
    done = shell("doctor --json 2>&-")
    assert done.returncode == 0
    assert json.loads(done.stdout) == json.loads(shell("doctor --json").stdout)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (f"--seq {10**14}", "is more than the 134,217,728 tokens"),
        (f"--seq 4096 --batch {10**10}", "is more than the 134,217,728 tokens"),
        (f"--seq {10**6} --sp {10**6}", "at most 4,096 ranks"),
        (f"--seq {1 << 27} --sp 1024", "at most 512 ranks"),
    ],
)
def test_what_would_take_hours_is_refused(arguments, said):
    """Exit code 2 in seconds, in less than 4 GB."""
    done = shell(f"inspect {arguments} --images 448x448", before="ulimit -v 4000000; ")
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr


def shell(arguments, before=""):
    command = f"{before}exec {shlex.quote(sys.executable)} -W ignore -m paddle_vl_sp {arguments}"
    return subprocess.run(command, shell=True, env=ENV, capture_output=True, text=True, timeout=100, check=False)
