"""Whether code of PaddleFormers that is not known may be replaced: its family's clauses are tried on it.

They are tried in a process of their own, on the CPU and without a group, once a machine: the verdict is kept in a file
of the user's cache folder, by a hash of the code, and other ranks wait for it. Where the folder cannot be written to,
or PADDLE_VL_SP_PROBE=always, each process tries; with PADDLE_VL_SP_PROBE=never what is not known is refused.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib
import inspect
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from paddle_vl_sp.formers.known import (
    Family,
    Swapped,
    class_fingerprint,
    code_of,
    fingerprint,
    one_line,
    original_of,
)
from paddle_vl_sp.log import logger
from paddle_vl_sp.settings import PROBE, setting

TIMEOUT = 300  # seconds; the clauses take two, the imports ten
HERE = Path(__file__).parent
PASSING = (": MemoryError", ": OSError")
OF_A_RUN = ("PADDLE_", "FLAGS_", "TRAINING_", "POD_", "MASTER_")  # variables that make a process a rank, or strict


class TimedOut(RuntimeError):
    """A trial did not end."""


@dataclass(frozen=True)
class Verdict:
    """What came out of the trials."""

    key: str  # of the code that was tried
    tried: int
    broken: tuple[str, ...]  # clauses, and how


@dataclass(frozen=True)
class Judgement:
    """Whether a family's methods may be replaced."""

    refused: list[str]  # what is not as known, and why that matters; empty: they may be
    admitted: str = ""  # what is not as known although they may be


def judge(family: Family, module: Any, is_shared: bool = False, is_cut: bool = False) -> Judgement:
    """Known code may be replaced, and so may code that does all that ours need of it."""
    deviations = list(family.deviations(module, is_shared, is_cut))
    refused = [deviation.why for deviation in deviations]
    if not refused or setting(PROBE) == "never" or not all(deviation.is_text for deviation in deviations):
        return Judgement(refused)
    verdict = verdict_on(family, module, is_shared)
    if verdict.broken or not verdict.tried:
        return Judgement([*refused, *verdict.broken])
    trials = f"{verdict.tried} trial{'s' * (verdict.tried > 1)}"
    admitted = f"not the known code, but all that is needed of it holds ({trials})"
    logger.info("%s is admitted: %s; %s", family.name, admitted, "; ".join(refused))
    return Judgement([], admitted)


def verdict_on(family: Family, module: Any, is_shared: bool) -> Verdict:
    """From the cache, or by trying now."""
    key = code_key(family, module, is_shared)
    if setting(PROBE) == "always":
        return _tried_elsewhere(family, key, is_shared)
    try:
        folder = cache_folder()
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder / f"{key}.lock"):
            return _cached(folder / f"{key}.json") or _kept(
                folder / f"{key}.json", _tried_elsewhere(family, key, is_shared)
            )
    except (OSError, RuntimeError) as error:  # RuntimeError: a user without a home
        if isinstance(error, TimedOut):
            raise
        logger.debug("verdicts are not kept: %s", error)
        return _tried_elsewhere(family, key, is_shared)


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "paddle_vl_sp" / "verdicts"


def code_key(family: Family, module: Any, is_shared: bool) -> str:
    """Of all that a verdict depends on: the module's code, in its file and in memory, the packages, our own code."""
    methods = family.methods(is_shared=True, is_cut=True)
    parts = [family.name, str(is_shared), code_of(inspect.getsource(module)), sys.version]
    parts += [fingerprint(original_of(module, method.name)) for method in methods]
    parts += [code for swapped in family.swapped if swapped.sources is not None for code in _codes_under(swapped)]
    parts += [_version_of(name) for name in ("paddleformers", "paddlefleet", "paddlepaddle", "paddlepaddle-gpu")]
    formers = Path(importlib.import_module("paddleformers").__file__ or "").parent
    folders = (HERE.parent, formers / "nn")  # what the clauses run
    parts += [path.read_text(encoding="utf-8") for folder in folders for path in sorted(folder.rglob("*.py"))]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def _codes_under(swapped: Swapped) -> Iterator[str]:
    """Of a class that ours is made of, the code in memory and that of the modules of its bases."""
    cls = swapped.found()
    bases = [] if cls is None else [base for base in cls.__mro__ if base.__module__.partition(".")[0] == "paddlefleet"]
    for base in bases:
        yield class_fingerprint(base)
        yield code_of(inspect.getsource(sys.modules[base.__module__]))


def try_clauses(family: Family, module: Any, is_shared: bool) -> Iterator[tuple[str, str]]:
    """Each clause and how it is broken, "" where it holds; an error on the way breaks it."""
    for clause in family.contract:
        if is_shared or not clause.is_shared:
            try:
                yield clause.says, clause.broken(family, module)
            except Exception as error:  # code that is not known may do anything
                yield clause.says, one_line(error)


def _tried_elsewhere(family: Family, key: str, is_shared: bool) -> Verdict:
    logger.info("%s is not the code that is known: trying it, once", family.name)
    command = [sys.executable, "-m", __spec__.name, family.name, str(int(is_shared))]
    env = {name: value for name, value in os.environ.items() if not name.startswith(OF_A_RUN)}
    env |= {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    try:
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    except subprocess.TimeoutExpired as error:
        raise TimedOut(
            f"{family.name} of PaddleFormers is not the code that is known, and trying it took more than {TIMEOUT} "
            f"seconds: run `python -m paddle_vl_sp doctor` once before the training, or set {PROBE}=never"
        ) from error
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        return Verdict(key, 0, (f"it cannot be tried in a process of its own: {last}",))
    found = Verdict(**json.loads(lines[-1]))
    if found.key != key:
        return Verdict(key, 0, ("it cannot be tried: a process of its own finds other code",))
    return Verdict(key, found.tried, tuple(found.broken))


def _cached(path: Path) -> Verdict | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["key"] != path.stem or not found["tried"] > 0 or not isinstance(found["broken"], list):
            return None
        return Verdict(found["key"], found["tried"], tuple(map(str, found["broken"])))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _kept(path: Path, verdict: Verdict) -> Verdict:
    """Only what was tried: what could not be, or failed for want of memory or disk, is tried again."""
    if verdict.tried and not any(passing in why for passing in PASSING for why in verdict.broken):
        partial = path.with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps(asdict(verdict)), encoding="utf-8")
        partial.replace(path)
    return verdict


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _version_of(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"


def main(name: str, is_shared: str) -> None:
    """In the process of its own: prints the verdict as its last line."""
    import paddle

    from paddle_vl_sp.formers.families import FAMILIES

    paddle.set_device("cpu")
    family = next(family for families in FAMILIES.values() for family in families if family.name == name)
    module = importlib.import_module(family.module)
    tried = list(try_clauses(family, module, is_shared == "1"))
    broken = tuple(f"{says}: {why}" for says, why in tried if why)
    print(json.dumps(asdict(Verdict(code_key(family, module, is_shared == "1"), len(tried), broken))))


if __name__ == "__main__":
    main(*sys.argv[1:])
