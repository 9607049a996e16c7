"""The precision of forward passes, and what it is called."""

import pytest
import torch

from lightning_modules.retrieval import compute
from lightning_modules.retrieval.compute import active_precision, computing_in, matrix_products_in, resolve_precision

CPU = torch.device("cpu")


@pytest.fixture
def gpu(monkeypatch):
    """Return a function that fakes a GPU of a compute capability."""

    def pretend(capability, bf16):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: bf16)

    return pretend


def test_tf32_needs_ampere_and_is_fp32_elsewhere(gpu):
    gpu((7, 5), bf16=False)
    assert [resolve_precision(name, "cuda") for name in ("auto", "tf32", "fp16")] == ["fp32", "fp32", "fp16"]
    gpu((8, 0), bf16=True)
    assert [resolve_precision(name, "cuda") for name in ("auto", "tf32", "fp16")] == ["bf16", "tf32", "fp16"]
    assert resolve_precision("tf32", "cpu") == "fp32"


@pytest.mark.parametrize(
    ("name", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_matrix_products_have_the_type_of_the_precision_whatever_surrounds_them(name, dtype):
    layer = torch.nn.Linear(3, 2)
    for surrounding in ("fp32", "bf16", "fp16"):
        with computing_in(surrounding, CPU), torch.no_grad():
            with computing_in(name, CPU):
                assert layer(torch.ones(1, 3)).dtype == dtype
                assert active_precision(CPU) == name
            assert active_precision(CPU) == surrounding


def test_tf32_is_set_only_inside(monkeypatch):
    monkeypatch.setattr(compute, "resolve_precision", lambda precision, device: precision)
    assert torch.get_float32_matmul_precision() == "highest"
    with computing_in("tf32", CPU):
        assert (torch.get_float32_matmul_precision(), active_precision(CPU)) == ("high", "tf32")
        with computing_in("fp32", CPU):
            assert (torch.get_float32_matmul_precision(), active_precision(CPU)) == ("highest", "fp32")
        assert torch.get_float32_matmul_precision() == "high"
    with pytest.raises(KeyError), matrix_products_in("tf32"):
        raise KeyError
    assert torch.get_float32_matmul_precision() == "highest"
