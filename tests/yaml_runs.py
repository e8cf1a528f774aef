"""`paddleformers-cli train x.yaml` on CPU ranks, as processes of its own."""

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np

import yaml_data
from paddle_vl_sp.settings import CONTEXT_PARALLEL, REPORT

TESTS = Path(__file__).parent
LIMIT = 240
LAST = "train_steps_per_second"
EXAMPLES = TESTS.parent / "examples"
ON_A_CPU = (  # what YAMLs for GPUs need there: flashmask has no kernel, and under sdpa packed samples see each other
    "device=cpu compute_type=float32 amp_master_grad=false max_grad_norm=0.0 tensor_parallel_output=false "
    "_attn_implementation=sdpa packing=false"
)
SMALLER = (
    "max_steps=2 max_seq_len=192 gradient_accumulation_steps=4 learning_rate=1e-3 warmup_steps=0 adam_epsilon=1e-3"
)
DATA = "VLSP_DATA_PARALLEL"  # among the switches: the ranks have batches of their own


def trained_in_all_ways(folder, model_type, runs):
    """{name: (weights at the end by rank, the log of the first rank)} for runs {name: (ranks, switches)}.

    The first one writes the weights that all begin with. Ranks are tensor-parallel, with sequence parallelism; those of
    context parallelism, which a switch asks for, share the axis of sep_parallel_size. That and one rank evaluate, too.
    """
    yaml = yaml_data.write(folder, TESTS / "cpu_plugin.py", model_type)
    return {name: trained(folder, yaml, model_type, name, *run) for name, run in runs.items()}


def environment(rank, nranks, endpoints):
    paths = [*map(str, (TESTS / "fleet_whole", TESTS, TESTS.parent)), os.environ.get("PYTHONPATH", "")]
    ranks = {"PADDLE_TRAINER_ID": str(rank), "PADDLE_RANK_IN_NODE": str(rank), "PADDLE_DISTRI_BACKEND": "gloo"}
    if nranks > 1:
        ranks |= {"PADDLE_TRAINERS_NUM": str(nranks), "PADDLE_TRAINER_ENDPOINTS": ",".join(endpoints)}
        ranks |= {"PADDLE_CURRENT_ENDPOINT": endpoints[rank]}
    quiet = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", REPORT: "1"}
    return {**os.environ, **ranks, **quiet, "PYTHONPATH": ":".join(paths)}


def trained(folder, yaml, model_type, name, nranks, switches):
    settings = []
    if CONTEXT_PARALLEL in switches:
        settings += [f"sep_parallel_size={nranks}"]
    elif DATA in switches:
        settings += switches[DATA].split()
    else:
        settings += [f"tensor_model_parallel_size={nranks}", f"sequence_parallel={str(nranks > 1).lower()}"]
    if {CONTEXT_PARALLEL, DATA} & switches.keys() or nranks == 1:
        settings += ["do_eval=true", "evaluation_strategy=steps"]
    tensor_parallel = 1 if {CONTEXT_PARALLEL, DATA} & switches.keys() else nranks
    return launched(folder, yaml, model_type, name, (nranks, tensor_parallel), switches, settings)


def launched(folder, yaml, model_type, name, sizes, switches, settings):
    """(weights at the end by rank, the log of the first rank) of a YAML with settings behind it.

    sizes: the number of ranks, and how many of them are tensor-parallel
    """
    nranks, tensor_parallel = sizes
    sockets = [socket.socket() for _ in range(nranks)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    endpoints = [f"127.0.0.1:{each.getsockname()[1]}" for each in sockets]
    for each in sockets:
        each.close()
    given = {
        "VLSP_MODEL": model_type,
        "VLSP_START": folder / "start.npz",
        "VLSP_END": folder / name,
        "VLSP_CHECKPOINT": folder / "checkpoint",
        "VLSP_TENSOR_PARALLEL": tensor_parallel,
    }
    command = [sys.executable, "-m", "paddleformers.cli.launcher", "train", str(yaml)]
    command += [f"output_dir={folder / 'out' / name}", *settings]
    processes = [
        subprocess.Popen(
            command,
            env=environment(rank, nranks, endpoints) | switches | {key: str(value) for key, value in given.items()},
            stdout=(folder / f"{name}-{rank}.log").open("w"),
            stderr=subprocess.STDOUT,
            cwd=folder,
        )
        for rank in range(nranks)
    ]
    try:
        codes = [process.wait(LIMIT) for process in processes]
    finally:
        for process in processes:
            process.kill()
    logs = [(folder / f"{name}-{rank}.log").read_text() for rank in range(nranks)]
    for code, log in zip(codes, logs, strict=True):
        # gloo may abort a process that ends after its peers: what the run does last, it has done
        assert code == 0 or (code == -signal.SIGABRT and LAST in log), f"{name}: {codes}\n{log[-3000:]}"
    return [dict(np.load(f"{given['VLSP_END']}-{rank}.npz")) for rank in range(nranks)], logs[0]


def example(folder, model_type, name, nranks, ranks, switches, settings):
    """The same of an example on few ranks, with the checkpoint and data of a folder where others have trained."""
    paths = {
        "custom_register_path": TESTS / "cpu_plugin.py",
        "model_name_or_path": folder / "checkpoint",
        "train_dataset_path": folder / "train.jsonl",
    }
    settings = [f"{key}={path}" for key, path in paths.items()] + [*ranks.split(), *f"{ON_A_CPU} {settings}".split()]
    sizes = (nranks, nranks if ranks.startswith("tensor") else 1)
    return launched(folder, EXAMPLES / f"{name}.yaml", model_type, f"{name}-{nranks}", sizes, switches, settings)


def distances(one, ranks, tower, cut):
    """Relative: between the ranks' copies of the tower's replicated parameters; of every parameter from one rank's."""
    copies = [key for key in one if tower in key and ranks[0][key].shape == one[key].shape]
    assert len(copies) > 30

    def apart(pairs):
        pairs = list(pairs)
        return (sum(((a - b) ** 2).sum() for a, b in pairs) / sum((b**2).sum() for _, b in pairs)) ** 0.5

    return apart((ranks[1][key], ranks[0][key]) for key in copies), max(
        apart((mine[key], cut(key, one, rank)) for key in one) for rank, mine in enumerate(ranks)
    )


def check_learned_alike(start, ranks, others, cut):
    """What each parameter learned on each rank is, to 1e-4, what it learned in another run, whose weights are whole."""
    for rank, (weights, whole) in enumerate(zip(ranks, others, strict=True)):
        for name in start:
            begin, end = (cut(name, each, rank) for each in (start, whole))
            learned = np.linalg.norm(end - begin)
            assert learned > 0, name
            assert np.linalg.norm(weights[name] - end) < 1e-4 * learned, name


def said_syncs(log):
    """The host syncs that the report of the run counted."""
    (count,) = re.findall(r"host syncs to plan: (\d+)", log)
    return int(count)


def said_evaluation(log):
    """The loss of the evaluation at the end."""
    (loss,) = re.findall(r"eval_loss: ([\d.]+)", log)
    return float(loss)


def check_context_parallel(one_rank, two_ranks):
    """All weights equal bit for bit on both ranks, within 1e-5 of one rank's; evaluation too; the kind, logged once."""
    (one,), one_log = one_rank
    ranks, log = two_ranks
    between, from_one = distances(one, ranks, "", lambda key, weights, _: weights[key])
    assert between == 0
    assert from_one < 1e-5
    assert abs(said_evaluation(log) - said_evaluation(one_log)) < 1e-5
    assert log.count("context parallelism, ulysses over 2 ranks: ") == 1
