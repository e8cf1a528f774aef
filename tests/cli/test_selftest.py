"""selftest: passes here, on real ranks and under Paddle's launcher, and finds what is broken on purpose."""

import contextlib
import io
import json
import subprocess
import sys

import numpy as np
import pytest
from commands import ENV, call

import paddle_vl_sp
from paddle_vl_sp import SeqLayout
from paddle_vl_sp.backends import dispatch
from paddle_vl_sp.cli import main, selftest
from paddle_vl_sp.testing import run_ranks

COLLECTIVES = ("all_gather_rows", "complete_grad", "encode_shared")


def test_everything_passes_with_each_implementation(implementation, capsys):
    """Exact in both dtypes on every device."""
    assert main(["selftest", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["ok"], found["failed"], found["ranks"]) == (True, [], 1)
    assert "cpu" in found["devices"]
    assert found["cases"] == len(found["devices"]) * 2


def forgets_a_pair(function):
    return lambda hidden, features, update, gather, *more: function(hidden, features, update[:-1], gather[:-1], *more)


def flips_the_rows(function):
    def plan(*arguments):
        update, gather, counts = function(*arguments)
        return update.flip(0), gather, counts

    return plan


def doubles_the_gradient(function):
    return lambda hidden, features, *more: function(hidden, features + (features - features.detach()), *more)


@pytest.mark.parametrize(
    ("name", "broken", "what"),
    [
        ("add_rows", forgets_a_pair, "result"),
        ("replace_rows", forgets_a_pair, "result"),
        ("build_plan", flips_the_rows, "result"),
        ("add_rows", doubles_the_gradient, "features' gradient"),
    ],
)
def test_what_is_broken_is_found(name, broken, what, monkeypatch, capsys):
    """Exit code 1, with the function, the place and both numbers."""
    monkeypatch.setattr(dispatch, name, broken(getattr(dispatch, name)))
    assert main(["selftest"]) == 1
    printed = capsys.readouterr().out
    assert printed.startswith("FAIL")
    function = "add_rows" if name == "add_rows" else "replace_rows"
    assert f"cpu: rows, float32: {function} of cp rank 0, sp rank 0, {what}: " in printed
    assert "FAIL  rank 0, cpu: rows, bfloat16: " in printed
    assert ", expected " in printed


def test_slow_answers_are_right():
    """By hand: the worked examples of SeqLayout and plan_visual; both row functions with their gradients."""
    visual = np.array([[0, 1, 1, 1, 0, 0, 1, 0], [1, 1, 0, 0, 1, 0, 0, 1]], dtype=bool)
    layout = SeqLayout(8, cp_size=2, sp_size=2, sp_rank=1)  # owns 6 and 7
    pairs = selftest.slow_pairs(visual, layout)
    assert pairs == [((0, 0), 3), ((1, 1), 7)]
    hidden, features, grad = np.array([[[1.0], [2.0]]]), np.array([[10.0], [20.0]]), np.array([[[3.0], [4.0]]])
    drawn, pairs = [hidden, features, grad], [((0, 1), 0)]
    replaced = [x.ravel().tolist() for x in selftest.slow_rows("replace_rows", drawn, pairs)]
    added = [x.ravel().tolist() for x in selftest.slow_rows("add_rows", drawn, pairs)]
    assert replaced == [[1, 10], [4, 0], [3, 0]]
    assert added == [[1, 12], [4, 0], [3, 4]]


def test_without_paddle_the_fix_is_named(monkeypatch, capsys):
    """Exit code 1."""
    monkeypatch.setitem(sys.modules, "paddle", None)
    assert main(["selftest"]) == 1
    assert "pip install paddlepaddle" in capsys.readouterr().err


@pytest.mark.parametrize("switch", ["PADDLE_VL_SP_BACKEND", "PADDLE_VL_SP_LOG"])
def test_a_switch_with_an_unknown_word_is_a_problem(switch):
    """Exit code 1 with the choices; no traceback."""
    done = call("selftest", **{switch: "perhaps"})
    assert done.returncode == 1
    assert done.stderr.startswith(f"selftest: {switch} must be one of '")
    assert "got 'perhaps'; `doctor` says more" in done.stderr


def on_rank():
    """Of this rank: (exit code, what is printed) of the self-test, then of one with every collective broken."""

    def printed():
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            code = main(["selftest", "--json"])
        return code, out.getvalue()

    whole = printed()
    gather, shared = paddle_vl_sp.all_gather_rows, paddle_vl_sp.encode_shared
    paddle_vl_sp.all_gather_rows = lambda x, counts, group: gather(x * 2, counts, group)
    paddle_vl_sp.complete_grad = lambda features, plan, group: features
    paddle_vl_sp.encode_shared = lambda *given, **more: shared(*given, **more, grad="whole")
    return [whole, printed()]


def test_on_real_ranks():
    """Two gloo processes: rank 0 answers for both, exit codes agree, and what is broken is found on both."""
    results = run_ranks(on_rank, 2, timeout=120)
    (code, words), (broken_code, broken_words) = results[0]
    found = json.loads(words)
    assert (code, found["ranks"], found["failed"], found["cases"]) == (0, 2, [], 5)
    broken = json.loads(broken_words)["failed"]
    assert broken_code == 1
    assert {(each["case"], each["rank"]) for each in broken} == {
        (name, rank) for name in COLLECTIVES for rank in (0, 1)
    }
    assert results[1] == [(0, ""), (1, "")]


def test_under_paddles_launcher(tmp_path):
    """As docs/command-line.md has it, on the CPU: one answer, exit code 0."""
    script = tmp_path / "paddle-vl-sp"
    script.write_text(f"#!{sys.executable}\nfrom paddle_vl_sp.cli import entry\nentry()\n")
    script.chmod(0o755)
    launcher = ["-m", "paddle.distributed.launch", "--nproc_per_node", "2", "--log_dir", str(tmp_path / "log")]
    env = {name: value for name, value in ENV.items() if name != "CUDA_VISIBLE_DEVICES"}
    done = subprocess.run(
        [sys.executable, *launcher, str(script), "selftest"],
        env=env | {"PADDLE_DISTRI_BACKEND": "gloo"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    answers = [line for line in done.stdout.splitlines() if line.startswith(("PASS", "FAIL"))]
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(answers) == 1
    assert "5 cases" in answers[0]
    assert "2 ranks" in answers[0]
