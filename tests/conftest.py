"""Test modules share oracle.py and strategies.py; the report says which implementation is in use."""

import gc
import importlib.util
import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
os.environ.setdefault("GLOG_minloglevel", "2")
# For the processes that are started from here, the workers too: threads of several would wait for each other's cores,
# and freed memory is kept, which saves a third of the time that small tensors take.
for name, value in (("OMP_NUM_THREADS", 1), ("MALLOC_MMAP_THRESHOLD_", 1 << 30), ("MALLOC_TRIM_THRESHOLD_", 1 << 32)):
    os.environ.setdefault(name, str(value))


def pytest_report_header():
    from paddle_vl_sp import backend

    fleet = importlib.util.find_spec("paddlefleet")
    return [
        f"paddle_vl_sp: {backend()}",
        f"paddlefleet: {fleet.origin if fleet else 'not installed, the test double in tests/fleet/double is used'}",
    ]


# Folders whose files take longest: one of these at the end would leave the other worker without work.
LONGEST = ("multi_rank", "fleet_whole", "docs", "gpu", "native", "cli")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONGEST.index(item.path.parent.name) if item.path.parent.name in LONGEST else 99)


def pytest_collection_finish():
    gc.freeze()  # what is imported is not looked through again at each collection


@pytest.fixture(scope="module", autouse=True)
def ranks_are_forks(request):
    """run_ranks starts its processes within a tenth of a second: rank_server.py says how, and where not."""
    import rank_server
    from paddle_vl_sp.testing import launch

    if request.module.__name__ == "test_run_ranks":
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        rank_server.install(launch, patch)
        yield


@pytest.fixture(params=["op", "python", "python on a device"])
def implementation(request, monkeypatch):
    """Runs the test with the custom operators, then with plain Paddle: as on a CPU, and as on a device.

    On a device the host must not read tensors, so other code runs there. Says so where there are no operators.
    """
    from paddle_vl_sp.backends import dispatch, load, plain

    if request.param == "op" and load.backend().name != "op":
        pytest.skip("no custom operators: the header of this report says why")
    if request.param != "op":
        monkeypatch.setattr(dispatch, "_implementation", lambda _: plain)
    if request.param == "python on a device":
        monkeypatch.setattr(plain, "is_on_host", lambda x: False)
    return request.param
