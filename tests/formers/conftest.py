"""Every test ends with PaddleFormers as it was."""

import paddle
import pytest

from paddle_vl_sp.formers import revert


@pytest.fixture(autouse=True)
def upstream_again(monkeypatch):
    paddle.set_device("cpu")
    monkeypatch.delenv("PADDLE_VL_SP", raising=False)
    monkeypatch.delenv("PADDLE_VL_SP_CHECK", raising=False)
    revert()
    yield
    revert()
