"""run: PaddleFormers' launcher gets the YAML, the plugin and the settings, and the plugin takes effect."""

import json
import re
import shlex
import subprocess
import sys

import pytest

from paddle_vl_sp.cli import main, run
from paddle_vl_sp.cli.plugin_path import PLUGIN


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("stage: VL-SFT\n")
    return path


def test_the_command(config, capsys):
    """Word for word; --json gives it as a list."""
    assert main(["run", "--dry-run", "train", str(config), "max_steps=3"]) == 0
    words = shlex.split(capsys.readouterr().out)
    expected = ["-m", "paddleformers.cli.cli", "train", str(config), f"custom_register_path={PLUGIN}", "max_steps=3"]
    assert words == [sys.executable, *expected]
    assert main(["run", "--dry-run", "--alone", "--json", "train", str(config)]) == 0
    assert json.loads(capsys.readouterr().out)["command"][1:3] == ["-m", "paddleformers.cli.launcher"]


def test_paddleformers_applies_before_it_reads_the_rest(config):
    """The real launcher on a YAML without a model: the plugin says what it did, then it stops at the YAML."""
    config.write_text(f"stage: VL-SFT\noutput_dir: {config.parent}\nno_such_key: 1\n")
    done = subprocess.run(
        [sys.executable, "-m", "paddle_vl_sp", "run", "--alone", "train", str(config)],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert "paddle_vl_sp: Qwen3-VL, plain: 4 replaced" in done.stderr
    assert "no_such_key" in done.stderr
    assert done.returncode == 1


def test_json_stays_alone_on_stdout(config, monkeypatch, capfd):
    """What the launcher prints goes to stderr; its exit code is told."""
    monkeypatch.setattr(run, "command_of", lambda _: [sys.executable, "-c", "print('noise'); raise SystemExit(3)"])
    assert main(["run", "--json", "--alone", "train", str(config)]) == 1
    told = capfd.readouterr()
    assert json.loads(told.out)["exit_code"] == 3


WRITTEN = {
    "yaml": "stage: VL-SFT\ncustom_register_path: /mine.py\n",
    "quoted": "'custom_register_path': /mine.py\n",
    "flow": "{stage: VL-SFT, custom_register_path: /mine.py}\n",
    "json": '{"stage": "VL-SFT", "custom_register_path": "/mine.py"}',
    "json with tabs": '{\n\t"custom_register_path": "/mine.py"\n}',
    "setting": "stage: VL-SFT\n",
}


@pytest.mark.parametrize("where", WRITTEN)
def test_another_registered_file_is_not_dropped(config, where, capsys):
    """PaddleFormers takes one: exit code 2, with what to write into that file."""
    arguments = ["run", "--dry-run", "train", str(config)]
    if where.startswith("json"):
        config = config.with_suffix(".json")
        arguments[-1] = str(config)
    config.write_text(WRITTEN[where])
    if where == "setting":
        arguments.append("custom_register_path=/mine.py")
    assert main(arguments) == 2
    assert "apply_to_qwen3_vl()" in capsys.readouterr().err


def test_our_own_registered_file_may_stand_there(config):
    """Nothing is asked for twice over."""
    for value in (PLUGIN, "null", '""'):
        config.write_text(f"custom_register_path: {value}\n")
        assert main(["run", "--dry-run", "train", str(config)]) == 0


@pytest.mark.parametrize("arguments", [["train", "gone.yaml"], ["train", __file__]])
def test_what_is_no_config_is_refused(arguments, capsys):
    """Exit code 2."""
    assert main(["run", *arguments]) == 2
    assert "there is no such file, or it is not one of .yaml" in capsys.readouterr().err


def test_settings_are_key_and_value(config, capsys):
    """Exit code 2."""
    assert main(["run", "train", str(config), "max_steps"]) == 2
    assert "settings are key=value, got max_steps" in capsys.readouterr().err


def test_without_paddleformers_the_mend_is_named(config, monkeypatch, capsys):
    """Exit code 1."""
    monkeypatch.setattr(run.importlib.util, "find_spec", lambda name: None)
    assert main(["run", "train", str(config)]) == 1
    assert 'pip install "paddleformers==1.2.0" "pyarrow<26"' in capsys.readouterr().err


@pytest.fixture
def without_gpus(monkeypatch):
    for name in run.VISIBLE:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(run, "all_devices", lambda: ["cpu"])


def test_without_a_gpu_the_launcher_is_not_started(config, without_gpus, capsys):
    """Exit code 2 with the command that works; a dry run still prints."""
    assert main(["run", "train", str(config), "max_steps=3"]) == 2
    told = capsys.readouterr().err
    assert "Paddle sees no GPU" in told
    (command,) = re.findall("`(.*)`", told)
    assert shlex.split(command) == ["run", "--alone", "train", str(config), "max_steps=3"]
    assert main([*shlex.split(command), "--dry-run"]) == 0
    assert "paddleformers.cli.launcher" in capsys.readouterr().out
    assert main(["run", "--dry-run", "train", str(config)]) == 0


def test_devices_that_are_given_or_there_are_started(config, without_gpus, monkeypatch):
    """Whatever comes of them."""
    monkeypatch.setattr(run, "command_of", lambda _: [sys.executable, "-c", ""])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert main(["run", "train", str(config)]) == 0
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(run, "all_devices", lambda: ["cpu", "gpu:0"])
    assert main(["run", "train", str(config)]) == 0


def test_a_config_in_another_encoding_is_read(config):
    """What is not UTF-8 is not looked for."""
    config.write_bytes(b"stage: VL-SFT # f\xfcr\n")
    assert main(["run", "--dry-run", "train", str(config)]) == 0
