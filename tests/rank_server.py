"""Ranks of run_ranks as forks of a process that has imported Paddle: a start costs a tenth of a second, not seconds.

A fork has nothing of this package loaded and draws its own random numbers. Neighbouring ranks are forks of different
servers, since all forks of one order their sets alike. Where variables differ that libraries may read when they are
imported, and under coverage, a rank is a new process, as it always is for users; tests/multi_rank/test_run_ranks.py has
only those.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import random
import select
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import gloo_threads

NUM_SERVERS = 2
# what takes longest of its imports
OF_PADDLEFORMERS = ("scipy.special", "transformers", "pandas", "datasets", "omegaconf", "requests", "tokenizers")
# Of ranks, of this package, and what PaddleFormers' trainer leaves behind: no library reads them when it is imported.
NOT_OF_IMPORTS = ("PADDLE_", "TRAINER_", "PYTHONPATH", "PYTEST_CURRENT_TEST")


servers = {}


def install(launch, patch):
    """Of `launch`, whose _start calls Popen, as long as the patch lasts."""
    patch.setattr(launch, "subprocess", SimpleNamespace(Popen=popen, STDOUT=subprocess.STDOUT))


def popen(command, env, stdout, stderr, start_new_session):
    """A fork, or a process where it cannot be one. The last arguments are the rank and who launched it."""
    number = int(command[-2]) % NUM_SERVERS
    if number not in servers:
        servers[number] = Server(env)
        atexit.register(servers[number].close)
    if "COVERAGE_RUN" in os.environ or common(env) != servers[number].environment:
        return subprocess.Popen(command, env=env, stdout=stdout, stderr=stderr, start_new_session=start_new_session)
    return Rank(servers[number], command[2:], env, stdout)


def common(env):
    return {name: value for name, value in env.items() if not name.startswith(NOT_OF_IMPORTS)}


class Server:
    def __init__(self, env):
        self.environment, self.codes, self.unread = common(env), {}, b""
        command = [sys.executable, __file__]
        self.process = subprocess.Popen(command, env=self.environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def start(self, request):
        self.process.stdin.write(json.dumps(request).encode() + b"\n")
        self.process.stdin.flush()
        while self.codes.get("started") is None:
            self.read(None)
        return self.codes.pop("started")

    def read(self, patience=0):
        """What the server has said: which rank it has started, or with which code one has ended."""
        out = self.process.stdout.fileno()
        if not select.select([out], [], [], patience)[0]:
            return
        said = os.read(out, 65536)
        if not said:
            raise RuntimeError("the server of ranks has ended")
        *lines, self.unread = (self.unread + said).split(b"\n")
        for line in lines:
            key, value = json.loads(line)
            self.codes[key] = value

    def close(self):
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


class Rank:
    """As much of Popen as run_ranks needs."""

    def __init__(self, server, command, env, output):
        self.server, self.returncode = server, None
        self.pid = server.start({"command": command, "env": env, "cwd": os.getcwd(), "output": output.name})

    def poll(self):
        if self.returncode is None:
            self.server.read()
            self.returncode = self.server.codes.pop(self.pid, None)
        return self.returncode

    def wait(self):
        while self.poll() is None:
            time.sleep(0.005)
        return self.returncode

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)


# The server


def serve():
    import paddle
    import paddle.distributed.fleet

    for name in OF_PADDLEFORMERS:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    assert not [name for name in sys.modules if name.startswith(("paddle_vl_sp", "paddleformers", "paddlefleet"))]
    paddle.set_device("cpu")
    gc.freeze()  # else each collection of a fork copies the pages of what is loaded here
    before, children = list(sys.path), set()
    while True:
        ready = select.select([sys.stdin], [], [], 0.01 if children else None)[0]
        line = sys.stdin.readline() if ready else "wait"
        if not line:
            for child in children:
                os.kill(child, signal.SIGKILL)
            return
        if ready:
            child = os.fork()
            if child == 0:
                become(json.loads(line), before)
            children.add(child)
            say("started", child)
        for child in list(children):
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                children.remove(child)
                say(child, os.waitstatus_to_exitcode(status))


def say(key, value):
    print(json.dumps([key, value]), flush=True)


def become(request, path):
    """The process that `python -c` would have been."""
    import numpy
    import paddle

    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    output = os.open(request["output"], os.O_WRONLY | os.O_APPEND)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for old, new in ((nothing, 0), (output, 1), (output, 2)):
        os.dup2(old, new)
    sys.path[:] = ["", *request["env"]["PYTHONPATH"].split(os.pathsep), *path[1:]]
    os.setsid()
    code, *arguments, _ = request["command"]
    sys.argv[:] = ["-c", *arguments, str(os.getppid())]  # it ends with the server, which ends with who launched it
    random.seed()
    numpy.random.seed()
    paddle.seed(random.getrandbits(32))
    gc.set_threshold(20_000)  # a model makes many objects and few cycles
    gloo_threads.give_way(int(arguments[1]))
    try:
        exec(code, {"__name__": "__main__"})
    except BaseException:
        sys.excepthook(*sys.exc_info())
        os._exit(1)
    os._exit(0)


if __name__ == "__main__":
    serve()
