"""Which GPUs the operators run on, with a double of Paddle's device query; no kernel runs here."""

from types import SimpleNamespace

import paddle
import pytest

from paddle_vl_sp.backends import dispatch, load, operators, plain
from paddle_vl_sp.backends.record import architectures, runs_on
from paddle_vl_sp.settings import BACKEND

DEFAULT = {"cuda": "80,90", "ptx": "90"}


@pytest.mark.parametrize(
    ("cuda", "ptx", "fit", "lacking"),
    [
        ("80,90", "90", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 1)], [(7, 0), (7, 5)]),
        ("80,90", "", [(8, 0), (8, 9), (9, 0)], [(7, 5), (10, 0), (12, 0)]),
        ("86", "86", [(8, 6), (8, 7), (9, 0)], [(8, 0)]),
        ("90a", "90a", [(9, 0)], [(8, 0), (10, 0), (12, 0)]),
        ("120a", "120a", [(12, 0)], [(12, 1), (13, 0)]),
        ("100f", "100f", [(10, 0), (10, 3)], [(9, 0), (11, 0), (12, 0)]),
        ("75,120", "75,120", [(7, 5), (8, 0), (9, 0), (12, 0), (12, 1)], [(7, 0)]),
        ("0", "", [], [(8, 0), (9, 0)]),
    ],
)
def test_what_a_library_runs_on(cuda, ptx, fit, lacking):
    """Exact, by NVIDIA's rules: machine code within its major version, PTX on all that is later."""
    info = {"cuda": cuda, "ptx": ptx}
    assert [runs_on(info, capability) for capability in (*fit, *lacking)] == [True] * len(fit) + [False] * len(lacking)


def test_a_record_of_before_ptx_was_recorded():
    """A library of 0.1.0 holds none."""
    assert (runs_on({"cuda": "80,90"}, (9, 0)), runs_on({"cuda": "80,90"}, (10, 0))) == (True, False)
    assert architectures({"cuda": "80,90"}) == "machine code for sm_80, sm_90 and no PTX"


class OnGpu:
    """As much of a tensor on a GPU as the choice of an implementation needs."""

    def __init__(self, number):
        self.place = SimpleNamespace(
            is_gpu_place=lambda: True, is_cpu_place=lambda: False, gpu_device_id=lambda: number
        )


@pytest.fixture
def machine(monkeypatch, caplog):
    """Sets what the library holds and the GPUs of the machine; returns the queries that were made."""
    queries = []

    def set_up(info, *capabilities):
        def capability(gpu):
            queries.append(gpu)
            return capabilities[gpu]

        devices = ("cpu",) if info["cuda"] == "0" else ("cpu", "gpu")
        monkeypatch.setattr(load, "backend", lambda: load.Backend("op", devices, "a double"))
        monkeypatch.setattr(load, "build_info", lambda library: info)
        monkeypatch.setattr(paddle.device.cuda, "get_device_capability", capability)
        return queries

    monkeypatch.delenv(BACKEND, raising=False)
    monkeypatch.setattr("paddle_vl_sp.log._warned", set())
    load.has_kernels_for.cache_clear()
    with caplog.at_level("WARNING", logger="paddle_vl_sp"):
        yield set_up
    load.has_kernels_for.cache_clear()


def test_a_gpu_with_kernels_gets_the_operators_and_is_asked_once(machine, caplog):
    """By the module that is chosen, the number of queries, and no warning."""
    queries = machine(DEFAULT, (9, 0), (12, 0))
    chosen = [dispatch._implementation(OnGpu(number)) for number in (0, 1, 0, 1)]
    assert (chosen, queries, caplog.messages) == ([operators] * 4, [0, 1], [])


@pytest.mark.parametrize(("info", "capability"), [(DEFAULT, (7, 5)), ({"cuda": "80,90", "ptx": ""}, (12, 0))])
def test_a_gpu_that_is_too_old_or_too_new_gets_plain_paddle(machine, caplog, info, capability):
    """One warning with both architectures and the fix; another GPU of the machine keeps the operators."""
    queries = machine(info, (9, 0), capability)
    chosen = [dispatch._implementation(OnGpu(number)) for number in (1, 0, 1, 1)]
    assert (chosen, queries) == ([plain, operators, plain, plain], [1, 0])
    (message,) = caplog.messages
    assert "the operators have nothing to run on gpu:1, plain Paddle is used there: they hold machine code" in message
    assert f"build with PADDLE_CUDA_ARCH_LIST={capability[0]}.{capability[1]}; " in message
    assert "pip install" in message or "start from another folder" in message


def test_operators_without_cuda_say_why_on_a_gpu(machine, caplog):
    """One warning, with the reason that the build has left; the device is not asked."""
    queries = machine({"cuda": "0", "why": "nvcc_failed_on_rows.cu"}, (9, 0))
    assert [dispatch._implementation(OnGpu(0)) for _ in range(3)] == [plain] * 3
    (message,) = caplog.messages
    assert "they were built without CUDA, since nvcc failed on rows.cu" in message
    assert queries == []


def test_operators_that_are_required_are_an_error(machine, monkeypatch):
    """Each time, in place of the warning."""
    machine(DEFAULT, (7, 5))
    monkeypatch.setenv(BACKEND, "op")
    for _ in range(2):
        with pytest.raises(load.OperatorsUnavailable, match=r"=op requires the operators on gpu:0: they hold .*=7\.5"):
            dispatch._implementation(OnGpu(0))


def test_while_a_graph_is_traced_the_current_device_counts(machine, monkeypatch):
    """By the number of the device that is current."""
    queries = machine(DEFAULT, (9, 0), (7, 5))
    monkeypatch.setattr(dispatch, "is_tracing", lambda: True)
    for number, expected in ((0, operators), (1, plain)):
        monkeypatch.setattr(paddle, "get_device", lambda number=number: f"gpu:{number}")
        assert dispatch._implementation(None) is expected
    assert queries == [0, 1]


def test_programs_are_saved_in_plain_paddle_on_a_gpu_without_kernels(machine, monkeypatch):
    """The default of the layers that are saved; what is asked for by name stays."""
    from paddle_vl_sp.export import DeepstackAdd

    machine(DEFAULT, (9, 0), (7, 5))
    for number, expected in ((0, "op"), (1, "python")):
        monkeypatch.setattr(paddle, "get_device", lambda number=number: f"gpu:{number}")
        assert DeepstackAdd().backend == expected
        assert DeepstackAdd(backend="op").backend == "op"
