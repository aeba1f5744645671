"""One optimizer for a whole model, clipping over sparse and dense gradients, and Hugging Face's Trainer."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from prefixmem_fast import AddressSpec, PrefixMem, PrefixMemConfig, optim, prefix_memory
from prefixmem_fast.optim import clip_grad_norm_, for_model
from tests.helpers.cases import BACKENDS

SPEC = AddressSpec((6, 5, 4), table_rows=20, heads=2, active_levels=(1, 2))


class Recommender(nn.Module):
    """Next-code prediction: the encoder's m at levels 1 and 2, a layer, a head; the loss as Trainer wants it."""

    def __init__(self, grad="fused"):
        super().__init__()
        self.encoder = PrefixMem(PrefixMemConfig(SPEC, memory_dim=8, hidden_size=6, output_init_std=0.3), grad=grad)
        self.layer = nn.Linear(6, 6)
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 6)

    def forward(self, codes):
        m = self.encoder(codes)[:, :2]
        logits = self.head(self.norm(self.layer(m)))
        return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1), codes[:, 1:].flatten())}


def codes(n=40, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randint(0, k, (n,), generator=generator) for k in SPEC.codebook_sizes], 1)


def model_with(grad):
    torch.manual_seed(0)
    return Recommender(grad)


def rates(model, optimizer):
    names = {id(p): name for name, p in model.named_parameters()}
    return {names[id(p)]: (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}


@pytest.mark.parametrize("grad", ["dense", "sparse", "fused"])
def test_every_parameter_once_at_its_learning_rate(grad):
    model = model_with(grad)
    model.head.bias.requires_grad_(False)
    found = rates(model, for_model(model, 0.01, weight_decay=0.1))
    table_decay = 0.1 if grad == "dense" else 0.0
    assert found == {
        "encoder.memory.weight": (pytest.approx(0.05), table_decay),
        "encoder.out_proj.weight": (pytest.approx(0.05), 0.1),
        "layer.weight": (0.01, 0.1),
        "layer.bias": (0.01, 0.0),
        "norm.weight": (0.01, 0.0),
        "norm.bias": (0.01, 0.0),
        "head.weight": (0.01, 0.1),
    }


def test_is_the_two_optimizers_side_by_side():
    """Under one schedule, and after a state_dict round trip in the middle."""
    found = []
    for together in (True, False):
        model = model_with("fused")
        if together:
            optimizers = [for_model(model, 0.01, weight_decay=0.1, row_options={"eps": 1e-8})]
        else:
            table = [model.encoder.memory.weight]
            rest = [p for p in model.parameters() if p is not table[0]]
            groups = [
                {"params": [p], "lr": 0.05 if p.shape == (6, 8) else 0.01, "weight_decay": 0.1 * (p.dim() == 2)}
                for p in rest
            ]
            optimizers = [optim.RowWiseAdagrad(table, 0.05, eps=1e-8), torch.optim.AdamW(groups)]
        schedules = [torch.optim.lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)) for o in optimizers]
        for step in range(6):
            model(codes(seed=step))["loss"].backward()
            for optimizer, schedule in zip(optimizers, schedules, strict=True):
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
            if together and step == 2:
                stream = io.BytesIO()
                torch.save([optimizers[0].state_dict(), schedules[0].state_dict()], stream)
                stream.seek(0)
                states = torch.load(stream)
                optimizers[0].release()
                optimizers = [for_model(model, 9.0, row_options={"eps": 1.0})]
                schedules = [torch.optim.lr_scheduler.LambdaLR(optimizers[0], lambda step: 1 / (1 + step))]
                optimizers[0].load_state_dict(states[0])
                schedules[0].load_state_dict(states[1])
        found.append(model.state_dict())
    for name, value in found[0].items():
        assert torch.equal(value, found[1][name]), name


@pytest.mark.parametrize("norm_type", [1.0, 2.0, float("inf")])
@pytest.mark.parametrize("accumulated", [False, True])
def test_clipping_is_that_of_the_dense_gradient(norm_type, accumulated):
    found = []
    for grad in ("sparse", "dense"):
        model = model_with(grad)
        for seed in range(1 + accumulated):
            (model(codes(seed=seed))["loss"] * 30).backward()
        clip = clip_grad_norm_ if grad == "sparse" else nn.utils.clip_grad_norm_
        norm = clip(model.parameters(), 0.5, norm_type)
        found.append((norm, [p.grad.to_dense() if p.grad.is_sparse else p.grad for p in model.parameters()]))
    torch.testing.assert_close(found[0], found[1])
    assert found[0][0] > 0.5


def test_clipping_of_nothing_and_errors():
    weight = nn.Parameter(torch.zeros(2, 2))
    assert clip_grad_norm_(weight, 1.0) == 0
    weight.grad = torch.full((2, 2), torch.nan)
    with pytest.raises(RuntimeError, match="non-finite"):
        clip_grad_norm_([weight], 1.0, error_if_nonfinite=True)
    with pytest.raises(ValueError, match="max_norm = -1 is not a number of 0 or more"):
        clip_grad_norm_([weight], -1)


@pytest.mark.parametrize("foreach", [False, True])
def test_torch_clips_sparse_gradients_too(foreach):
    found = []
    for grad in ("sparse", "dense"):
        model = model_with(grad)
        (model(codes())["loss"] * 30).backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.5, foreach=foreach)
        found.append((norm, model.encoder.memory.weight.grad.to_dense()))
    torch.testing.assert_close(found[0], found[1])
    assert found[0][0] > 0.5


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", ["prefix", "suffix"])
def test_the_norm_of_a_spent_gradient(mode, backend):
    """What a trainer logs. A clip is refused, one that would not scale too; an infinite norm is no clip."""
    spec = AddressSpec((30, 30, 30), table_rows=7, heads=2, max_order=2, mode=mode)
    batch = torch.randint(0, 30, (20, 3))
    norms = []
    for grad in ("dense", "fused"):
        torch.manual_seed(0)
        weight = nn.Parameter(torch.randn(spec.total_rows, 3))
        optimizer = optim.SGD([weight], 0.1)
        prefix_memory(batch, weight, spec, grad=grad, backend=backend).sin().sum().backward()
        norms.append(nn.utils.get_total_norm([weight.grad]))
    torch.testing.assert_close(norms[0], torch.tensor(norms[1].item()))
    for foreach in (False, True):
        found = nn.utils.clip_grad_norm_([weight], float("inf"), foreach=foreach)
        torch.testing.assert_close(found.item(), norms[0].item())
        for share in (1e9, 1.1, 0.9):
            with pytest.raises(RuntimeError, match='use grad="sparse"'):
                nn.utils.clip_grad_norm_([weight], share * norms[0].item(), foreach=foreach)
            with pytest.raises(RuntimeError, match='use grad="sparse"'):
                nn.utils.clip_grads_with_norm_([weight], share * norms[0].item(), norms[1], foreach=foreach)
    optimizer.step()


def trainer_of(model, folder, lr=1e-4, **arguments):
    """transformers' Trainer on a CPU, over batches of 8 of 48 SIDs."""
    transformers = pytest.importorskip("transformers")
    settings = transformers.TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=8,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        remove_unused_columns=False,
        **arguments,
    )
    rows = [{"codes": row} for row in codes(48)]
    return transformers.Trainer(model, settings, train_dataset=rows, optimizers=(for_model(model, lr), None))


@pytest.mark.parametrize("grad", ["dense", "sparse", "fused"])
def test_hugging_face_trainer(grad, tmp_path):
    """Trains, saves, stops and goes on to the same weights: what Trainer asks of an optimizer."""
    arguments = {
        "max_steps": 6,
        "save_steps": 3,
        "logging_steps": 2,
        "max_grad_norm": 0 if grad == "fused" else 0.5,
        "gradient_accumulation_steps": 1 if grad == "fused" else 2,
        "lr_scheduler_type": "linear",
    }
    whole = model_with(grad)
    first = trainer_of(whole, tmp_path, 0.01, **arguments)
    first.train()
    losses = [entry["loss"] for entry in first.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    assert first.optimizer.param_groups[0]["lr"] == 0, "the linear schedule has reached the encoder's group"

    resumed = model_with(grad)
    trainer_of(resumed, tmp_path, 0.01, **arguments).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    for name, value in resumed.state_dict().items():
        assert torch.equal(value, whole.state_dict()[name]), name


def test_trainer_clipping_is_refused_by_fused_at_the_first_step(tmp_path):
    """Whatever the norm: Trainer's default of 1 failed at the first large one, perhaps after hours."""
    trainer = trainer_of(model_with("fused"), tmp_path, max_steps=2, max_grad_norm=1e9, save_strategy="no")
    with pytest.raises(RuntimeError, match=r"cannot be clipped.*max_grad_norm=0"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_trainer_accumulation_is_refused_by_fused(tmp_path):
    arguments = {"max_steps": 2, "gradient_accumulation_steps": 2, "max_grad_norm": 0, "save_strategy": "no"}
    trainer = trainer_of(model_with("fused"), tmp_path, **arguments)
    with pytest.raises(RuntimeError, match=r'cannot be accumulated.*use grad="sparse"'):
        trainer.train()


def test_muon_takes_the_inner_matrices():
    transformers = pytest.importorskip("transformers")
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=9, n_embd=8, n_layer=1, n_head=2))
    optimizer = for_model(model, 0.1, muon_lr=0.02, weight_decay=0.5, encoder_needed=False)
    inner = [p for name, p in model.named_parameters() if p.dim() == 2 and ".h." in name]
    muon = optimizer.param_groups[-1]
    assert [id(p) for p in muon["params"]] == [id(p) for p in inner]
    assert (muon["lr"], muon["weight_decay"]) == (0.02, 0.5)
    others = {id(p) for group in optimizer.param_groups[:-1] for p in group["params"]}
    assert others == {id(p) for p in model.parameters()} - {id(p) for p in inner}

    before = [p.detach().clone() for p in inner]
    model(input_ids=torch.tensor([[1, 2, 3]]), labels=torch.tensor([[1, 2, 3]])).loss.backward()
    expected = [torch.nn.Parameter(p.clone()) for p in before]
    for p, own in zip(expected, inner, strict=True):
        p.grad = own.grad.clone()
    torch.optim.Muon(expected, 0.02, 0.5).step()
    optimizer.step()
    assert all(torch.equal(p, own) for p, own in zip(expected, inner, strict=True))


def test_errors_name_the_argument():
    model = model_with("fused")
    for call, error, message in (
        (lambda: for_model(nn.Linear(2, 2)), ValueError, "model, a Linear, holds no PrefixMem"),
        (lambda: for_model(model.parameters()), TypeError, "model is a generator; give a torch module"),
        (lambda: for_model(model, -1.0), ValueError, "lr = -1.0 is not a finite number"),
        (lambda: for_model(model, encoder_lr_multiple="5"), ValueError, "encoder_lr_multiple = '5'"),
        (lambda: for_model(model, rows=torch.optim.SGD), TypeError, "give a class of prefixmem_fast.optim"),
        (lambda: for_model(model.requires_grad_(False)), ValueError, "no parameter that requires a gradient"),
    ):
        with pytest.raises(error, match=message):
            call()


def test_closures():
    weight = nn.Parameter(torch.randn(SPEC.total_rows, 3))
    optimizer = optim.SGD([weight], 0.1)
    before = weight.detach().clone()

    def closure():
        loss = prefix_memory(codes(), weight, SPEC, grad="sparse").square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) > 0
    assert not torch.equal(weight, before)


def trained(model, optimizer, steps=2, seed=0):
    for step in range(steps):
        model(codes(seed=seed + step))["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("grad", ["dense", "sparse", "fused"])
@pytest.mark.parametrize("muon", [False, True])
def test_parameters_added_later_are_trained(grad, muon):
    """Layers that are un-frozen in the middle of a run were never stepped, silently."""
    if muon and not hasattr(torch.optim, "Muon"):
        pytest.skip("torch before 2.9 has no Muon")
    model = model_with(grad)
    model.head.requires_grad_(False)
    optimizer = for_model(model, 0.01, **({"muon_lr": 0.02} if muon else {}))
    trained(model, optimizer)
    model.head.requires_grad_(True)
    before = [p.detach().clone() for p in model.head.parameters()]
    optimizer.add_param_group({"params": model.head.parameters(), "lr": 0.03})
    group = optimizer.param_groups[-1]
    assert (group["lr"], group["betas"]) == (0.03, (0.9, 0.999))
    model(codes())["loss"].backward()
    expected = [nn.Parameter(p.clone()) for p in before]
    for p, own in zip(expected, model.head.parameters(), strict=True):
        p.grad = own.grad.clone()
    torch.optim.AdamW(expected, 0.03, weight_decay=group["weight_decay"]).step()
    optimizer.step()
    assert all(torch.equal(p, own) for p, own in zip(expected, model.head.parameters(), strict=True))

    state = optimizer.state_dict()
    optimizer.load_state_dict(state)
    assert optimizer.param_groups[-1]["lr"] == 0.03
    trained(model, optimizer)
    assert not any(torch.equal(p, own) for p, own in zip(expected, model.head.parameters(), strict=True))


def test_groups_that_cannot_be_added():
    model, other = model_with("fused"), model_with("fused")
    optimizer = for_model(model)
    keep = for_model(other)
    for group, error, message in (
        ({"params": other.encoder.memory.weight}, ValueError, "a table of shape .* trained by rows, and AdamW takes"),
        ({"params": model.head.weight}, ValueError, "appear in more than one parameter group"),
        ([model.head.weight], TypeError, "param_group is a list; give a dict with params"),
    ):
        with pytest.raises(error, match=message):
            optimizer.add_param_group(group)
    trained(model, optimizer)
    trained(other, keep)


def test_a_first_group_beside_a_table():
    """Where there is no AdamW yet, one is made."""
    weight = nn.Parameter(torch.randn(SPEC.total_rows, 3))
    optimizer = optim.ModelOptimizer(optim.SGD([weight], 0.1))
    bias = nn.Parameter(torch.zeros(3))
    optimizer.add_param_group({"params": [bias], "lr": 0.1})
    (prefix_memory(codes(), weight, SPEC, grad="fused").mean((0, 1))[:3] + bias).sum().backward()
    optimizer.step()
    torch.testing.assert_close(bias.detach(), torch.full((3,), -0.1))


def in_a_pickle(pair):
    return pickle.loads(pickle.dumps(pair))


def in_a_file(pair):
    stream = io.BytesIO()
    torch.save(pair, stream)
    stream.seek(0)
    return torch.load(stream, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, in_a_pickle, in_a_file])
@pytest.mark.parametrize("grad", ["dense", "sparse", "fused"])
@pytest.mark.parametrize("started", [False, True])
def test_copies_of_model_and_optimizer_go_on_alike(grad, duplicate, started):
    """Optimizer and model copied together stay bound to each other, and apart from the originals."""
    model = model_with(grad)
    optimizer = for_model(model, 0.01, weight_decay=0.1)
    trained(model, optimizer, steps=2 * started)
    model_copy, optimizer_copy = duplicate((model, optimizer))
    trained(model, optimizer, seed=5)
    trained(model_copy, optimizer_copy, seed=5)
    for name, value in model.state_dict().items():
        assert torch.equal(value, model_copy.state_dict()[name]), name
    trained(model_copy, optimizer_copy, seed=9)
    assert not torch.equal(model.encoder.memory.weight, model_copy.encoder.memory.weight)
    optimizer_copy.param_groups[0]["lr"] = 0.0
    assert optimizer.param_groups[0]["lr"] > 0


def test_a_copy_of_a_released_optimizer_takes_no_table():
    model = model_with("fused")
    optimizer = for_model(model)
    optimizer.release()
    model, optimizer = copy.deepcopy((model, optimizer))
    with pytest.raises(RuntimeError, match="found no optimizer for the table"):
        model(codes())


@pytest.mark.parametrize("grad", ["dense", "sparse"])
@pytest.mark.parametrize("table_rows", [10, 30])
def test_state_of_another_table_is_refused_at_load(grad, table_rows):
    """Of a larger table it was used, of a smaller one it failed at a later step."""

    def model(rows):
        spec = AddressSpec((6, 5, 4), table_rows=rows, heads=2, active_levels=(1, 2))
        one = model_with(grad)
        one.encoder = PrefixMem(PrefixMemConfig(spec, memory_dim=8, hidden_size=6), grad=grad)
        return one

    own, other = model(20), model(table_rows)
    saved = for_model(other)
    trained(other, saved)
    optimizer = for_model(own, 0.01)
    trained(own, optimizer)
    before = copy.deepcopy(optimizer.state_dict())
    rows = own.encoder.memory.weight.shape
    with pytest.raises(ValueError, match=rf"of shape \({rows[0]}, {rows[1]}\) is of another"):
        optimizer.load_state_dict(saved.state_dict())
    torch.testing.assert_close(optimizer.state_dict(), before)


@pytest.mark.parametrize("saved", [optim.SGD, optim.RowWiseAdagrad, optim.RowWiseAdam, optim.LazyAdam])
@pytest.mark.parametrize("loading", [optim.SGD, optim.RowWiseAdagrad, optim.RowWiseAdam, optim.LazyAdam])
@pytest.mark.parametrize("alone", [False, True])
def test_state_of_another_rule_is_refused_at_load(saved, loading, alone):
    models = [model_with("sparse"), model_with("sparse")]
    optimizers = []
    for model, rows in zip(models, (saved, loading), strict=True):
        optimizers.append(rows([model.encoder.memory.weight]) if alone else for_model(model, rows=rows))
        trained(model, optimizers[-1])
    state = optimizers[0].state_dict()
    if saved is loading:
        optimizers[1].load_state_dict(state)
        return
    with pytest.raises(ValueError, match=rf"is of another table, or not of {loading.__name__}: .*; load the state"):
        optimizers[1].load_state_dict(state)
    trained(models[1], optimizers[1])


@pytest.mark.parametrize("rows", [optim.RowWiseAdagrad, optim.LazyAdam])
def test_loaded_state_of_a_bfloat16_table_stays_float32(rows):
    model = model_with("sparse").bfloat16()
    optimizer = for_model(model, rows=rows)
    trained(model, optimizer)
    state = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(state)
    loaded = optimizer.state[model.encoder.memory.weight]
    assert {value.dtype for name, value in loaded.items() if name != "step"} == {torch.float32}
    torch.testing.assert_close(optimizer.state_dict()["state"], state["state"], rtol=0, atol=0)


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("started", [False, True])
@pytest.mark.parametrize("rows", [optim.SGD, optim.RowWiseAdagrad, optim.RowWiseAdam, optim.LazyAdam])
@pytest.mark.parametrize("grad", ["sparse", "fused"])
def test_state_by_parameter_names(grad, rows, started, flat):
    """torch.distributed.checkpoint makes missing state by a step with dense gradients of zero at rates of zero."""
    own, other = model_with(grad), model_with(grad)
    optimizer, fresh = for_model(own, 0.01, rows=rows), for_model(other, 0.01, rows=rows)
    trained(own, optimizer, steps=2 * started)
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    state = copy.deepcopy(get_optimizer_state_dict(own, optimizer, options=options))
    other.load_state_dict(own.state_dict())
    set_optimizer_state_dict(other, fresh, state, options=options)
    torch.testing.assert_close(fresh.state_dict(), optimizer.state_dict(), rtol=0, atol=0)
    for model, one in ((own, optimizer), (other, fresh)):
        trained(model, one, seed=5)
    assert not torch.equal(own.encoder.memory.weight, model_with(grad).encoder.memory.weight)
    for name, value in own.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


@pytest.mark.parametrize(("rate", "value"), [(0.0, 1.0), (0.1, 0.0)])
def test_other_dense_gradients_are_refused(rate, value):
    table = model_with("sparse").encoder.memory.weight
    optimizer = optim.RowWiseAdagrad([table], rate)
    table.grad = torch.full_like(table, value)
    with pytest.raises(TypeError, match="has a dense gradient"):
        optimizer.step()


@pytest.mark.parametrize("other", [torch.optim.Adafactor, torch.optim.SGD, lambda p: torch.optim.Adam(p, amsgrad=True)])
def test_state_of_optimizers_from_elsewhere_is_loaded(other):
    """Adafactor keeps a row and a column of a matrix."""
    model = model_with("sparse")
    table = model.encoder.memory.weight
    rest = [p for p in model.parameters() if p is not table]
    optimizer = optim.ModelOptimizer(optim.RowWiseAdagrad([table], 0.1), other(rest))
    trained(model, optimizer)
    state = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(state)
    torch.testing.assert_close(optimizer.state_dict()["state"], state["state"], rtol=0, atol=0)


def test_rates_out_of_range():
    model = model_with("fused")
    weight = model.encoder.memory.weight
    for call, message in (
        (lambda: for_model(model, muon_lr=-1.0), "muon_lr = -1.0 is not a finite number"),
        (lambda: for_model(model, weight_decay=-1), "weight_decay = -1 is not a finite number"),
        (lambda: optim.SGD([weight], torch.tensor(float("nan"))), "lr = nan is not a finite number"),
        (lambda: optim.SGD([weight], torch.tensor(-1.0)), "lr = -1.0 is not a finite number"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    optim.SGD([weight], torch.tensor(0.1))
