"""One optimizer for a whole model, clipping over sparse and dense gradients, and Hugging Face's Trainer."""

import io

import pytest
import torch
from torch import nn

from prefixmem_fast import AddressSpec, PrefixMem, PrefixMemConfig, optim, prefix_memory
from prefixmem_fast.optim import clip_grad_norm_, for_model

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


@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
@pytest.mark.parametrize("mode", ["prefix", "suffix"])
def test_the_norm_of_a_spent_gradient(mode, backend):
    """What a trainer logs; and a clip that would scale is refused, one that would not is not."""
    spec = AddressSpec((30, 30, 30), table_rows=7, heads=2, max_order=2, mode=mode)
    batch = torch.randint(0, 30, (20, 3))
    norms = []
    for grad in ("dense", "fused"):
        torch.manual_seed(0)
        weight = nn.Parameter(torch.randn(spec.total_rows, 3))
        optimizer = optim.SGD([weight], 0.1)
        prefix_memory(batch, weight, spec, grad=grad, backend=backend).sin().sum().backward()
        norms.append(nn.utils.get_total_norm([weight.grad]))
    torch.testing.assert_close(*norms)
    for foreach in (False, True):
        torch.testing.assert_close(nn.utils.clip_grad_norm_([weight], float("inf"), foreach=foreach), norms[0])
        nn.utils.clip_grad_norm_([weight], 1.1 * norms[0].item(), foreach=foreach)
        with pytest.raises(RuntimeError, match='use grad="sparse"'):
            nn.utils.clip_grad_norm_([weight], 0.9 * norms[0].item(), foreach=foreach)
    optimizer.step()


@pytest.mark.parametrize("grad", ["dense", "sparse", "fused"])
def test_hugging_face_trainer(grad, tmp_path):
    """Trains, saves, stops and goes on to the same weights: what Trainer asks of an optimizer."""
    transformers = pytest.importorskip("transformers")
    rows = [{"codes": row} for row in codes(48)]

    def trainer(model, steps):
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=steps,
            per_device_train_batch_size=8,
            save_steps=3,
            logging_steps=2,
            max_grad_norm=0 if grad == "fused" else 0.5,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            remove_unused_columns=False,
            gradient_accumulation_steps=1 if grad == "fused" else 2,
            lr_scheduler_type="linear",
        )
        return transformers.Trainer(model, arguments, train_dataset=rows, optimizers=(for_model(model, 0.01), None))

    whole = model_with(grad)
    first = trainer(whole, 6)
    first.train()
    losses = [entry["loss"] for entry in first.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    assert first.optimizer.param_groups[0]["lr"] == 0, "the linear schedule has reached the encoder's group"

    resumed = model_with(grad)
    trainer(resumed, 6).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    for name, value in resumed.state_dict().items():
        assert torch.equal(value, whole.state_dict()[name]), name


def test_trainer_accumulation_is_refused_by_fused(tmp_path):
    transformers = pytest.importorskip("transformers")
    model = model_with("fused")
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        max_grad_norm=0,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        remove_unused_columns=False,
        save_strategy="no",
    )
    rows = [{"codes": row} for row in codes(48)]
    trainer = transformers.Trainer(model, arguments, train_dataset=rows, optimizers=(for_model(model), None))
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
