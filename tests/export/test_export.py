"""Programs saved here and run in a fresh process: bit-exact with the slow answers of oracle.py, in every form."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import paddle
import pytest

import oracle
from paddle_vl_sp import SeqLayout
from paddle_vl_sp.backends import load, plain
from paddle_vl_sp.export import DeepstackAdd, IndexBuilder, interval_table, save

IMAGE, VIDEO, TEXT = 5, 6, 7
TOOLS = Path(__file__).parents[2] / "tools"
WAYS = ("jit", "predictor")
# The names of the rules: a program each, exact and padded.
RULES = {
    "whole": {},
    "sp": {"sp_size": 3, "sp_rank": 1},
    "zigzag": {"cp_size": 2, "cp_rank": 1, "sp_size": 2, "sp_rank": 1},
    "middle": {"cp_size": 2, "cp_rank": 1},  # its two chunks touch
    "contiguous": {"cp_size": 2, "cp_rank": 0, "cp_mode": "contiguous", "sp_size": 2, "sp_rank": 1},
    "front": {"sp_size": 4, "sp_rank": 0, "remainder": "front"},
}
LENGTHS = {"whole": (1, 9), "sp": (3, 12), "front": (3, 11)}
PACKED = {"cp_size": 2, "sp_size": 2}
RUN_WITHOUT_US = """
import runpy, sys
sys.modules["paddle_vl_sp"] = None
sys.argv.pop(0)
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def positions(seq_len, rule, cu_seqlens=None):
    cut = {"cp_size": 1, "cp_rank": 0, "cp_mode": "zigzag", "sp_size": 1, "sp_rank": 0} | rule
    cut.pop("remainder", None)
    return oracle.cut_positions(seq_len, **cut, cu_seqlens=cu_seqlens)


def expected(ids, owned, sequence_first, padded):
    visual = np.isin(ids, (IMAGE, VIDEO))
    found = [np.array(x, dtype=np.int64) for x in oracle.pairs(visual, owned, sequence_first)]
    n = found[0].size
    if padded:
        found = [np.pad(x, (0, ids.shape[0] * len(owned) - n), constant_values=-1) for x in found]
    return [*found, np.array([n, visual.sum()])]


def batches(lengths, sizes=(1, 3)):
    """Text-only, image-only and mixed ids, of several batches and lengths."""
    rng = np.random.default_rng(0)
    for seq_len in lengths:
        for batch in sizes:
            for kinds in ((TEXT,), (IMAGE,), (TEXT, IMAGE, VIDEO)):
                yield rng.choice(kinds, (batch, seq_len)).astype(np.int64)


class Folder:
    """Programs and cases in one folder; `run` makes a fresh process of them."""

    def __init__(self, path, backend):
        self.path, self.backend, self.cases = path, backend, []

    def save(self, name, layer, *spec):
        save(layer, str(self.path / name), layer.input_spec(*spec))

    def add(self, program, want, **inputs):
        np.savez(self.path / f"{program}.{len(self.cases)}.in.npz", **inputs)
        self.cases.append((program, want))

    def run(self):
        run = [str(TOOLS / "run_static.py"), str(self.path)]
        if self.backend == "op":
            command = [sys.executable, *run, "--import", "paddle_vl_sp.export"]
        else:
            command = [sys.executable, "-c", RUN_WITHOUT_US, *run]
        done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
        assert done.returncode == 0, done.stderr[-3000:]

    def outcomes(self, program):
        """(what was wanted, what came) of every case of a program, both ways."""
        for number, (name, want) in enumerate(self.cases):
            for way in WAYS:
                if name == program:
                    yield want, dict(np.load(self.path / f"{name}.{number}.{way}.npz"))


def add_plans(folder):
    for name, rule in RULES.items():
        for padded in (False, True):
            program = f"{name}_{'padded' if padded else 'exact'}"
            sequence_first = name != "contiguous"
            builder = IndexBuilder(
                (IMAGE, VIDEO), sequence_first=sequence_first, padded=padded, backend=folder.backend, **rule
            )
            folder.save(program, builder)
            for ids in batches(LENGTHS.get(name, (8, 24))):
                want = expected(ids, positions(ids.shape[1], rule), sequence_first, padded)
                folder.add(program, want, tokens=ids)
            if name in ("sp", "zigzag", "contiguous"):
                folder.add(program, None, tokens=np.full((4, 9 if name != "sp" else 10), IMAGE))


def add_packed_plans(folder):
    for padded in (False, True):
        program = f"packed_{'padded' if padded else 'exact'}"
        builder = IndexBuilder(
            (IMAGE, VIDEO), sequence_first=True, packed=True, padded=padded, backend=folder.backend, **PACKED
        )
        folder.save(program, builder)
        for bounds in ((0, 8), (0, 4, 16), tuple(range(0, 49, 4))):
            for ids in batches(bounds[-1:], sizes=(1,)):
                for rank in range(4):
                    rule = PACKED | {"cp_rank": rank // 2, "sp_rank": rank % 2}
                    table = interval_table(SeqLayout(bounds[-1], cu_seqlens=bounds, **rule), 14)
                    want = expected(ids, positions(bounds[-1], rule, bounds), True, padded)
                    folder.add(program, want, tokens=ids, intervals=table)
        nothing = np.zeros((1, 3), dtype=np.int64)  # a rank that owns nothing: padded, as long as the sizes say
        folder.add(program, expected(ids, [], True, False) if not padded else None, tokens=ids, intervals=nothing)
        if padded:
            owns_none = [np.full(12, -1), np.full(12, -1), np.array([0, np.isin(ids, (IMAGE, VIDEO)).sum()])]
            folder.cases[-1] = (program, owns_none)


def add_tokens_of_other_types(folder):
    for kind in ("int32", "bool"):
        ids = None if kind == "bool" else (IMAGE, VIDEO)
        builder = IndexBuilder(ids, sequence_first=False, sp_size=2, sp_rank=1, backend=folder.backend)
        folder.save(kind, builder, "int32")
        for drawn in batches((8,)):
            tokens = np.isin(drawn, (IMAGE, VIDEO)) if kind == "bool" else drawn.astype(kind)
            folder.add(kind, expected(drawn, range(4, 8), False, False), tokens=tokens)


def add_sums(folder):
    rng = np.random.default_rng(1)
    for dtype in ("float32", "float16"):
        folder.save(f"add_{dtype}", DeepstackAdd(backend=folder.backend), None, dtype)
        for batch, seq_len, width, num_features, used in ((2, 12, 6, 9, 7), (1, 5, 1, 5, 5), (3, 7, 16, 0, 0)):
            for unused in (0, 4):
                hidden = rng.standard_normal((batch, seq_len, width)).astype(dtype)
                hidden[0, 0, 0] = -0.0
                features = rng.standard_normal((num_features, width)).astype(dtype)
                update = np.sort(rng.permutation(np.arange(1, batch * seq_len))[:used])
                gather = np.arange(num_features)[: len(update)]
                update = update[: len(gather)]
                want = hidden.copy()
                want.reshape(-1, width)[update] += features[gather]
                update, gather = (np.pad(x, (0, unused), constant_values=-1) for x in (update, gather))
                arrays = {"hidden": hidden, "features": features, "update_indices": update, "gather_indices": gather}
                folder.add(f"add_{dtype}", [want], **arrays)


@pytest.fixture(scope="module", params=["op", "python"])
def folder(request, tmp_path_factory):
    if request.param == "op" and load.backend().name != "op":
        pytest.skip("no custom operators: the header of this report says why")
    made = Folder(tmp_path_factory.mktemp(request.param), request.param)
    for fill in (add_plans, add_packed_plans, add_tokens_of_other_types, add_sums):
        fill(made)
    made.run()
    return made


PROGRAMS = [f"{name}_{form}" for name in (*RULES, "packed") for form in ("exact", "padded")]


@pytest.mark.parametrize("program", [*PROGRAMS, "int32", "bool", "add_float32", "add_float16"])
def test_a_loaded_program_gives_the_slow_answer(folder, program):
    """Bit-exact with the oracle, shapes and dtypes too, by paddle.jit.load and by the inference predictor."""
    compared = 0
    for want, got in folder.outcomes(program):
        if want is None:
            continue
        assert "error" not in got, str(got["error"])
        for i, array in enumerate(want):
            assert got[str(i)].shape == array.shape
            assert got[str(i)].dtype == array.dtype
            assert got[str(i)].tobytes() == array.tobytes()
        compared += 1
    assert compared >= 12


@pytest.mark.parametrize("program", [f"{name}_{form}" for name in ("sp", "zigzag") for form in ("exact", "padded")])
def test_a_length_that_does_not_divide_stops_the_program(folder, program):
    """The batch of 4 makes B * S divide where S does not."""
    stopped = [str(got["error"]) for want, got in folder.outcomes(program) if want is None]
    assert len(stopped) == len(WAYS)
    assert all("divisible" in error for error in stopped)


def test_a_padded_program_has_no_shape_that_depends_on_data(tmp_path):
    """By name of operator; the exact program, which has such shapes, shows that the names are right."""
    found = {}
    for padded in (False, True):
        builder = IndexBuilder((IMAGE,), sequence_first=True, padded=padded, backend="python", **RULES["zigzag"])
        save(builder, str(tmp_path / str(padded)))
        text = (tmp_path / f"{padded}.json").read_text()
        found[padded] = {name for name in ("masked_select", "nonzero", "shape64", "slice_", "arange") if name in text}
    assert "masked_select" in found[False]
    assert not found[True]


def test_the_layer_itself_is_what_it_was_before_it_was_saved(tmp_path):
    """Equal: paddle.jit.save would leave a traced forward on the layer."""
    builder = IndexBuilder((IMAGE,), sequence_first=True)
    forward = builder.forward
    save(builder, str(tmp_path / "x"))
    assert builder.forward == forward


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_intervals_by_tensors_are_those_of_the_layout(rule):
    """Exact, for lengths that a graph would learn at run time."""
    for seq_len in (12, 24, 48) if rule.get("remainder") != "front" else range(1, 14):
        layout = SeqLayout(seq_len, **rule)
        table = plain.owned_intervals(paddle.to_tensor([seq_len]), layout).numpy()
        owned = [start + i for start, length, _ in table for i in range(length)]
        assert owned == layout.positions().tolist()
        assert [low + i for _, length, low in table for i in range(length)] == list(range(layout.local_len))


@pytest.mark.parametrize("name", ["add_rows", "replace_rows"])
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
def test_pairs_to_be_skipped(name, dtype):
    """Exact, against a loop: pairs of -1 or past the end change nothing; features are cast first."""
    rng = np.random.default_rng(2)
    hidden, features = (paddle.to_tensor(rng.standard_normal(shape)) for shape in ((2, 5, 3), (4, 3)))
    update, gather = [0, 3, 7, -1, 10, 8], [0, 1, 3, -1, 2, 4]
    for feature_type in (dtype, "float32"):
        given, added = hidden.astype(dtype), features.astype(feature_type)
        wanted, rows = (x.astype(dtype).astype("float64").numpy().reshape(-1, 3) for x in (given, added))
        for u, g in ((0, 0), (3, 1), (7, 3)):
            wanted[u] = rows[g] + (wanted[u] if name == "add_rows" else 0)
        got = getattr(plain, name)(given, added, paddle.to_tensor(update), paddle.to_tensor(gather))
        assert (got.dtype, got.shape) == (given.dtype, given.shape)
        rounded = paddle.to_tensor(wanted).astype("float32" if dtype != "float64" else dtype).astype(dtype)
        assert np.array_equal(got.astype("float64").numpy().reshape(-1, 3), rounded.astype("float64").numpy())


def test_the_interval_table_of_the_docstring():
    """Exact; filled up with empty intervals, or refused where there is no room."""
    layout = SeqLayout(12, cu_seqlens=(0, 4, 12), cp_size=2)
    assert interval_table(layout).tolist() == [[0, 1, 0], [3, 3, 1], [10, 2, 4]]
    assert interval_table(layout, 4).tolist()[3] == [12, 0, 6]
    assert interval_table(SeqLayout(0)).shape == (1, 3)
    with pytest.raises(ValueError, match="num_intervals must be at least 3"):
        interval_table(layout, 2)


def test_what_cannot_be_saved_is_refused():
    """Refused before a program is made, with what does not go together."""
    with pytest.raises(ValueError, match="do not go together"):
        IndexBuilder((1,), sequence_first=True, packed=True, padded=True, remainder="front")
    with pytest.raises(ValueError, match="backend must be one of"):
        IndexBuilder((1,), sequence_first=True, backend="cuda")
    with pytest.raises(ValueError, match="placeholder_ids must be one or more integers"):
        IndexBuilder((), sequence_first=True)
    with pytest.raises(ValueError, match="cp_rank 2 is out of range"):
        IndexBuilder((1,), sequence_first=True, cp_size=2, cp_rank=2)
    tokens, table = paddle.zeros([1, 4], "int64"), paddle.to_tensor(interval_table(SeqLayout(4)))
    for packed, given in ((True, [tokens]), (False, [tokens, table])):
        with pytest.raises(ValueError, match="a packed builder takes interval_table"):
            IndexBuilder((1,), sequence_first=True, packed=packed)(*given)


@pytest.mark.parametrize(("switch", "fails"), [("op", True), ("auto", False)])
def test_the_import_says_when_operators_cannot_be_loaded(switch, fails):
    """With the operators hidden: an error where they were insisted on, a warning that names the consequence else."""
    code = (
        "from pathlib import Path; real = Path.is_file\n"
        "Path.is_file = lambda self: not self.name.startswith('_ops') and real(self)\n"
        "import paddle_vl_sp.export"
    )
    env = {**os.environ, "PADDLE_VL_SP_BACKEND": switch}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert (done.returncode != 0) == fails
    wanted = "OperatorsUnavailable" if fails else "programs saved with the operators cannot run in this process"
    assert wanted in done.stderr


@pytest.mark.parametrize(
    "options", [["--packed", "--padded", "--cp-size", "2"], ["--sp-size", "2", "--sequence-first"]]
)
def test_the_tool_writes_and_checks(tmp_path, options):
    """The tool's own comparison with eager mode passes, and its files are there."""
    command = [sys.executable, str(TOOLS / "export_static.py"), str(tmp_path), "--ids", "5", "6", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "runs equal to eager" in done.stdout
    assert (tmp_path / "deepstack_add.json").exists()
