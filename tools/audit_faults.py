"""audit_gradients on four models: right versions must not be named, planted faults must be, each with its verdict.

python tools/audit_faults.py docs/audit-faults.csv            an hour on two cores; goes on with a CSV that is there
python tools/audit_faults.py docs/audit-faults.csv --read     the sums of a CSV that is there

What is right is told by the gradients themselves: those of the right version, compared parameter by parameter. Errors
between CLEARLY_RIGHT and CLEARLY_WRONG are near the audit's tolerance and are not counted.
"""

import argparse
import contextlib
import csv
import itertools
import platform
import sys
import time
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import paddle
import paddle.distributed as dist

TESTS = Path(__file__).parents[1] / "tests"
sys.path[:0] = [str(TESTS), str(TESTS / "multi_rank"), str(TESTS / "fleet_whole"), str(Path(__file__).parent)]

from paddle_vl_sp import audit_gradients  # noqa: E402
from paddle_vl_sp.audit.entries import gather_numbers  # noqa: E402
from paddle_vl_sp.testing import run_ranks  # noqa: E402
from paddle_vl_sp.testing.tensor_parallel import enable_tensor_parallel_on_cpu, init_tensor_parallel  # noqa: E402

CLEARLY_RIGHT, CLEARLY_WRONG = 0.02, 0.12
SEEDS = {"mlp": range(8), "ring": range(4), "ulysses": range(4), "qwen3_vl": range(6), "qwen2_5_vl": range(6)}
SEEDS |= {"data parallel": range(4), "text in parts": range(2), "fleet qwen3_vl": range(2)}
KINDS = ([["image"], ["image", "image"]], [["image"], []], [["image", "image"], ["image"]], [["video"], ["image"]])
QUICK = ("unmarked norms", "marked tower", "upstream without SP", "missing sum")  # of few forwards: also on four ranks
QUICK += ("upstream",)  # of many, but PaddleFormers' own
FIELDS = ("model", "ranks", "fault", "seed", "parameters", "right", "wrong", "found", "named", "other verdict")
FIELDS += ("false alarms", "not judged", "forwards", "seconds")


@contextlib.contextmanager
def built(model, fault, seed, group):
    """loss, named parameters, after"""
    import audit_models

    if model == "mlp":
        yield audit_models.tensor_parallel_mlp(fault, seed)
    elif model in ("ring", "ulysses"):
        yield audit_models.small_decoder(model, fault, seed)
    elif model == "data parallel":
        yield audit_models.data_parallel(audit_models.fused_mean if fault else audit_models.contiguous_mean, seed)
    elif model == "text in parts":
        import audit_formers

        yield audit_formers.text_in_parts(fault, group, seed)
    elif model == "fleet qwen3_vl":
        import audit_fleet

        with audit_fleet.fleet_model(fault, group, seed) as (loss, layer):
            yield loss, list(layer.named_parameters()), None
    else:
        import audit_formers

        samples = KINDS[seed % len(KINDS)]
        with audit_formers.formers_model(model, fault, group, samples, seed) as (loss, layer):
            yield loss, list(layer.named_parameters()), None


def faults_of(model):
    import audit_models

    if model == "mlp":
        return list(audit_models.MLP_FAULTS)
    if model in ("ring", "ulysses"):
        return list(audit_models.DECODER_FAULTS)
    if model == "data parallel":
        return list(audit_models.DATA_PARALLEL_FAULTS)
    if model == "fleet qwen3_vl":
        import audit_fleet

        return list(audit_fleet.FAULTS)
    import audit_formers

    return list((audit_formers.FAULTS | {"text in parts": audit_formers.TEXT_FAULTS})[model])


def as_the_optimizer_sees(loss, named, after):
    """{name: gradient} after the reduction that `after` or a mark asks for."""
    loss().backward()
    if after is not None:
        after()
    found = {}
    for name, tensor in named:
        gradient = np.zeros(tensor.shape, "float32") if tensor.grad is None else tensor.grad.numpy()
        if after is None and getattr(tensor, "sequence_parallel", False):
            gradient = summed(gradient)
        found[name] = gradient
        tensor.clear_gradient(False)
    return found


def summed(array):
    total = paddle.to_tensor(array)
    dist.all_reduce(total)
    return total.numpy()


def by_gradients(name, tensor, got, right, group):
    """(error of the worst rank, what the verdict must be) or None where there is no gradient to speak of."""
    n, size = group.nranks, float(np.linalg.norm(right))
    is_cut = getattr(tensor, "is_distributed", False)
    total = got if is_cut else summed(got)
    distances = [np.linalg.norm(got - right), np.linalg.norm(total - right), np.linalg.norm(got / n - right)]
    table = gather_numbers([size, np.linalg.norm(got), *distances], group)
    size = float((table[:, 0] ** 2).sum() ** 0.5) if is_cut else float(table[0, 0])
    if size == 0 and not table[:, 1].any():
        return 0.0, "none"
    whole, partial, times = (float(table[:, i].max()) / max(size, 1e-30) for i in (2, 3, 4))
    if not table[:, 1].any():
        return whole, "none"
    is_marked = getattr(tensor, "sequence_parallel", False)
    if whole <= CLEARLY_RIGHT:
        return whole, "partial" if is_marked else "whole"
    if partial <= CLEARLY_RIGHT and not is_cut and not is_marked:
        return whole, "partial"
    return whole, f"times {n}" if times <= CLEARLY_RIGHT else "mixed"


def row_of(model, fault, seed, group):
    with built(model, "", seed, group) as (loss, named, after):
        right = as_the_optimizer_sees(loss, named, after)
    with built(model, fault, seed, group) as (loss, named, after):
        got = as_the_optimizer_sees(loss, named, after)
        begin = time.monotonic()
        combine = "mean" if model == "data parallel" else "equal"
        audit = audit_gradients(loss, named, group, after=after, combine=combine)
        seconds = time.monotonic() - begin
        row = Counter()
        for name, tensor in named:
            error, wanted = by_gradients(name, tensor, got[name], right[name], group)
            verdict, is_named = audit.verdicts[name], name in {finding.name for finding in audit.wrong}
            if verdict == "too small to judge":
                row["not judged"] += 1
            elif error <= CLEARLY_RIGHT:
                row["right"] += 1
                row["false alarms"] += is_named
            elif error >= CLEARLY_WRONG:
                row["wrong"] += 1
                row["found"] += is_named
                row["named"] += verdict == wanted
                row["other verdict"] += is_named and verdict != wanted
    about = {"model": model, "ranks": group.nranks, "fault": fault or "none", "seed": seed, "parameters": len(named)}
    about |= {"forwards": audit.num_forwards, "seconds": f"{seconds:.1f}"}
    return {field: about.get(field, row[field]) for field in FIELDS}


def cases_of(model, nranks, is_right):
    """The right version with every seed, or the faults; of slow models some on four ranks."""
    if is_right:
        return [("", seed) for seed in SEEDS[model]]
    return [(fault, 0) for fault in faults_of(model) if nranks == 2 or fault in QUICK or "qwen" not in model]


def measure(nranks, model, cases):
    """On every rank: a row of each case."""
    with enable_tensor_parallel_on_cpu():
        group = init_tensor_parallel(nranks)
        return [row_of(model, fault, seed, group) for fault, seed in cases]


def rows_in(file):
    if not file.exists():
        return []
    with file.open(newline="") as lines:
        return list(csv.DictReader(line for line in lines if not line.startswith("#")))


def write(file):
    """Appends the rows that are not there yet, launch by launch."""
    import audit_faults

    there = {(row["model"], int(row["ranks"]), row["fault"], int(row["seed"])) for row in rows_in(file)}
    with file.open("a", newline="") as out:
        writer = csv.DictWriter(out, FIELDS)
        if not there:
            words = f"python {' '.join(sys.argv)}; paddlepaddle {paddle.__version__}, {platform.machine()}, CPU ranks"
            out.write(f"# {words}\n")
            writer.writeheader()
        for is_right, nranks, model in itertools.product((True, False), (2, 4), SEEDS):
            if model.startswith("fleet") and find_spec("paddlefleet") is None:
                print(f"{model} is left out: paddlefleet is not installed")
                continue
            cases = cases_of(model, nranks, is_right)
            left = [case for case in cases if (model, nranks, case[0] or "none", case[1]) not in there]
            if left:
                writer.writerows(run_ranks(audit_faults.measure, nranks, nranks, model, left, timeout=3000)[0])
                out.flush()


def sums(file):
    """For the page: verdicts of right versions and false alarms, faults and what was found."""
    rows = rows_in(file)
    for model in dict.fromkeys(row["model"] for row in rows):
        own = [row for row in rows if row["model"] == model]
        total = {field: sum(int(row[field]) for row in own) for field in FIELDS[5:-1]}
        right = [row for row in own if row["fault"] == "none"]
        alone = sum(int(row["right"]) for row in right), sum(int(row["false alarms"]) for row in right)
        faults = len({row["fault"] for row in own} - {"none"})
        least, most = (f(int(row["forwards"]) for row in right) for f in (min, max))
        yield f"{model}: right versions {alone}, forwards {least} to {most}; {faults} faults; all: {total}"
    yield f"all: {sum(int(r['right']) for r in rows)} right, {sum(int(r['false alarms']) for r in rows)} false alarms"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("csv", type=Path)
    parser.add_argument("--read", action="store_true", help="measure nothing")
    given = parser.parse_args()
    if not given.read:
        write(given.csv)
    print("\n".join(sums(given.csv)))
