"""A stand-in for the GPU: every high-level path once with the kernels, in the interpreter, against the reference.

"auto" is told that it is on a GPU, so what runs is what a user's GPU would run; which backend ran is asserted.
"""

import copy
import json

import pytest
import torch
from transformers import Trainer, TrainingArguments

from prefixmem_fast import DecodingState, PrefixMem, attach, generate_items, optim
from prefixmem_fast.cli import main
from prefixmem_fast.operation import backends
from tests.helpers.cases import slow
from tests.helpers.models import SIZES, encoder, prompts, tiny_model, vocabulary
from tests.helpers.runs import TINY, write_files

READS = {
    "dense": {"forward", "dense_gradient"},
    "sparse": {"forward", "row_sums", "sparse_update"},
    "fused": {"forward", "fused_update"},
}


@pytest.fixture
def on_both(monkeypatch, backend_calls):
    """Runs a path with the kernels and with the reference as the default, and says that nothing else ran."""

    def run(path, functions):
        results = {}
        for backend in ("triton", "reference"):
            monkeypatch.setattr(backends, "_default_backend", lambda device, backend=backend: backend)
            backend_calls.clear()
            torch.manual_seed(0)
            results[backend] = path()
            assert {ran for ran, _ in backend_calls} == {backend}
            assert {function for _, function in backend_calls} == functions
        return results["triton"], results["reference"]

    return run


def assert_close(kernels, reference):
    torch.testing.assert_close(kernels, reference, rtol=1e-4, atol=1e-5)


def codes(count=6):
    return torch.stack([torch.randint(0, size, (count,)) for size in SIZES], 1)


@pytest.mark.parametrize("grad", ["dense", "sparse", "fused"])
def test_encoder_trained_alone(grad, on_both):
    """for_model over codes and over tokens; accumulation and clipping where the mode has them."""

    def path():
        model = torch.nn.Sequential(encoder(grad=grad), torch.nn.Linear(32, 4))
        optimizer = optim.for_model(model, lr=1e-2, row_options={} if grad != "dense" else None)
        norms = []
        for _ in range(2):
            for _ in range(1 if grad == "fused" else 2):
                model(codes()).square().mean().backward()
            if grad != "fused":
                norms.append(optim.clip_grad_norm_(model.parameters(), 0.01))
                norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.005))
            optimizer.step()
            optimizer.zero_grad()
        m = model[0].encode_tokens(prompts()["input_ids"], vocabulary())
        m.square().mean().backward()
        optimizer.step()
        return [m.detach(), *norms, *(parameter.detach() for parameter in model.parameters())]

    assert_close(*on_both(path, READS[grad]))


@pytest.mark.parametrize("rule", ["SGD", "RowWiseAdagrad", "RowWiseAdam", "LazyAdam"])
def test_every_rule_steps_over_a_sparse_gradient(rule, on_both):
    def path():
        one = encoder(grad="sparse")
        optimizer = getattr(optim, rule)([one.memory.weight], lr=0.1)
        for _ in range(2):
            one(codes()).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        return one.memory.weight.detach()

    assert_close(*on_both(path, READS["sparse"]))


def test_attached_model(on_both):
    """Logits, the gradient of the loss, and generation with a cache."""

    def path():
        model = attach(tiny_model(), encoder(), vocabulary())
        inputs = prompts()
        output = model(**inputs, labels=inputs["input_ids"])
        output.loss.backward()
        tokens = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        gradients = [parameter.grad for parameter in model.prefixmem.parameters()]
        return [output.logits.detach(), *gradients, tokens]

    kernels, reference = on_both(path, READS["dense"] | {"read_windows"})
    assert_close(kernels[:-1], reference[:-1])
    assert torch.equal(kernels[-1], reference[-1])


def test_items_are_generated(on_both):
    from prefixmem_fast import Catalogue, SIDTrie

    items = [(1, 3, 4), (0, 1, 5), (3, 3, 3), (1, 0, 1)]
    catalogue = Catalogue([str(item) for item in items], torch.tensor(items), SIZES)

    def path():
        model = attach(tiny_model(), encoder(), vocabulary())
        return generate_items(model, SIDTrie(catalogue, vocabulary()), prompts(), num_beams=2)

    kernels, reference = on_both(path, {"forward", "read_windows"})
    assert kernels.items == reference.items
    assert_close(kernels.scores, reference.scores)


def test_one_token_at_a_time(on_both):
    def path():
        state = DecodingState(encoder(), vocabulary(), batch=4)
        ids = prompts()["input_ids"]
        m = [state.prefill(ids[:, :6])[:, -1], *(state.step(tokens) for tokens in ids[:, 6:].unbind(1))]
        state.reorder(torch.tensor([3, 0, 0, 1]))
        return torch.stack([*m, state.step(ids[:, 0])]).detach()

    kernels, reference = on_both(path, {"forward", "read_windows"})
    assert torch.equal(kernels, reference)


@pytest.mark.parametrize("grad", ["dense", "sparse", "fused"])
def test_hugging_face_trainer(grad, on_both, tmp_path):
    """Accumulation and clipping where the mode has them; a checkpoint is resumed."""

    def path():
        def trainer(model, steps):
            arguments = TrainingArguments(
                str(tmp_path / grad),
                per_device_train_batch_size=2,
                max_steps=steps,
                save_steps=1,
                logging_steps=1,
                report_to=[],
                use_cpu=True,
                disable_tqdm=True,
                seed=1,
                lr_scheduler_type="constant",
                max_grad_norm=0.0 if grad == "fused" else 0.1,
                gradient_accumulation_steps=1 if grad == "fused" else 2,
            )
            rows = [{"input_ids": row, "labels": row} for row in prompts()["input_ids"]]
            return Trainer(model, arguments, train_dataset=rows, optimizers=(optim.for_model(model, lr=1e-2), None))

        model = attach(tiny_model(), encoder(grad=grad), vocabulary())
        trainer(model, 1).train()
        resumed = attach(tiny_model(), encoder(grad=grad), vocabulary())
        trainer(resumed, 2).train(resume_from_checkpoint=str(tmp_path / grad / "checkpoint-1"))
        return [parameter.detach() for parameter in resumed.prefixmem.parameters()]

    assert_close(*on_both(path, READS[grad]))


def test_folders_and_copies(on_both, tmp_path):
    """What was read from a folder, and a deep copy, compute as what they were made from."""

    def path():
        one = encoder(grad="sparse")
        one.save_pretrained(tmp_path / "encoder", vocabulary())
        again = PrefixMem.from_pretrained(tmp_path / "encoder", grad="sparse")
        given = codes()
        assert torch.equal(again(given), one(given))
        assert torch.equal(copy.deepcopy(again)(given), one(given))
        return one(given).detach()

    assert_close(*on_both(path, {"forward"}))


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_quantized_for_serving(kind, on_both, tmp_path):
    """Quantized, saved and read; over codes, tokens and steps."""

    def path():
        encoder().quantize(kind).save_pretrained(tmp_path / kind)
        one = PrefixMem.from_pretrained(tmp_path / kind)
        state = DecodingState(one, vocabulary(), 2)
        prompt = prompts()["input_ids"][:2]
        return [
            one(codes()),
            one.encode_tokens(prompt, vocabulary()),
            state.prefill(prompt),
            state.step(prompt[:, 0]),
        ]

    functions = {"quantized_forward", "read_windows"}
    assert_close(*on_both(path, functions))


@pytest.mark.parametrize("grad", ["sparse", slow("fused"), slow("dense")])
def test_command_line(grad, on_both, tmp_path, capsys):
    """pretrain, train from it, resume and evaluate, at the defaults of the command line where "sparse" is one."""
    files = write_files(tmp_path)
    flags = [
        "--items",
        files["items"],
        "--interactions",
        *files["interactions"],
        "--steps",
        "2",
        "--batch-size",
        "2",
        "--log-every",
        "1",
        "--eval-every",
        "2",
        "--warmup-steps",
        "1",
        "--table-rows",
        "50",
        "--memory-dim",
        "8",
        "--heads",
        "2",
        "--max-items",
        "3",
        "--eval-users",
        "4",
    ]
    model = ["--model-options", json.dumps(TINY)]
    mode = {"sparse": [], "dense": ["--grad", "dense"], "fused": ["--grad", "fused", "--max-grad-norm", "0"]}[grad]
    folders = iter(("triton", "reference"))

    def path():
        folder = tmp_path / next(folders)
        commands = (
            ["pretrain", "--method", "classification", *flags, *mode, "--out", folder / "first"],
            ["train", *flags, *model, *mode, "--encoder", folder / "first" / "encoder", "--out", folder / "second"],
            ["train", "--resume", "--out", folder / "second"],
            ["evaluate", "--run", folder / "second", "--beams", "3", "--examples", "3"],
        )
        printed = []
        for command in commands:
            code = main([str(argument) for argument in [*command, "--json"]])
            output = capsys.readouterr()
            assert code == 0, output.err
            printed.append(json.loads(output.out))
        tables = PrefixMem.from_pretrained(folder / "second" / "model").memory.weight.detach()
        return tables, printed[1]["validation"][-1]["loss"]

    kernels, reference = on_both(path, READS[grad] | {"read_windows"})
    assert_close(kernels[0], reference[0])
    assert kernels[1] == pytest.approx(reference[1], rel=1e-4)
