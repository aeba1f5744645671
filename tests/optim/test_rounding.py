"""Stochastic rounding: unbiased, reproducible, and the same function in the kernels."""

import torch

from prefixmem_fast import optim
from prefixmem_fast.checks import oracle
from prefixmem_fast.operation.rounding import mix, random_bits, stochastic_round


def test_mix_is_the_published_function():
    """In unsigned Python integers."""

    def expected(x):
        for shift, factor in ((16, 0x21F0AAAD), (15, 0xD35A2D97)):
            x = ((x ^ x >> shift) * factor) & 0xFFFFFFFF
        return x ^ x >> 15

    values = [0, 1, 12345, 2**31 - 1, 2**31, 2**32 - 1]
    found = mix(torch.tensor(values, dtype=torch.int64).to(torch.int32))
    assert [v & 0xFFFFFFFF for v in found.tolist()] == [expected(v) for v in values]


def test_bits_depend_on_seed_step_row_and_column_alone():
    rows = torch.tensor([5, 0, 2**33 + 5, 2**31])
    step = torch.tensor(7)
    bits = random_bits(11, step, rows, 9)
    assert bits.shape == (4, 9)
    assert torch.equal(random_bits(11, step, rows.flip(0), 9).flip(0), bits)
    assert torch.equal(random_bits(11, step, rows, 4), bits[:, :4])
    for other in (
        random_bits(12, step, rows, 9),
        random_bits(11, step + 1, rows, 9),
        random_bits(11 + 2**32, step, rows, 9),
    ):
        assert (other != bits).any(1).all()
    assert len(set(map(tuple, bits.tolist()))) == 4


def test_bits_are_uniform():
    bits = random_bits(0, torch.tensor(1), torch.arange(20_000), 64)
    assert bits.min() == 0
    assert bits.max() == 2**16 - 1
    for shift in range(0, 16, 4):  # chi-squared of each hexadecimal digit: 15 degrees of freedom, 5 deviations
        count = torch.bincount((bits >> shift & 15).flatten(), minlength=16).double()
        expected = bits.numel() / 16
        assert ((count - expected) ** 2 / expected).sum() < 15 + 5 * 30**0.5
    centred = bits.double() - 32767.5  # neighbours in a row, rows, and the halves of a word do not go together
    for a, b in ((centred[:, :-1], centred[:, 1:]), (centred[:-1], centred[1:]), (centred[:, ::2], centred[:, 1::2])):
        assert abs((a * b).mean() / centred.var()) < 5 / a.numel() ** 0.5


def test_rounding_is_unbiased():
    """The mean of n roundings is within five standard errors of x, at most ulp / 2 / sqrt(n) each."""
    x = torch.tensor([1.0 + 2**-9, -3.3, 1e-3, 255.9, -1e-30, 0.0, 1.0])
    n = 100_000
    rounded = stochastic_round(x.expand(n, -1), random_bits(0, torch.tensor(1), torch.arange(n), len(x)))
    ulp = 2.0 ** (x.abs().double().clamp(min=1e-38).log2().floor() - 7)
    error = (rounded.double().mean(0) - x.double()).abs()
    assert (error <= 5 * ulp / 2 / n**0.5).all()
    near = x.bfloat16()
    assert ((rounded == near) | ((rounded.double() - x).abs() < ulp)).all(), "one of the two neighbours"
    exact = x == near.float()
    assert (rounded[:, exact] == near[exact]).all()


def test_what_is_not_finite_stays_so():
    x = torch.tensor([[float("inf"), -float("inf"), float("nan")]])
    rounded = stochastic_round(x, torch.full((1, 3), 2**16 - 1, dtype=torch.int32))
    assert rounded[0, 0] == float("inf")
    assert rounded[0, 1] == -float("inf")
    assert rounded[0, 2].isnan()


def test_small_updates_are_not_lost():
    """A thousand steps of 1/1000 of what bfloat16 tells from 1: their sum arrives in the mean; to nearest, nothing."""
    means = []
    for stochastic in (True, False):
        weight = torch.nn.Parameter(torch.ones(1, 512, dtype=torch.bfloat16))
        optimizer = optim.SGD([weight], lr=1.0, stochastic_rounding=stochastic)
        for _ in range(1000):
            optimizer.begin(weight).apply(torch.tensor([0]), torch.full((1, 512), -(2**-7) / 1000))
        means.append(weight.detach().double().mean().item())
    assert abs(means[0] - (1 + 2**-7)) < 5 * 2**-7 / 2 / 512**0.5 * 2
    assert means[1] == 1.0


def test_the_oracle_draws_the_same_bits():
    rows = [0, 1, 77, 2**31 + 5, 2**33 + 1]
    for seed, step, width in ((0, 1, 1), (5, 2, 7), (2**62 + 3, 2**31, 64)):
        expected = [oracle.random_bits(seed, step, row, width) for row in rows]
        assert random_bits(seed, torch.tensor(step), torch.tensor(rows), width).tolist() == expected
