"""The examples: the scripts run and print the right numbers, the YAMLs are what PaddleFormers takes.

One launch computes what the scripts of two ranks need; each script then runs over that. One runs wholly by itself.
"""

import contextlib
import importlib
import io
import json
import pickle
import re
import runpy
import sys

import pytest
from docs_blocks import ROOT, python
from examples_on_ranks import EXAMPLES, ON_RANKS, on_a_rank

from paddle_vl_sp import testing
from paddle_vl_sp.settings import CONTEXT_PARALLEL, SWITCHES

YAMLS = sorted(path.name for path in EXAMPLES.glob("*.yaml"))
LONGEST = 90  # lines of an example


@pytest.fixture(scope="module")
def demo():
    """The module, as its own folder finds it."""
    pytest.importorskip("paddleformers")
    sys.path.insert(0, str(ROOT / "tools"))
    return importlib.import_module("demo")


@pytest.fixture(scope="module")
def one_rank(demo):
    """Of the demonstration with the plain class: whether each of two steps had equal bits, and what was learned."""
    training, learned = importlib.import_module("demo_parts.training"), []
    return list(training.on_one_rank(training.PLAIN, 2, learned)), learned[0]


@pytest.fixture(scope="module")
def found(one_rank, tmp_path_factory):
    """By rank, what the examples and the demonstration compute."""
    reference = tmp_path_factory.mktemp("demo") / "one_rank"
    reference.write_bytes(pickle.dumps(one_rank[1]))
    return testing.run_ranks(on_a_rank, 2, str(reference), str(reference.with_name("steps")), timeout=250)


@pytest.fixture(scope="module")
def printed(found):
    """{name: what the script prints}"""
    told = {}
    with pytest.MonkeyPatch.context() as replaced:
        replaced.syspath_prepend(str(EXAMPLES))
        replaced.setattr(testing, "run_ranks", lambda fn, *_, **__: [rank[fn.__module__] for rank in found])
        for name in ON_RANKS:
            with contextlib.redirect_stdout(io.StringIO()) as out:
                runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
            told[name] = out.getvalue()
            sys.modules.pop(name)
    return told


def rows(text):
    """{what a line begins with: its numbers}; numbers are what has a decimal point."""
    found = re.findall(r"^(\D.*?)\s{2,}(?:\(.*\)\s+)?([\d.e+-]+(?: +[\d.e+-]+)*)$", text, re.MULTILINE)
    return {name: [float(number) for number in numbers.split()] for name, numbers in found}


def test_context_parallel(printed):
    """Loss and every gradient within fp32 of one process, of each kind; what was chosen is said."""
    (loss,) = re.findall(r"^one process: loss (\S+)$", printed["context_parallel"], re.MULTILINE)
    pattern = r"^two ranks, (\w+): loss (\S+), worst gradient error (\S+)\n    (\w+) over 2 ranks: \w+"
    found = re.findall(pattern, printed["context_parallel"], re.MULTILINE)
    assert [(asked, chosen) for asked, _, _, chosen in found] == [
        ("auto", "ulysses"),
        ("gather", "gather"),
        ("ring", "ring"),
        ("ulysses", "ulysses"),
    ]
    for _, shared, error, _ in found:
        assert abs(float(shared) - float(loss)) < 1e-5
        assert float(error) < 1e-5


def test_an_audit_finds_its_fault_and_no_other(printed):
    """The two parameters before the block are partial, the others whole; all are whole once it is fixed."""
    before, after = printed["audit_own_model"].split("fixed\n")
    lines = {line.split()[0]: line for line in before.splitlines() if " ! " in line}
    assert lines.keys() == {"embed", "scale"}
    assert all("partial !" in line and "the sum over ranks 0, 1 completes it" in line for line in lines.values())
    assert after.startswith("gradients over ranks 0, 1: nothing wrong found; 5 whole")


def test_balanced_towers(printed):
    """The weights of plain data parallelism, fp32; the busiest rank of each step encodes less."""
    lines = re.findall(r"^(each its own|balanced) .*\s(\d+)\s+(\S+)$", printed["balanced_towers"], re.MULTILINE)
    busiest = {name: int(patches) for name, patches, _ in lines}
    apart = {name: float(number) for name, _, number in lines}
    assert busiest["balanced"] < 0.7 * busiest["each its own"]
    assert apart["each its own"] == 0
    assert apart["balanced"] < 1e-5


def test_own_loop(printed):
    """Without complete_grad wrong gradients and copies that differ; with it fp32 of one process, and equal bits."""
    found = rows(printed["own_loop"])
    assert min(found["without complete_grad"]) > 0.1
    error, drift = found["with complete_grad"]
    assert error < 1e-5
    assert drift == 0


def test_packed_ring(printed):
    """Loss, logits and gradients within fp32 of one process; either way of forgetting something is far off."""
    found = rows(printed["packed_ring"])
    loss = found["one process"][0]
    assert abs(found["ring, packed"][0] - loss) < 1e-5
    assert max(found["ring, packed"][1:]) < 1e-5
    for way in ("own part only", "documents joined"):
        assert min(found[way][1:]) > 0.1


def test_vision_dp(printed):
    """Features and gradients within fp32 of a tower that encodes all; longest gives each rank half of the patches."""
    text = printed["vision_dp"]
    assert re.search(r"^every rank all +\(256, 256\)", text, re.MULTILINE)
    assert re.search(r"^longest +\(128, 128\)", text, re.MULTILINE)
    found = rows(text)
    assert found.keys() == {"every rank all", "contiguous", "longest"}
    assert max(map(max, found.values())) < 1e-5


def test_trainer_on_cpu_ranks():
    """By itself, in processes of its own: upstream's tower is wrong, here it is right, copies are equal."""
    pytest.importorskip("paddleformers")
    done = python(EXAMPLES / "trainer_on_cpu_ranks.py")
    assert done.returncode == 0, done.stderr[-3000:]
    found = rows(done.stdout)
    assert found["upstream"][0] > 0.3
    assert found["upstream"][1] > 1e-3
    assert found["with paddle_vl_sp"][0] < 1e-5
    assert found["with paddle_vl_sp"][1] == 0


def test_the_demonstration(demo, one_rank, found):
    """Two steps: equal bits on one rank; on two upstream's fault, and here fp32 of one rank and equal copies."""
    equal, ranks = one_rank[0], [rank["demo"] for rank in found]
    assert demo.is_as_claimed(equal, ranks)
    assert demo.worst(ranks, "upstream", "norm") > 0.1
    assert demo.worst(ranks, "patched", "norm") < 1e-5


def test_export_static(capsys):
    """Bit for bit, for three shapes on both ranks; the ranks' visual rows are all."""
    runpy.run_path(str(EXAMPLES / "export_static.py"), run_name="__main__")
    found = re.findall(r"^\[(\d, \d+)\] +([01]) +(\d+) of (\d+) +(\w+)$", capsys.readouterr().out, re.MULTILINE)
    assert [shape for shape, *_ in found] == ["1, 8"] * 2 + ["3, 8"] * 2 + ["2, 64"] * 2
    assert {equal for *_, equal in found} == {"yes"}
    for first, second in zip(found[::2], found[1::2], strict=True):
        assert int(first[2]) + int(second[2]) == int(first[3]) == int(second[3])


@pytest.mark.parametrize("name", YAMLS)
def test_a_yaml_is_what_paddleformers_takes(name):
    """By its own parser, which refuses unknown keys; it trains; the plugin's path is relative to the repository."""
    yaml = pytest.importorskip("yaml")
    parser = pytest.importorskip("paddleformers.cli.hparams.parser")
    said = yaml.safe_load((EXAMPLES / name).read_text())
    assert (ROOT / said.pop("custom_register_path")).is_file()
    model, data, _, _, training = parser._parse_train_args(dict(said))
    assert (model.stage, data.packing, training.bf16, training.do_train) == ("VL-SFT", True, True, True)
    assert training.sequence_parallel == ("tp_sp" in name)
    assert data.template in parser_templates()


def parser_templates():
    from paddleformers.datasets.template.template import TEMPLATES

    return TEMPLATES


@pytest.mark.parametrize("name", YAMLS)
def test_a_yaml_says_how_to_launch_it(name):
    """The command, switches that exist, and a line of data whose images have their places."""
    text = (EXAMPLES / name).read_text()
    assert f"#   paddleformers-cli train examples/{name}\n" in text
    for switch, words in re.findall(r"export (\w+)=(\w+)", text):
        assert words in SWITCHES[switch]
    (line,) = re.findall(r'^#   (\{"messages".*\})$', text, re.MULTILINE)
    sample = json.loads(line)
    assert sum(message["content"].count("<image>") for message in sample["messages"]) == len(sample["images"])


def test_the_context_parallel_yaml_names_every_kind():
    text = (EXAMPLES / "sft_context_parallel.yaml").read_text()
    (words,) = re.findall(rf"export {CONTEXT_PARALLEL}=(.*);", text)
    assert set(re.findall(r"\w+", words)) - {"or"} == set(SWITCHES[CONTEXT_PARALLEL]) - {"0"}


def test_every_example_is_short_and_listed():
    """With its name in a line of its own."""
    listed = (EXAMPLES / "README.md").read_text()
    files = [path for path in EXAMPLES.iterdir() if path.is_file() and path.name != "README.md"]
    for path in files:
        assert f"examples/{path.name}`" in listed
        assert len(path.read_text().splitlines()) <= LONGEST, path
