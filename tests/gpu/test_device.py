"""Launches on the device of their tensors, whichever is current: on a double of two GPUs and of Paddle's tensor."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

OPERATORS = Path(__file__).parents[2] / "custom_ops"
DOUBLE = Path(__file__).parent / "device_double"


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
def test_a_launch_goes_to_the_device_of_its_tensor(tmp_path):
    """Exact device and stream in the launch, and the old device after it, also after an error."""
    program = tmp_path / "device_test"
    options = ["-std=c++17", "-Wall", "-Wextra", "-Werror", "-DVLSP_WITH_CUDA", f"-I{DOUBLE}", f"-I{OPERATORS}"]
    sources = [str(DOUBLE / "device_test.cc"), "-x", "c++", str(OPERATORS / "device.cu")]
    subprocess.run(["g++", *options, "-o", str(program), *sources], check=True)
    done = subprocess.run([str(program)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "device: passed\n")


def test_every_launch_of_the_operators_takes_its_stream_from_there():
    """No operator asks a tensor for its stream, and all that launches gets one of DeviceOf."""
    sources = {path.name: path.read_text() for path in OPERATORS.glob("*_op.cc")}
    streams = {name: set(re.findall(r"([\w()]+)\.stream\(\)", text)) for name, text in sources.items()}
    assert streams == {"index_op.cc": {"device"}, "rows_op.cc": {"DeviceOf(x)"}}
    assert "const DeviceOf device(tokens);" in sources["index_op.cc"]
