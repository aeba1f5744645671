"""The row-wise optimizers: against torch.optim, dense definitions, each backend, and themselves."""

import io

import pytest
import torch

from prefixmem_fast import AddressSpec, optim, prefix_memory, token_memory
from prefixmem_fast.operation import reference
from prefixmem_fast.operation.backends import functions_of
from prefixmem_fast.operation.rules import RULES, Hyper, decay
from tests.helpers.cases import BACKENDS, MODES, mostly_slow, token_case

OPTIMIZERS = {
    "sgd": (optim.SGD, {"lr": 0.125}),
    "row_adagrad": (optim.RowWiseAdagrad, {"lr": 0.125, "eps": 1e-8, "initial_accumulator_value": 0.5}),
    "row_adam": (optim.RowWiseAdam, {"lr": 0.125, "betas": (0.75, 0.875)}),
    "row_adam_no_momentum": (optim.RowWiseAdam, {"lr": 0.125, "betas": (0.0, 0.875)}),
    "lazy_adam": (optim.LazyAdam, {"lr": 0.125, "betas": (0.75, 0.875)}),
}
EVERY = list(OPTIMIZERS)
GRADS = ["sparse", "fused"]


def case(mode="prefix", sids=20, seed=0):
    """Many more prefixes than rows, so that prefixes collide, and one prefix in a third of the batch."""
    spec = AddressSpec((40,) * 4, heads=2, max_order=3, table_rows=13, mode=mode, active_levels=(3, 4))
    generator = torch.Generator().manual_seed(seed)
    batches = [torch.randint(0, 40, (sids, 4), generator=generator) for _ in range(3)]
    for codes in batches:
        codes[::3, :2] = 7
        codes[4, 2] = -1
    return spec, batches


def train(weight, batches, spec, optimizer, grad, backend):
    for codes in batches:
        prefix_memory(codes, weight, spec, backend=backend, grad=grad).sin().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def dense_training(weight, batches, spec, name, options):
    """The definition on dense gradients: the rule over the whole table, kept where the batch touches a row."""
    rule = RULES[name.removesuffix("_no_momentum")]
    beta1, beta2 = options.get("betas", (0.0, 0.0))
    state = {
        key: torch.full(
            weight.shape if kind == "element" else weight.shape[:1], options.get("initial_accumulator_value", 0.0)
        )
        for key, kind in rule.state.items()
    }
    for step, codes in enumerate(batches, 1):
        leaf = weight.detach().clone().requires_grad_()
        out = prefix_memory(codes, leaf, spec, backend="reference")
        out.sin().sum().backward()
        touched = torch.zeros(len(weight), dtype=torch.bool)
        touched[reference.row_sums(out.detach(), codes, spec, out.dtype).rows] = True
        hyper = Hyper(
            options["lr"],
            options.get("weight_decay", 0.0),
            options.get("eps", 1e-8),
            beta1,
            beta2,
            1 - beta1**step,
            1 - beta2**step,
        )
        given = [None if key == "exp_avg" and beta1 == 0 else state[key] for key in state]
        new, *new_state = rule.update(decay(weight, hyper), leaf.grad, *given, hyper)
        weight = torch.where(touched[:, None], new, weight)
        for key, value in zip(state, new_state, strict=True):
            if value is not None:
                state[key] = torch.where(touched[:, None] if value.dim() == 2 else touched, value, state[key])
    return weight


def _fast(name, mode, backend, grad):
    """The interpreter takes seconds a case; `test_as_on_a_gpu` has each rule over a sparse gradient."""
    return backend != "triton" or (
        name == "row_adagrad" if grad == "fused" else (name, mode) == ("lazy_adam", "prefix")
    )


@pytest.mark.parametrize(("name", "mode", "backend", "grad"), mostly_slow(_fast, EVERY, MODES, BACKENDS, GRADS))
def test_equals_dense_training_on_the_touched_rows(name, mode, backend, grad, backend_calls):
    """Collisions would show: a row updated once for each of its prefixes is not the row of the summed gradient."""
    spec, batches = case(mode)
    make, options = OPTIMIZERS[name]
    options = {**options, "weight_decay": 0.25}
    start = torch.randn(spec.total_rows, 6)
    weight = torch.nn.Parameter(start.clone())
    train(weight, batches, spec, make([weight], **options), grad, backend)
    a_step = ["forward", "fused_update"] if grad == "fused" else ["forward", "row_sums", "sparse_update"]
    assert backend_calls == [(backend, function) for function in a_step * len(batches)]
    expected = dense_training(start, batches, spec, name, options)
    torch.testing.assert_close(weight.detach(), expected, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("name", EVERY)
def test_kernels_give_the_definition(name):
    """One kernel update against the rule in PyTorch on the same sums: equal but for the order within a mean."""
    make, options = OPTIMIZERS[name]
    rows = torch.tensor([1, 3, 4, 8])
    values = torch.randn(4, 7)
    found = []
    for kernel in (False, True):
        torch.manual_seed(1)
        weight = torch.nn.Parameter(torch.randn(9, 7))
        optimizer = make([weight], weight_decay=0.25, **options)
        for _ in range(3):
            update = optimizer.begin(weight)
            if kernel:
                gradient = torch.sparse_coo_tensor(rows[None], values, weight.shape, check_invariants=True)
                functions_of("triton").sparse_update(gradient, update)
            else:
                update.apply(rows, values)
        found.append([weight.detach(), *(s for s in optimizer.state[weight].values())])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=4e-7, atol=1e-7)


def test_lazy_adam_is_adamw_where_every_row_is_touched():
    spec = AddressSpec((4, 3), heads=2, table_rows=30)
    codes = torch.cartesian_prod(torch.arange(4), torch.arange(3))
    weight = torch.nn.Parameter(torch.randn(spec.total_rows, 5))
    other = torch.nn.Parameter(weight.detach().clone())
    ours = optim.LazyAdam([weight], lr=0.01, weight_decay=0.1)
    theirs = torch.optim.AdamW([other], lr=0.01, weight_decay=0.1)
    for _ in range(4):
        for w, optimizer, grad in ((weight, ours, "fused"), (other, theirs, "dense")):
            prefix_memory(codes, w, spec, grad=grad).sin().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(weight, other, rtol=1e-5, atol=1e-6)


def test_row_adam_of_one_column_is_lazy_adam():
    spec, batches = case()
    start = torch.randn(spec.total_rows, 1)
    found = []
    for make in (optim.RowWiseAdam, optim.LazyAdam):
        weight = torch.nn.Parameter(start.clone())
        train(weight, batches, spec, make([weight], lr=0.1), "fused", "cpu")
        found.append(weight.detach())
    torch.testing.assert_close(*found)


def test_sgd_is_torch_sgd():
    spec, batches = case()
    start = torch.randn(spec.total_rows, 4)
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    train(ours, batches, spec, optim.SGD([ours], lr=0.1), "fused", "cpu")
    train(theirs, batches, spec, torch.optim.SGD([theirs], lr=0.1), "dense", "reference")
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_token_streams_train_too(backend):
    spec, _ = case()
    ids, table = token_case(spec, (2, 23))
    found = []
    for how in ("fused", "sparse", "dense"):
        torch.manual_seed(0)
        weight = torch.nn.Parameter(torch.randn(spec.total_rows, 4))
        optimizer = (torch.optim.SGD if how == "dense" else optim.SGD)([weight], lr=0.5)
        token_memory(ids, table, weight, spec, backend=backend, grad=how).sin().sum().backward()
        optimizer.step()
        found.append(weight.detach())
    torch.testing.assert_close(found[0], found[2])
    torch.testing.assert_close(found[1], found[2])


@pytest.mark.parametrize(
    ("name", "backend"),
    mostly_slow(lambda name, backend: backend != "triton" or name in ("sgd", "row_adam"), EVERY, BACKENDS),
)
def test_bfloat16_same_seed_same_bits(name, backend):
    """On every backend the same bits: the random numbers depend on seed, step, row and column alone."""
    spec, batches = case(sids=9)
    make, options = OPTIMIZERS[name]
    start = torch.randn(spec.total_rows, 5).bfloat16()
    found = []
    for seed, how in ((3, backend), (3, "reference"), (4, backend)):
        weight = torch.nn.Parameter(start.clone())
        optimizer = make([weight], seed=seed, **options)
        for codes in batches[:2]:  # gradients of small integers: their sums are exact in any order
            out = prefix_memory(codes, weight, spec, backend=how, grad="fused")
            out.backward(torch.arange(out.numel()).remainder(5).reshape(out.shape).to(out))
            optimizer.step()
        found.append(weight.detach())
    if name in ("row_adagrad", "row_adam", "row_adam_no_momentum"):  # the mean over a row may be one bit apart
        assert (found[0] != found[1]).double().mean() < 0.01
    else:
        assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


@pytest.mark.parametrize("name", EVERY)
def test_state_dict_round_trip(name):
    """Training goes on with the same bits after a stop, in bfloat16 with float32 state."""
    spec, batches = case()
    make, options = OPTIMIZERS[name]
    weight = torch.nn.Parameter(torch.randn(spec.total_rows, 4).bfloat16())
    optimizer = make([weight], **options)
    train(weight, batches, spec, optimizer, "fused", "cpu")
    stream = io.BytesIO()
    torch.save(optimizer.state_dict(), stream)
    stream.seek(0)
    other = torch.nn.Parameter(weight.detach().clone())
    resumed = make([other], lr=9.0)
    resumed.load_state_dict(torch.load(stream))
    for value in resumed.state[other].values():
        assert value.dtype in (torch.float32, torch.int64)
    for w, o in ((weight, optimizer), (other, resumed)):
        train(w, batches[::-1], spec, o, "fused", "cpu")
    assert torch.equal(weight, other)


def test_learning_rate_schedules():
    spec, batches = case()
    start = torch.randn(spec.total_rows, 4)
    found = []
    for rates in ((1.0, 0.5, 0.25), None):
        weight = torch.nn.Parameter(start.clone())
        optimizer = optim.SGD([weight], lr=1.0)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        for step, codes in enumerate(batches):
            if rates:
                optimizer.param_groups[0]["lr"] = rates[step]
            train(weight, [codes], spec, optimizer, "fused", "cpu")
            if not rates:
                schedule.step()
        found.append(weight.detach())
    assert torch.equal(*found)


@pytest.mark.parametrize("backend", ["cpu", "native", "triton"])
def test_learning_rate_in_a_tensor(backend):
    spec, batches = case(sids=8)
    start = torch.randn(spec.total_rows, 4)
    found = []
    for lr in (0.125, torch.tensor(0.125)):
        weight = torch.nn.Parameter(start.clone())
        train(weight, batches[:1], spec, optim.LazyAdam([weight], lr=lr), "fused", backend)
        found.append(weight.detach())
    assert torch.equal(*found)


def test_the_step_takes_the_backend_of_the_last_reading(backend_calls):
    """Of a table without any, the device's own; after torch has made one gradient of two, the table's."""
    spec, batches = case(sids=6)
    weight = torch.nn.Parameter(torch.randn(spec.total_rows, 4))
    optimizer = optim.SGD([weight])
    weight.grad = torch.sparse_coo_tensor([[3, 1]], torch.ones(2, 4), weight.shape)
    optimizer.step()
    assert backend_calls == [("native", "sparse_update")]
    weight.grad = None
    for codes in batches:
        prefix_memory(codes, weight, spec, backend="triton", grad="sparse").sum().backward()
    optimizer.step()
    assert backend_calls[-1] == ("triton", "sparse_update")


def test_a_table_has_one_optimizer():
    """A second one would take over its backward pass, and the first one's state would stand still without a word."""
    spec, batches = case(sids=6)
    weight = torch.nn.Parameter(torch.randn(spec.total_rows, 4))
    first = optim.SGD([weight])
    with pytest.raises(RuntimeError, match=r"a SGD holds the table of shape .* already.*release\(\) first, or drop it"):
        optim.LazyAdam([weight])
    train(weight, batches[:1], spec, first, "fused", "cpu")
    first.release()
    second = optim.LazyAdam([weight])
    train(weight, batches[:1], spec, second, "fused", "cpu")
    assert second.state[weight]["step"] == 1
    prefix_memory(batches[0], weight, spec, grad="sparse").sum().backward()
    with pytest.raises(RuntimeError, match="SGD has let go of its table"):
        first.step()


def test_a_dropped_optimizer_lets_go():
    """With a schedule it stands in a reference cycle, which only the garbage collector ends."""
    weight = torch.nn.Parameter(torch.randn(9, 4))
    optimizer = optim.SGD([weight])
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    del optimizer, schedule
    optim.LazyAdam([weight])


def test_dense_gradients_are_refused():
    spec, batches = case()
    weight = torch.nn.Parameter(torch.randn(spec.total_rows, 4))
    optimizer = optim.SGD([weight])
    prefix_memory(batches[0], weight, spec).sum().backward()
    with pytest.raises(TypeError, match='has a dense gradient; SGD takes grad="sparse" or grad="fused"'):
        optimizer.step()


@pytest.mark.parametrize(
    ("grad", "message"), [("fused", "every process's table by its own batch"), ("sparse", "DistributedDataParallel")]
)
def test_several_processes_are_refused(monkeypatch, grad, message):
    spec, batches = case()
    weight = torch.nn.Parameter(torch.randn(spec.total_rows, 4))
    optimizer = optim.SGD([weight])
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(RuntimeError, match=f'{message}.*use grad="dense"'):
        prefix_memory(batches[0], weight, spec, grad=grad)
    del optimizer


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (optim.SGD, {"lr": -1.0}, "lr = -1.0 is not a finite number of 0 or more"),
        (optim.SGD, {"lr": float("nan")}, "lr = nan"),
        (optim.SGD, {"lr": torch.ones(2)}, r"lr is a tensor of shape \(2,\)"),
        (optim.SGD, {"weight_decay": -0.1}, "weight_decay = -0.1"),
        (optim.RowWiseAdagrad, {"eps": -1e-8}, "eps = -1e-08"),
        (optim.RowWiseAdagrad, {"initial_accumulator_value": -1.0}, "initial_accumulator_value = -1.0"),
        (optim.RowWiseAdam, {"betas": (0.9, 1.0)}, r"betas = \(0.9, 1.0\); give two numbers in \[0, 1\)"),
        (optim.LazyAdam, {"seed": -1}, "seed = -1 is outside"),
        (optim.LazyAdam, {"stochastic_rounding": 1}, "stochastic_rounding = 1 is not a bool"),
    ],
)
def test_errors_name_the_argument(make, options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make([torch.nn.Parameter(torch.zeros(3, 2))], **options)


def test_only_tables_are_taken():
    with pytest.raises(ValueError, match=r"params holds a torch.float32 of shape \(3,\); row-wise optimizers take"):
        optim.SGD([torch.nn.Parameter(torch.zeros(3))])


def test_a_table_that_is_not_contiguous_is_refused():
    with pytest.raises(ValueError, match=r"strides \(1, 5\); rows are updated in place, so give a contiguous one"):
        optim.SGD([torch.nn.Parameter(torch.randn(4, 5).t())])


def test_a_step_that_was_loaded_elsewhere_follows_its_table():
    """load_state_dict leaves "step" on the device of the file, and kernels read it on that of the table."""
    weight = torch.nn.Parameter(torch.empty(6, 4, device="meta"))
    optimizer = optim.RowWiseAdam([weight])
    optimizer.begin(weight)
    optimizer.state[weight]["step"] = torch.zeros((), dtype=torch.int64)
    assert optimizer.begin(weight).step.device == weight.device
