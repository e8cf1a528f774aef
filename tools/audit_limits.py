"""How small an error audit_gradients finds: against directions, tolerance and the digits of loss and model.

python tools/audit_limits.py docs/audit-limits.csv            minutes on one core
python tools/audit_limits.py docs/audit-limits.csv --read     the table of a CSV that is there

Errors are planted in some parameters' gradients of a small right model on one process: along the gradient (a factor),
or across it (in a random direction), of a size relative to the gradient's. All other parameters must stay unnamed, but
for those that a noisy loss only judges together with a wrong one.
"""

import argparse
import csv
import itertools
import platform
import sys
from pathlib import Path

import numpy as np
import paddle
from paddle.nn import functional as F  # noqa: N812

from paddle_vl_sp import audit_gradients
from paddle_vl_sp.audit.judge import TOO_SMALL

HIDDEN, BLOCKS, WORDS, ROWS = 48, 3, 64, 128
DIGITS = ("fp32", "bf16 activations", "bf16 model", "bf16 loss")
ERRORS = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0)
SETTINGS = [(2, 0.05), (0, 0.05), (6, 0.05), (2, 0.01), (2, 0.2)]  # directions, tolerance
SEEDS, PLANTED, FOUND = 4, 4, 0.9
FIELDS = (
    "digits",
    "directions",
    "tolerance",
    "way",
    "error",
    "planted",
    "judged",
    "found",
    "false alarms",
    "with others",
)
FIELDS += ("forwards",)


class Model:
    """An embedding, some blocks norm -> linear -> gelu -> linear around a residual way, a head."""

    def __init__(self, digits, seed):
        self.digits, rng = digits, np.random.default_rng(seed)
        shapes = {"embed": (WORDS, HIDDEN), "head": (HIDDEN, WORDS)}
        for i in range(BLOCKS):
            shapes |= {f"{i}.norm": (HIDDEN,), f"{i}.up": (HIDDEN, 2 * HIDDEN), f"{i}.bias": (2 * HIDDEN,)}
            shapes |= {f"{i}.down": (2 * HIDDEN, HIDDEN)}
        self.named = [(name, self._drawn(rng, name, shape)) for name, shape in shapes.items()]
        self.ids, self.labels = (paddle.to_tensor(rng.integers(0, WORDS, ROWS)) for _ in range(2))

    def _drawn(self, rng, name, shape):
        value = rng.standard_normal(shape) * (0.1 if len(shape) == 1 else shape[0] ** -0.5) + float("norm" in name)
        tensor = paddle.to_tensor(value.astype("float32"))
        tensor = tensor.astype("bfloat16") if self.digits == "bf16 model" else tensor
        tensor.stop_gradient = False
        return tensor

    def rounded(self, x):
        return x.astype("bfloat16").astype("float32") if self.digits in ("bf16 activations", "bf16 model") else x

    def loss(self):
        weights = {name: tensor.astype("float32") for name, tensor in self.named}
        hidden = F.embedding(self.ids, weights["embed"])
        for i in range(BLOCKS):
            normed = hidden * paddle.rsqrt((hidden * hidden).mean(-1, keepdim=True) + 1e-6) * weights[f"{i}.norm"]
            inner = F.gelu(self.rounded(paddle.matmul(self.rounded(normed), weights[f"{i}.up"]) + weights[f"{i}.bias"]))
            hidden = self.rounded(hidden + paddle.matmul(inner, weights[f"{i}.down"]))
        loss = F.cross_entropy(paddle.matmul(hidden, weights["head"]), self.labels)
        return loss.astype("bfloat16") if self.digits == "bf16 loss" else loss


def planted(tensors, way, error, rng):
    """Makes gradients wrong by `error`, relative."""
    for tensor in tensors:
        gradient = tensor.grad.astype("float32")
        other = paddle.to_tensor(rng.standard_normal(gradient.shape).astype("float32"))
        other = gradient if way == "along" else other - gradient * ((other * gradient).sum() / gradient.square().sum())
        wrong = gradient + other * (error * gradient.norm() / other.norm())
        tensor.grad.set_value(wrong.astype(tensor.grad.dtype))


def row_of(digits, directions, tolerance, way, error):
    row = dict.fromkeys(FIELDS[5:], 0)
    for seed in range(SEEDS):
        model, rng = Model(digits, seed), np.random.default_rng(1000 + seed)
        chosen = {model.named[i][0]: model.named[i][1] for i in rng.permutation(len(model.named))[:PLANTED]}
        audit = audit_gradients(
            model.loss,
            model.named,
            None,
            directions=directions,
            tolerance=tolerance,
            after=lambda chosen=chosen, rng=rng: planted(chosen.values(), way, error, rng),
        )
        named = {finding.name for finding in audit.wrong}
        row["planted"] += PLANTED
        row["judged"] += sum(audit.verdicts[name] != TOO_SMALL for name in chosen)
        row["found"] += len(named & chosen.keys())
        alone = {finding.name for finding in audit.wrong if finding.together == 1}
        row["false alarms"] += len(alone - chosen.keys())
        row["with others"] += len(named - alone - chosen.keys())
        row["forwards"] += audit.num_forwards
    return dict(zip(FIELDS, (digits, directions, tolerance, way, error), strict=False)) | row


def measure(file):
    with file.open("w", newline="") as out:
        out.write(
            f"# python {' '.join(sys.argv)}; paddlepaddle {paddle.__version__}, {platform.machine()}, one CPU process\n"
        )
        writer = csv.DictWriter(out, FIELDS)
        writer.writeheader()
        for digits, setting, way, error in itertools.product(DIGITS, SETTINGS, ("along", "across"), ERRORS):
            writer.writerow(row_of(digits, *setting, way, error))
            out.flush()


def table(file):
    """The smallest error of which, and of all larger ones, nine of ten judged were found."""
    with file.open(newline="") as lines:
        rows = list(csv.DictReader(line for line in lines if not line.startswith("#")))
    yield "| digits | directions | tolerance | along | across | judged |\n|---|---|---|---|---|---|"
    for digits, (directions, tolerance) in itertools.product(DIGITS, SETTINGS):
        cells, judged = [], 0.0
        for way in ("along", "across"):
            key = digits, str(directions), str(tolerance), way
            own = [row for row in rows if tuple(row[field] for field in FIELDS[:4]) == key]
            judged += sum(int(row["judged"]) / int(row["planted"]) / len(own) / 2 for row in own)
            cells.append(smallest(own))
        yield f"| {digits} | {directions} | {tolerance} | {cells[0]} | {cells[1]} | {judged:.0%} |"
    yield f"false alarms: {sum(int(row['false alarms']) for row in rows)}"


def smallest(rows):
    found = "none"
    for row in sorted(rows, key=lambda row: -float(row["error"])):
        if not int(row["judged"]) or int(row["found"]) < FOUND * int(row["judged"]):
            break
        found = f"{float(row['error']):.1%}"
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("csv", type=Path)
    parser.add_argument("--read", action="store_true", help="measure nothing")
    given = parser.parse_args()
    if not given.read:
        paddle.set_device("cpu")
        measure(given.csv)
    print("\n".join(table(given.csv)))
