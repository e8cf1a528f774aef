from contextlib import contextmanager

import paddle


class CudaRNGStatesTracker:
    """Named generators; on the CPU here."""

    def __init__(self):
        self.states_ = {}

    def get_states(self):
        return dict(self.states_)

    def set_states(self, states):
        self.states_ = states

    def add(self, name, seed):
        with self._kept():
            paddle.seed(seed)
            self.states_[name] = paddle.get_rng_state()

    @contextmanager
    def fork(self, name="model-parallel-rng"):
        with self._kept():
            paddle.set_rng_state(self.states_[name])
            try:
                yield
            finally:
                self.states_[name] = paddle.get_rng_state()

    @contextmanager
    def _kept(self):
        before = paddle.get_rng_state()
        try:
            yield
        finally:
            paddle.set_rng_state(before)


_tracker = CudaRNGStatesTracker()


def get_cuda_rng_tracker():
    return _tracker
