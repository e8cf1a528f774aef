"""selftest: passes here, on real ranks and under Paddle's launcher, and finds what is broken on purpose."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from commands import call

from paddle_vl_sp import SeqLayout
from paddle_vl_sp.backends import dispatch
from paddle_vl_sp.cli import main, parity, selftest, slow
from paddle_vl_sp.testing import run_ranks


def test_everything_passes_with_each_implementation(implementation, capsys):
    """All cuts, orders and dtypes, bit for bit."""
    assert main(["selftest", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["ok"], found["failed"], found["ranks"]) == (True, [], 1)
    assert found["cases"] == len(parity.CUTS) * 2 * (1 + len(parity.DTYPES))


@pytest.mark.parametrize("name", ["add_rows", "replace_rows", "build_plan"])
def test_what_is_broken_is_found(name, monkeypatch, capsys):
    """The last pair forgotten, by each operation in turn: exit code 1, with place and numbers."""
    right = getattr(dispatch, name)

    def forgets_a_pair(*arguments):
        if name == "build_plan":
            update, gather, counts = right(*arguments)
            return update.flip(0), gather, counts
        hidden, features, update, gather, *more = arguments
        return right(hidden, features, update[:-1], gather[:-1], *more)

    monkeypatch.setattr(dispatch, name, forgets_a_pair)
    assert main(["selftest", "--quick"]) == 1
    told = capsys.readouterr().out
    assert told.startswith("FAIL")
    assert "expected" in told


def test_a_wrong_gradient_is_found(monkeypatch):
    """Right values with a doubled gradient of the features."""
    right = dispatch.add_rows
    monkeypatch.setattr(dispatch, "add_rows", lambda h, f, u, g, inplace: right(h, f + (f - f.detach()), u, g, inplace))
    failures = [case.failure() for case in parity.local_cases("cpu", parity.QUICK)]
    assert any("features' gradient" in why for why in failures)


def test_slow_answers_are_right():
    """By hand, the worked examples of SeqLayout and plan_visual."""
    layout = SeqLayout(8, cp_size=2, sp_size=2, sp_rank=1)
    assert slow.positions(layout) == [6, 7]
    visual = np.array([[0, 1, 1, 1, 0, 0], [1, 1, 0, 0, 1, 0]], dtype=bool)
    assert slow.pairs(visual, [3, 4, 5], sequence_first=False) == ([0, 4], [2, 5])
    assert slow.pairs(visual, [3, 4, 5], sequence_first=True) == ([0, 3], [2, 5])


def test_without_paddle_the_mend_is_named(monkeypatch, capsys):
    """Exit code 1."""
    monkeypatch.setitem(sys.modules, "paddle", None)
    assert main(["selftest"]) == 1
    assert "pip install paddlepaddle" in capsys.readouterr().err


def test_a_switch_that_cannot_be_followed_is_a_problem():
    """Exit code 1 with the choices; no traceback."""
    done = call("selftest", PADDLE_VL_SP_BACKEND="cuda")
    assert done.returncode == 1
    assert done.stderr.startswith("selftest: PADDLE_VL_SP_BACKEND must be one of 'auto', 'op', 'python', got 'cuda'")


def on_rank():
    """[the whole self-test, the same with a gradient that nobody completes] of this rank: (exit code, told)."""
    import contextlib
    import io

    from paddle_vl_sp.cli import ranks

    def told():
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            code = main(["selftest", "--quick", "--json"])
        return code, out.getvalue()

    whole = told()
    ranks.complete_grad = lambda features, plan, group: features
    return [whole, told()]


def test_on_real_ranks():
    """Two gloo processes: rank 0 answers for both, exit codes agree, and a partial gradient is found on both."""
    results = run_ranks(on_rank, 2, timeout=120)
    (code, words), (broken_code, broken_words) = results[0]
    found = json.loads(words)
    assert (code, found["ranks"], found["failed"]) == (0, 2, [])
    broken = json.loads(broken_words)["failed"]
    assert broken_code == 1
    assert {(failure["case"], failure["rank"]) for failure in broken} == {("complete_grad", 0), ("complete_grad", 1)}
    assert results[1] == [(0, ""), (1, "")]


def test_under_paddles_launcher(tmp_path):
    """As docs/command-line.md has it, on the CPU: one answer, exit code 0."""
    script = tmp_path / "paddle-vl-sp"
    script.write_text(f"#!{sys.executable}\nfrom paddle_vl_sp.cli import entry\nentry()\n")
    script.chmod(0o755)
    launcher = ["-m", "paddle.distributed.launch", "--nproc_per_node", "2", "--log_dir", str(tmp_path / "log")]
    env = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    done = subprocess.run(
        [sys.executable, *launcher, str(script), "selftest", "--quick"],
        env=env | {"PADDLE_DISTRI_BACKEND": "gloo"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    answers = [line for line in done.stdout.splitlines() if line.startswith(("PASS", "FAIL"))]
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(answers) == 1
    assert "2 ranks" in answers[0]


@pytest.mark.parametrize("device", ["gpu:99", "tpu"])
def test_a_device_that_is_not_there_is_wrong_use(device, capsys):
    """Exit code 2, before a case runs, with what there is."""
    assert main(["selftest", "--quick", "--device", "cpu", "--device", device]) == 2
    told = capsys.readouterr().err
    assert f"--device must be one of {', '.join(selftest.all_devices())}, got '{device}'" in told
    assert main(["selftest", "--quick", "--device", "cpu"]) == 0


def test_devices_are_what_paddle_has():
    """The CPU always; cases leave the device as it was."""
    import paddle

    assert selftest.devices_here() == sorted({"cpu", paddle.device.get_device()})
