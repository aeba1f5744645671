"""What each benchmark sets up: workloads, floors, and checks that catch a wrong provider."""

import pytest
import torch

from bench import real_data
from bench.benchmarks import constrained, decoding, language_model, pretraining, providers, tables, workloads
from bench.benchmarks.workloads import Workload
from bench.registry import BENCHMARKS
from prefixmem_fast.operation import reference
from tests.bench.cases import run_case

SMALL = Workload(sids=300, table_rows=500)


class ForwardOff(providers.FusedAdagrad):
    def forward(self, codes):
        return super().forward(codes) * 1.001


class RateOff(providers.FusedAdagrad):
    @staticmethod
    def make(params, lr):
        return providers.optim.RowWiseAdagrad(params, lr=1.1 * lr)


class SkipsATable(providers.FusedAdagrad):
    """Order 4, head 0, gets no update."""

    def update(self):
        start = self.spec.offsets[3][0]
        with torch.no_grad():
            self.weight[start : start + self.spec.rows_per_order[3]] = self.kept
        super().update()

    def forward(self, codes):
        start = self.spec.offsets[3][0]
        self.kept = self.weight.detach()[start : start + self.spec.rows_per_order[3]].clone()
        return super().forward(codes)


class TouchesAnotherRow(providers.FusedTable):
    def update(self):
        super().update()
        with torch.no_grad():
            self.weight.add_(1e-3)


class DropsAHead(providers.DenseTable):
    def backward(self, out, grad):
        grad = grad.clone()
        grad[:, :, :64] = 0
        super().backward(out, grad)


def names_and_skips(case):
    return {row["provider"]: row.get("skipped", "") for row in run_case(case)}


@pytest.mark.parametrize(
    ("wrong", "dtype"),
    [
        (ForwardOff, "float32"),  # a thousandth is less than the rounding of bfloat16
        *((wrong, dtype) for wrong in (RateOff, SkipsATable, TouchesAnotherRow) for dtype in ("float32", "bfloat16")),
    ],
)
@pytest.mark.parametrize("codes", ["uniform", "hot"])
def test_a_wrong_training_step_is_caught(wrong, codes, dtype):
    wrong.gradient = wrong.__name__
    case = tables._training(Workload(300, codes, 500, dtype), "cpu", (providers.FusedAdagrad, wrong))
    skipped = names_and_skips(case)
    assert skipped[wrong.trains()].startswith("WRONG")
    assert not skipped[providers.FusedAdagrad.trains()]


@pytest.mark.parametrize(
    "provider",
    [provider for provider in providers.TRAINERS if provider is not providers.CompiledTable],  # compiles for seconds
    ids=lambda p: p.__name__,
)
@pytest.mark.parametrize(
    ("codes", "dtype"),
    [pytest.param("hot", "float32", marks=pytest.mark.slow), ("zipf 1.2", "float32"), ("zipf 1.2", "bfloat16")],
)
def test_right_training_steps_pass(provider, codes, dtype):
    case = tables._training(Workload(300, codes, 500, dtype), "cpu", (provider,))
    (reason,) = names_and_skips(case).values()
    assert not reason.startswith(("WRONG", "FAILED"))


def test_a_wrong_gradient_is_caught(monkeypatch):
    DropsAHead.gradient = "a head dropped"
    monkeypatch.setattr(tables, "GRADIENTS", (providers.DenseAdamW, DropsAHead, providers.AddedTable))
    skipped = names_and_skips(tables.gradient("cpu", sids=300, codes="uniform", table_rows=500, dtype="float32"))
    assert [name for name, reason in skipped.items() if reason] == [f"{DropsAHead.reads}, a head dropped"]
    assert skipped[f"{DropsAHead.reads}, a head dropped"].startswith("WRONG")


def test_a_wrong_token_stream_is_caught(monkeypatch):
    read = tables.EagerTokens.__call__
    monkeypatch.setattr(tables.EagerTokens, "__call__", lambda self, ids: read(self, ids).roll(1, 1))
    skipped = names_and_skips(tables.tokens("cpu", **BENCHMARKS["tokens"].quick))
    assert {name: reason[:5] for name, reason in skipped.items()} == {
        "prefixmem_fast": "",
        providers.EagerTables.reads: "WRONG",
        providers.FusedTable.reads: "WRONG",
    }


@pytest.mark.parametrize("fault", ["forward", "update"])
def test_a_wrong_pretraining_step_is_caught(fault, monkeypatch):
    if fault == "forward":
        forward = providers.EagerTables.forward
        monkeypatch.setattr(providers.EagerTables, "forward", lambda self, codes: forward(self, codes.flip(0)))
    else:
        monkeypatch.setattr(providers.EagerTables, "update", lambda self: None)
    skipped = names_and_skips(pretraining.pretraining("cpu", **BENCHMARKS["pretraining"].quick))
    assert [name for name, reason in skipped.items() if reason] == [providers.EagerTables.trains()]


def test_an_encoder_that_a_language_model_does_not_see_is_caught(monkeypatch):
    monkeypatch.setattr(language_model, "attach", lambda model, encoder, vocabulary: model)
    skipped = names_and_skips(language_model.language_model("cpu", **BENCHMARKS["language-model"].quick))
    assert not skipped["without the encoder"]
    assert all(skipped[name].startswith("WRONG") for name in skipped if name.startswith("prefixmem_fast"))


def test_a_wrong_decoding_step_is_caught(monkeypatch):
    step = decoding.Recomputed.step
    monkeypatch.setattr(decoding.Recomputed, "step", lambda self, level, codes: step(self, level, codes) * 1.01)
    skipped = names_and_skips(decoding.decoding("cpu", **BENCHMARKS["decoding"].quick))
    assert not skipped["prefixmem_fast, DecodingState"]
    assert skipped["eager PyTorch, the prefix read anew"].startswith("WRONG")


def test_a_wrong_allowed_set_is_caught(monkeypatch):
    monkeypatch.setattr(constrained, "nested_dicts", lambda tokens: lambda batch, sentence: [constrained.EOS])
    skipped = names_and_skips(constrained.constrained("cpu", 2048, 50, 2, 2))
    assert [name for name, reason in skipped.items() if reason] == ["prefix_allowed_tokens_fn, nested dicts"]


def test_sampled_rows_are_the_reference():
    workload = Workload(300, "hot", 500)
    codes, grad = workload.batches("cpu")[1], workload.gradient("cpu")
    sample = tables.sampled_rows(workload, codes, grad)
    expected = torch.zeros(workload.spec.total_rows, 64, dtype=torch.float64)
    touched, values, _ = reference.row_sums(grad.double(), codes, workload.spec, torch.float64)
    expected[touched] = values
    torch.testing.assert_close(sample.sums, expected[sample.rows])
    assert (sample.terms == 0).any(), "untouched rows are among them"
    assert sample.terms.max() > 100, "and hot ones"
    assert set(sample.table.tolist()) == set(range(16))


def test_providers_agree_on_the_gradient():
    codes, grad = torch.randint(0, 2048, (64, 5)), torch.randn(64, 2, 256)
    weight = torch.randn(SMALL.spec.total_rows, 64)
    expected = reference.dense_gradient(grad, codes, SMALL.spec)
    for provider in (providers.FusedTable, providers.EagerTables, providers.AddedTable, providers.DenseAdamW):
        trained = provider(SMALL.spec, weight.clone())
        trained.backward(trained.forward(codes), grad)
        torch.testing.assert_close(torch.cat([table.grad.to_dense() for table in trained.tables()]), expected)


def test_floors_count_bytes():
    """Two SIDs that share all rows but those of order 4: 12 + 2 x 4 distinct rows of 16 + 16 reads."""
    codes = torch.tensor([[1, 2, 3, 4, 0], [1, 2, 3, 5, 0]])
    workload = Workload(2, "uniform", 500, "bfloat16")
    distinct, reads = workloads.touched(codes, workload.spec)
    assert (distinct, reads) == (20, 32)
    vectors = 2 * 2 * 256 * 2
    assert workload.reading(codes) == (80 + vectors + 20 * 128, 80 + vectors + 32 * 128)
    fixed = 80 + vectors + 2 * workloads.SORT_BYTES
    assert workload.training(codes) == (fixed + 20 * 2 * 132, fixed + 32 * 2 * 132)
    ended = codes.clone()
    ended[:, 2] = -1
    assert workloads.touched(ended, workload.spec) == (8, 16)


def test_workloads_are_what_they_say():
    uniform, hot, steep = (Workload(4000, codes).batches("cpu") for codes in ("uniform", "hot", "zipf 1.2"))
    assert all(torch.equal(a, b) for a, b in zip(uniform, Workload(4000).batches("cpu"), strict=True))
    assert not torch.equal(uniform[0], uniform[1])
    assert (hot[0] == hot[0][0]).all(1).float().mean() == pytest.approx(0.5, abs=0.01)
    share = (steep[0][:, 0] == 0).float().mean()
    chance = torch.arange(1, 2049, dtype=torch.float64) ** -1.2
    assert share == pytest.approx(float(chance[0] / chance.sum()), abs=0.03)
    with pytest.raises(ValueError, match="codes = 'skewed'; allowed are"):
        Workload(4, "skewed").batches("cpu")


def test_without_real_histories_their_workload_says_what_to_do(monkeypatch):
    monkeypatch.delenv(real_data.VARIABLE, raising=False)
    skipped = names_and_skips(tables.forward_sweep("cpu", codes="histories", sids=64, table_rows=500, dtype="float32"))
    assert all("no real histories: no folder of real data: set PREFIXMEM_DATA" in why for why in skipped.values())


def test_real_histories_are_read_where_they_are():
    if reason := workloads.no_histories():
        pytest.skip(reason)
    workload = Workload(5000, "histories")
    assert workload.spec.active_levels == (2, 3)
    assert len(workload.batches("cpu")[0].unique(dim=0)) < 5000, "users meet the same items"


def test_what_training_needs_counts_float32_state_of_half_precision():
    full, half = Workload(64, table_rows=500), Workload(64, table_rows=500, dtype="bfloat16")
    assert half.table_bytes * 2 == full.table_bytes
    assert providers.FusedLazyAdam.needs(full) == 3 * full.table_bytes
    assert providers.FusedLazyAdam.needs(half) == half.table_bytes + 2 * full.table_bytes
    assert providers.EagerTables.needs(half) == 5 * half.table_bytes
