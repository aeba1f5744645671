"""TorchRec's tables: the same S, the same training and the same weights as the encoder's own, on one to three ranks.

The tests that take the fixture `torchrec` are skipped where it is not installed: `make test-torchrec` has it.
"""

import copy
import re
import subprocess
import sys
import types

import pytest
import torch
from torch import nn

from prefixmem_fast import AddressSpec, PrefixMem, PrefixMemConfig, PrefixMemory, optim
from prefixmem_fast.addressing import item_windows
from prefixmem_fast.distributed import torchrec as ours
from prefixmem_fast.distributed.torchrec import from_torchrec, require_torchrec, to_torchrec
from tests.distributed import torchrec_ranks as ranks

KINDS = ("prefix", "suffix", "full", "cross_item")
NAMES = ("memory.weight", "out_proj.weight")


@pytest.fixture
def torchrec():
    return pytest.importorskip("torchrec")


def codes_for(encoder, *shape, seed=0):
    """Some of them end a prefix: -1, and K at the last level."""
    generator = torch.Generator().manual_seed(seed)
    shape = (*shape, 3) if encoder.cross_item is not None else shape
    sizes = encoder.config.codebook_sizes
    return torch.stack([torch.randint(-1, k + (l == 4), shape, generator=generator) for l, k in enumerate(sizes)], -1)


# Without torchrec


def test_nothing_is_imported_before_it_is_needed():
    code = (
        "import sys, prefixmem_fast, prefixmem_fast.distributed, prefixmem_fast.distributed.torchrec\n"
        "assert not {'torchrec', 'fbgemm_gpu'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.fixture
def installed(monkeypatch):
    """Says what is installed, and what importing torchrec gives: a module, or None for none."""

    def install(versions, module):
        monkeypatch.setattr(ours, "installed_version", versions.get)
        monkeypatch.setitem(sys.modules, "torchrec", module)

    return install


def test_the_sentence_where_it_is_absent(installed):
    installed({"torch": "2.13.0"}, None)
    with pytest.raises(ImportError) as raised:
        to_torchrec(ranks.encoder_of("prefix"))
    message = str(raised.value)
    assert "installed are torch 2.13.0, torchrec absent, fbgemm-gpu-cpu absent" in message
    assert "pip install torch==2.13.0 fbgemm-gpu-cpu==1.8.0 torchmetrics==1.0.3" in message
    assert "pip install --no-deps torchrec==1.9.2" in message


def test_the_sentence_where_fbgemm_does_not_load(installed, monkeypatch, tmp_path):
    """As fbgemm-gpu-cpu 1.9.0 on torch 2.13.0 does: an OSError, of an undefined symbol."""
    (tmp_path / "torchrec.py").write_text("raise OSError('Could not load this library: undefined symbol')")
    installed({"torch": "2.13.0", "torchrec": "1.9.2", "fbgemm-gpu": "1.9.0"}, None)
    monkeypatch.delitem(sys.modules, "torchrec")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ImportError, match=re.escape("torchrec 1.9.2, fbgemm-gpu 1.9.0.")) as raised:
        require_torchrec()
    assert "pip install torch==2.13.0 fbgemm-gpu==1.8.0" in str(raised.value)
    assert isinstance(raised.value.__cause__, OSError)


def test_others_that_load_are_taken_with_a_warning(installed, recwarn):
    works = {"torch": "2.13.0", "torchrec": "1.9.2", "fbgemm-gpu": "1.8.0"}
    installed(works, types.ModuleType("torchrec"))
    require_torchrec()
    assert not recwarn
    installed({**works, "torch": "2.14.1"}, types.ModuleType("torchrec"))
    with pytest.warns(UserWarning, match=r"not tested with torch 2\.14\.1, torchrec 1\.9\.2, fbgemm-gpu 1\.8\.0, but"):
        require_torchrec()


def small(**options):
    spec = AddressSpec((4, 4), heads=2, table_rows=20)
    return PrefixMem(PrefixMemConfig(spec, **{"memory_dim": 8, "hidden_size": 4, **options}))


@pytest.mark.parametrize(
    ("encoder", "options", "error", "message"),
    [
        (lambda: nn.Linear(2, 2), {}, TypeError, "encoder is a Linear; give a PrefixMem"),
        (lambda: small().quantize("int8"), {}, ValueError, "quantization = 'int8'; give the one that it was made from"),
        (lambda: small(output_slot=True), {}, ValueError, "output_slot = True, which adds to a model's last hidden"),
        (lambda: small(memory_dim=12), {}, ValueError, "= 6 numbers; FBGEMM's tables take multiples of 4: give .* 16"),
        (lambda: small().bfloat16(), {}, ValueError, "dtype = torch.bfloat16; .* torch.float32 and torch.float16"),
        (small, {"dtype": torch.float64}, ValueError, "dtype = torch.float64"),
        (small, {"optimizer": "adam"}, ValueError, "optimizer = 'adam' is unknown; allowed are 'row_adagrad', 'sgd'"),
        (small, {"lr": -1.0}, ValueError, "lr = -1.0 is not a finite number of 0 or more"),
        (small, {"eps": 0.0}, ValueError, "eps = 0 divides by zero"),
    ],
)
def test_what_is_refused(encoder, options, error, message):
    with pytest.raises(error, match=message):
        to_torchrec(encoder(), **options)


def test_a_module_without_tables_is_refused():
    with pytest.raises(ValueError, match="module holds 0 modules of to_torchrec"):
        from_torchrec(nn.Linear(2, 2))


def test_tables_that_are_no_shards_are_refused():
    with pytest.raises(
        TypeError, match=r"a table is object, which cannot be gathered; save it with torch\.distributed"
    ):
        ours._copy_table(object(), torch.zeros(2, 4))


# One process


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_bits(torchrec, kind):
    encoder = ranks.encoder_of(kind)
    module = to_torchrec(encoder)
    codes = codes_for(encoder, 4, 9)
    assert torch.equal(module(codes), encoder(codes))
    pairs = [(encoder, module.encoder, codes)]
    if encoder.cross_item is not None:
        windows = item_windows(codes, encoder.cross_item.config.spec)
        pairs = [*pairs, (encoder.cross_item, module.encoder.cross_item, windows)]
    for one, other, read in pairs:
        S = one.memory(read)
        assert S.abs().sum() > 1
        assert torch.equal(other.memory(read), S)


@pytest.mark.parametrize("mode", ["prefix", "suffix", "full"])
def test_every_choice_of_levels_and_orders(torchrec, mode):
    """Levels above N, orders above L, and orders that no active level reads."""
    for levels, orders in (((1,), 4), ((1, 3), 2), ((2,), 1), ((3,), 5), ((1, 2, 3), 3)):
        spec = AddressSpec((3, 4, 5), orders, 2, 11, mode=mode, active_levels=levels)
        encoder = PrefixMem(PrefixMemConfig(spec, 8, 4, memory_init_std=1.0))
        codes = torch.cartesian_prod(*(torch.arange(-1, k + 1) for k in (3, 4, 5)))
        module = to_torchrec(encoder)
        assert torch.equal(module.memory(codes), encoder.memory(codes))
        assert torch.equal(from_torchrec(module).memory.weight, encoder.memory.weight)


@pytest.mark.parametrize("options", [{"lags": 3}, {"earlier_codes": 2}, {"lags": 2, "earlier_codes": 1}])
def test_lags_and_earlier_codes(torchrec, options):
    spec = AddressSpec.cross_item((4, 5, 6), heads=2, table_rows=50)
    encoder = PrefixMem(PrefixMemConfig(spec, 8, 4, output_init_std=1.0, memory_init_std=1.0, **options))
    module = to_torchrec(encoder)
    codes = torch.randint(0, 4, (2, 6, 3))
    assert torch.equal(module(codes), encoder(codes))
    back = from_torchrec(module)
    assert all(torch.equal(value, back.state_dict()[name]) for name, value in encoder.state_dict().items())


def test_shapes_and_dtypes_of_codes(torchrec):
    encoder = ranks.encoder_of("prefix")
    module = to_torchrec(encoder)
    codes = codes_for(encoder, 6)
    S = module.memory(codes)
    for dtype in (torch.int16, torch.int32):
        assert torch.equal(module.memory(codes.to(dtype)), S)
    assert torch.equal(module.memory(codes[0]), S[0])
    assert torch.equal(module.memory(codes.view(2, 1, 3, 5)), S.view(2, 1, 3, 2, 32))
    for shape in ((0, 5), (2, 0, 5)):
        assert module(torch.zeros(shape, dtype=torch.int64)).shape == (*shape, ranks.HIDDEN)
    with pytest.raises(ValueError, match=re.escape("codes has shape (6, 4); give [..., 5]")):
        module(codes[:, :4])
    with pytest.raises(TypeError, match=re.escape("codes has dtype torch.float32")):
        module(codes.float())


def test_dtypes_of_tables(torchrec):
    """float16 is read exactly and summed in float32; S has the dtype that the encoder's has."""
    encoder = ranks.encoder_of("prefix")
    codes = codes_for(encoder, 20)
    half = copy.deepcopy(encoder).half()
    assert torch.equal(to_torchrec(half).memory(codes), half.memory(codes))
    rounded = copy.deepcopy(encoder)
    rounded.memory.weight.data = encoder.memory.weight.data.half().float()
    module = to_torchrec(encoder, dtype=torch.float16)
    assert next(module.memory.collection.parameters()).dtype == torch.float16
    assert torch.equal(module(codes), rounded(codes))
    brain = copy.deepcopy(encoder).bfloat16()
    module = to_torchrec(brain, dtype=torch.float32)
    assert module.memory(codes).dtype == torch.bfloat16
    assert torch.equal(module.memory(codes), brain.memory(codes))
    assert torch.equal(from_torchrec(module).memory.weight, brain.memory.weight)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("optimizer", ["row_adagrad", "sgd"])
def test_training_unsharded(torchrec, kind, optimizer):
    case = ranks.Case(kind, optimizer=optimizer, steps=20)
    module = to_torchrec(ranks.encoder_of(kind), optimizer=optimizer, **ranks.OPTIONS[optimizer])
    dense = torch.optim.SGD(ranks.projections(module.encoder), ranks.OUT_RATE)
    for step in range(case.steps):
        ((share, targets),) = ranks.shares_of(case, step, 1)
        ranks.loss_of(module, share, targets).backward()
        dense.step()
        dense.zero_grad()
    assert_trained(case, 1, dict(from_torchrec(module).named_parameters()))


def test_it_is_a_copy(torchrec):
    encoder = ranks.encoder_of("cross_item")
    before = copy.deepcopy(encoder.state_dict())
    module = to_torchrec(encoder, lr=1.0)
    ranks.loss_of(module, *ranks.shares_of(ranks.Case("cross_item"), 0, 1)[0]).backward()
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
    assert all(weight.grad is None for weight in encoder.parameters())
    back = from_torchrec(module)
    back.memory.weight.data.zero_()
    assert next(module.memory.collection.parameters()).abs().sum() > 0


@pytest.mark.parametrize("kind", KINDS)
def test_there_and_back(torchrec, kind):
    encoder = ranks.encoder_of(kind)
    model = nn.ModuleDict({"sids": to_torchrec(encoder), "head": nn.Linear(2, 2)})
    back = from_torchrec(model)
    assert isinstance(back.memory, PrefixMemory)
    assert back.config == encoder.config
    assert back.state_dict().keys() == encoder.state_dict().keys()
    assert all(torch.equal(value, back.state_dict()[name]) for name, value in encoder.state_dict().items())
    given = ranks.encoder_of(kind, grad="fused", tables="host", overlap=True)
    tables = [one.memory.weight for one in (given, given.cross_item) if one is not None]
    held = optim.SGD(tables, lr=1.0)
    with torch.no_grad():
        for weight in given.parameters():
            weight.zero_()
    assert from_torchrec(model, given) is given
    assert held.param_groups[0]["params"][0] is given.memory.weight
    assert all(torch.equal(value, given.state_dict()[name]) for name, value in encoder.state_dict().items())


def test_what_from_torchrec_refuses(torchrec):
    module = to_torchrec(ranks.encoder_of("prefix"))
    with pytest.raises(ValueError, match="module holds 2 modules of to_torchrec"):
        from_torchrec(nn.ModuleList([module, copy.deepcopy(module)]))
    with pytest.raises(ValueError, match="encoder has the config PrefixMemConfig"):
        from_torchrec(module, ranks.encoder_of("prefix", seed=1))
    with pytest.raises(TypeError, match="encoder is a Linear"):
        from_torchrec(module, nn.Linear(2, 2))
    with pytest.raises(ValueError, match="module is quantized; give the one that it was made from"):
        from_torchrec(module.quantized())


def test_a_state_dict_of_another_spec_is_refused(torchrec):
    module = to_torchrec(ranks.encoder_of("prefix"))
    state = {name: value * 2 if value.is_floating_point() else value for name, value in module.state_dict().items()}
    before = from_torchrec(module).memory.weight
    module.load_state_dict(state)
    assert torch.equal(from_torchrec(module).memory.weight, 2 * before)
    with pytest.raises(RuntimeError, match="the checkpoint's address spec differs"):
        to_torchrec(ranks.encoder_of("prefix", seed=1)).load_state_dict(state)


@pytest.mark.parametrize("kind", KINDS)
def test_int8(torchrec, kind):
    encoder = ranks.encoder_of(kind)
    module = to_torchrec(encoder)
    serving = module.quantized()
    codes = codes_for(encoder, 50)
    m, found = encoder(codes), serving(codes)
    assert 1e-4 < (found - m).norm() / m.norm() < 1e-2
    assert not found.requires_grad
    assert torch.equal(module(codes), m)  # which stays as it is
    stored = sum(value.numel() for value in serving.memory.collection.state_dict().values())
    spec, width = encoder.config.spec, encoder.config.row_width
    assert stored <= spec.total_rows * (width + 8)  # 8 bits a number, and a row's scale and bias
    with pytest.raises(ValueError, match="the tables are quantized already"):
        serving.quantized()


def test_constraints(torchrec):
    module = to_torchrec(ranks.encoder_of("cross_item"))
    found = module.constraints()
    assert sorted(found) == [*(f"cross_item_order{n}" for n in range(5, 10)), *(f"order{n}" for n in range(1, 5))]
    for given in found.values():
        assert given.sharding_types == ["row_wise", "table_wise"]
        assert given.compute_kernels == ["fused", "fused_uvm", "fused_uvm_caching"]
    suffix = to_torchrec(ranks.encoder_of("suffix")).constraints()
    assert [one.pooling_factors for one in suffix.values()] == [[12.0], [12.0], [8.0], [4.0]]  # levels 2, 3, 4; 4 heads
    chosen = module.constraints(sharding_types=["table_wise"], compute_kernels=["key_value"])
    assert chosen["order1"].sharding_types == ["table_wise"]
    assert chosen["order1"].compute_kernels == ["key_value"]
    for options in ({"sharding_types": ["column_wise"]}, {"compute_kernels": ["dense"]}, {"sharding_types": []}):
        (name,) = options
        with pytest.raises(ValueError, match=rf"{name} = \[.*\]; give a list of '"):
            module.constraints(**options)


@pytest.mark.parametrize(
    ("rows", "world", "kernels"),
    [(250_000_000, 16, ["fused"] * 4), (1_000_000_000, 8, ["fused"] * 2 + ["fused_uvm_caching"] * 2)],
)
def test_plans_for_gpus(torchrec, rows, world, kernels):
    """Of tables that are nowhere: row-wise each, and in the host's memory where the GPUs have not enough."""
    from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
    from torchrec.distributed.sharding_plan import get_default_sharders

    spec = AddressSpec((2048,) * 5, table_rows=rows, active_levels=(3, 4))
    module = to_torchrec(PrefixMem(PrefixMemConfig(spec, 256, hidden_size=64), device="meta"))
    topology = Topology(world, "cuda", local_world_size=8, hbm_cap=80 << 30, ddr_cap=2500 << 30)
    planner = EmbeddingShardingPlanner(topology=topology, constraints=module.constraints())
    (tables,) = planner.plan(module, get_default_sharders()).plan.values()
    found = [(table.sharding_type, table.compute_kernel) for table in tables.values()]
    assert found == [("row_wise", kernel) for kernel in kernels]


# Two and three processes


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    pytest.importorskip("torchrec")
    return tmp_path_factory.mktemp("ranks")


def run(world, folder):
    torch.multiprocessing.spawn(ranks.main, (world, folder), nprocs=world)
    return [torch.load(folder / f"world{world}_rank{rank}.pt") for rank in range(world)]


@pytest.fixture(scope="module")
def two(folder):
    return run(2, folder)


@pytest.fixture(scope="module")
def three(folder, two):
    return run(3, folder)  # goes on from the checkpoint of the two


@pytest.fixture(scope="module")
def four(folder):
    return run(4, folder)


@pytest.fixture(params=[2, 3], ids=["2 ranks", "3 ranks"])
def results(request):
    return request.getfixturevalue({2: "two", 3: "three"}[request.param])


def results_of(name, results):
    """What each rank found."""
    found = [result.get(name, {"failed": f"not reached: {list(result)[-1]} failed"}) for result in results]
    for rank, value in enumerate(found):
        if isinstance(value, dict) and "failed" in value:
            pytest.fail(f"rank {rank}: {value['failed']}")
    return found


def assert_trained(case, world, found):
    """Within 1e-6 of what one process learns from the batches of all, which is far from the start."""
    start, expected = ranks.encoder_of(case.encoder), ranks.reference(case, world)
    assert found.keys() == dict(expected.named_parameters()).keys()
    for name, value in expected.named_parameters():
        assert (value - start.get_parameter(name)).abs().max() > 1e-2, name
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("case", ranks.CASES, ids=str)
def test_training(case, results):
    found = results_of(str(case), results)
    assert_trained(case, len(results), found[0])
    for other in found[1:]:
        assert all(torch.equal(value, other[name]) for name, value in found[0].items())


def test_training_on_four_ranks(four):
    case = ranks.CASES[0]
    assert case.steps == 50
    assert_trained(case, 4, results_of(str(case), four)[0])


@pytest.mark.parametrize("sharding", ["row_wise", "table_wise"])
@pytest.mark.parametrize("kind", ["prefix", "cross_item"])
def test_from_shards_to_the_encoder(kind, sharding, results):
    assert results_of(f"round_trip-{kind}-{sharding}", results) == [True] * len(results)


@pytest.mark.parametrize("sharding", ["row_wise", "table_wise"])
def test_from_a_meta_device(sharding, results):
    """TorchRec makes the shards, normal and no two alike though the ranks are seeded alike; W_out is one everywhere."""
    found = results_of(f"from_meta-{sharding}", results)
    for name, std in zip(NAMES, (0.1, 0.3), strict=True):
        assert found[0][name].std() == pytest.approx(std, rel=0.2)
        assert all(torch.equal(other[name], found[0][name]) for other in found)
    assert len(found[0]["memory.weight"].unique(dim=0)) == len(found[0]["memory.weight"])


def test_the_planner_keeps_to_the_constraints(results):
    for plan in results_of("planned", results):
        assert len(plan) == 9
        assert {kernel for _, kernel in plan.values()} == {"fused"}
        assert {sharding for sharding, _ in plan.values()} <= {"row_wise", "table_wise"}


@pytest.mark.parametrize("sharding", ["column_wise", "data_parallel"])
def test_a_plan_without_the_constraints_is_refused(sharding, two):
    for message in results_of(sharding, two):
        assert f"the table order1 is sharded {sharding} with the kernel" in message
        assert "give the planner constraints=module.constraints()" in message


def test_sharded_tables_are_not_quantized(results):
    for message in results_of("quantize", results):
        assert "the tables are sharded; quantize to_torchrec(from_torchrec(module), optimizer=None)" in message


def test_a_new_rate_needs_a_step_of_the_fused_optimizer(results):
    for moved in results_of("rate_of_zero", results):
        assert moved["set"] > 1e-3
        assert moved["stepped"] == 0


@pytest.mark.parametrize("sharding", ["row_wise", "table_wise"])
def test_a_checkpoint_of_two_ranks_goes_on_with_three(sharding, three):
    for found in results_of(f"resumed-{sharding}", three):
        assert_trained(ranks.SAVED, 3, found)


def test_a_checkpoint_of_another_spec_is_refused(results):
    for message in results_of("another_spec", results):
        assert message.startswith("the checkpoint's address spec differs")


def test_bytes_that_leave_a_rank(two):
    """At the paper's shape a SID: half of 16 ids of 8, 4 lengths of 4, half of 16 rows of 256, and of their gradients.

    Exactly half, since each table's H blocks split evenly over two ranks.
    """
    for counted in results_of("bytes", two):
        assert counted.keys() == {f"all_to_all_single torch.{name}" for name in ("int64", "int32", "float32")}
        assert counted["all_to_all_single torch.float32"] == 64 * 4096
        assert counted["all_to_all_single torch.int32"] == 64 * 16
        assert 0 <= counted["all_to_all_single torch.int64"] - 64 * 64 <= 64  # and how many ids come, once a batch


def test_bytes_that_leave_one_of_four_ranks(four):
    """6,288 a SID, and how many ids come, once a batch."""
    for counted in results_of("bytes", four):
        assert 0 <= sum(counted.values()) - 64 * 6288 <= 64 * 3
