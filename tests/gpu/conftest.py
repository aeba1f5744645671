import pytest
import torch

from prefixmem_fast._triton import interpreting


@pytest.fixture(autouse=True)
def needs_a_gpu():
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU: run `make gpu` on a machine that has one")
    if interpreting():
        pytest.skip("needs the compiler, and TRITON_INTERPRET=1 is set: run `make gpu`")
