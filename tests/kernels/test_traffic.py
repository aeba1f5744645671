"""Bytes and launches of the kernels against their floors; the same figures on every machine."""

import pytest
import torch

from prefixmem_fast import (
    AddressSpec,
    DecodingState,
    PrefixMem,
    PrefixMemConfig,
    SIDVocabulary,
    optim,
    prefix_memory,
    reference,
    token_memory,
)
from prefixmem_fast.kernels import forward, nested, row_gradient
from tests.kernels.traffic import counted

SPEC = AddressSpec((2048,) * 5, table_rows=3000, active_levels=(3, 4))
M, N, H, W, A, L = 128, 4, 4, 64, 2, 5


def weight_of(spec, dtype=torch.bfloat16):
    return torch.randn(spec.total_rows, W).to(dtype)


def test_forward_reads_each_row_once_a_sid():
    codes, weight = torch.randint(0, 2048, (M, L)), weight_of(SPEC)
    with counted(codes=codes, weight=weight) as traffic:
        prefix_memory(codes, weight, SPEC, backend="triton")
    assert traffic.launches == 1
    assert traffic.loaded["weight"] == M * N * H * W * 2
    assert traffic.total == M * 3104, "four codes of five, 16 rows of 128 bytes, two vectors of 512"
    floor = M * L * 8 + M * N * H * W * 2 + M * A * H * W * 2
    assert traffic.total <= 1.05 * floor


def test_forward_skips_rows_of_ended_prefixes():
    codes, weight = torch.randint(0, 2048, (M, L)), weight_of(SPEC)
    codes[:, 2] = -1
    with counted(codes=codes, weight=weight) as traffic:
        prefix_memory(codes, weight, SPEC, backend="triton")
    assert traffic.loaded["weight"] == M * 2 * H * W * 2


@pytest.mark.parametrize("text", [0, 3], ids=["SIDs only", "3 text tokens a SID"])
def test_token_stream(text):
    """Rows once a SID, every output element once, one launch, and little else."""
    sids, period = 24, L + text
    weight = weight_of(SPEC)
    table = torch.zeros(1 + L * 2048, 2, dtype=torch.int32)
    table[1:, 0] = torch.arange(L).repeat_interleave(2048) + 1
    table[1:, 1] = torch.arange(2048).repeat(L)
    codes = torch.randint(0, 2048, (2, sids, L))
    ids = torch.zeros(2, sids, period, dtype=torch.int64)
    ids[..., :L] = 1 + codes + 2048 * torch.arange(L)
    ids = ids.reshape(2, sids * period)
    with counted(weight=weight) as traffic:
        out = token_memory(ids, table, weight, SPEC, backend="triton")
    assert traffic.launches == 1
    assert traffic.loaded["weight"] == 2 * sids * N * H * W * 2
    assert sum(traffic.stored.values()) == out.numel() * 2
    floor = ids.numel() * 8 + 2 * sids * N * H * W * 2 + out.numel() * 2
    assert traffic.total <= 1.06 * floor


def test_a_decoding_step_reads_the_rows_of_one_order():
    """One launch: H rows, the sum of the level before in and out, S out."""
    encoder = PrefixMem(PrefixMemConfig(SPEC, H * W, 8), backend="triton", dtype=torch.bfloat16)
    tokens = {l * 2048 + c: (l + 1, c) for l in range(L) for c in range(2048)}
    vocabulary = SIDVocabulary.from_table(tokens, (2048,) * L)
    state = DecodingState(encoder, vocabulary, M)
    for l in range(3):
        tokens = l * 2048 + torch.randint(0, 2048, (M,))
        with counted(weight=encoder.memory.weight) as traffic:
            state.step(tokens)
        assert traffic.launches == 1
        assert traffic.loaded["weight"] == M * H * W * 2
        floor = M * (8 + 8 + H * W * 2 + (1 + (l > 0)) * H * W * 4 + H * W * 2)
        assert traffic.total <= 1.1 * floor


def test_backward_reads_the_gradient_once_and_adds_each_row_once():
    codes, weight = torch.randint(0, 2048, (M, L)), weight_of(SPEC).requires_grad_()
    out = prefix_memory(codes, weight, SPEC, backend="triton")
    grad = torch.randn(out.shape).to(out)
    with counted(grad=grad) as traffic:
        out.backward(grad)
    assert traffic.launches == 1
    assert traffic.loaded["grad"] == M * A * H * W * 2
    assert sum(traffic.added.values()) == M * N * H * W * 4
    assert traffic.total == M * 5152, "four codes of five, two gradients of 512 bytes, 16 float32 rows of 256"
    floor = M * L * 8 + M * A * H * W * 2 + M * N * H * W * 4
    assert traffic.total <= floor


def test_a_kernel_that_reads_rows_once_a_level_is_caught(monkeypatch):
    """The count fails where it should: without the running sum, levels 3 and 4 read 3 + 4 orders and not 4."""
    codes, weight = torch.randint(0, 2048, (M, L)), weight_of(SPEC)
    address = forward.address_of(SPEC)
    monkeypatch.setattr(forward, "address_of", lambda spec: address._replace(mode="suffix"))
    with counted(weight=weight) as traffic:
        prefix_memory(codes, weight, SPEC, backend="triton")
    assert traffic.loaded["weight"] == M * (3 + 4) * H * W * 2


@pytest.mark.parametrize("how", ["update", "dense"])
def test_sorting_backward_and_update(how, monkeypatch):
    """All kernels together, without torch's sorts: gradients once, each touched row read and written once."""
    monkeypatch.setattr(nested, "block_of", lambda sids: 32)
    spec = AddressSpec((2048,) * 5, table_rows=200_000, active_levels=(3, 4), addressing="hash")
    sids = 256
    codes = torch.randint(0, 2048, (sids, L))
    grad = torch.randn(sids, A, H * W).bfloat16()
    touched = len(reference.row_gradient(grad[..., :H], codes, spec)[0])
    weight = torch.nn.Parameter(torch.empty(spec.total_rows, W, dtype=torch.bfloat16))
    update = optim.SGD([weight]).begin(weight)
    with counted(grad=grad, weight=weight) as traffic:
        if how == "update":
            row_gradient.update(grad, (codes,), spec, update)
        else:
            row_gradient.dense(grad, (codes,), spec)
    assert traffic.loaded["grad"] == grad.numel() * 2
    floor = codes.numel() * 8 + grad.numel() * 2 + touched * W * 2
    if how == "update":
        assert traffic.loaded["weight"] == traffic.stored["weight"] == touched * W * 2
        floor += touched * W * 2
    assert traffic.total <= 1.3 * floor
    assert not traffic.added, "no atomics"
