"""The exported encoder is the encoder: as a module, and in every runtime that it is exported to."""

import io
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prefixmem_fast import PrefixMem, PrefixMemConfig, SIDVocabulary
from prefixmem_fast.operation.quantization import _E4M3
from prefixmem_fast.serving import exportable
from tests.helpers.cases import slow, token_case
from tests.helpers.examples import sid_transformer
from tests.helpers.models import TOKENS, cross_item_encoder, lagged_encoder, vocabulary
from tests.helpers.models import encoder as made_encoder
from tests.helpers.strategies import specs

ROOT = Path(__file__).parents[2]
SHAPES = [(0, 5), (2, 0), (1, 1), (3, 2), (2, 17)]  # rows shorter than a SID, and none


@torch.no_grad()
def with_exact_sums(encoder):
    """The encoder with numbers whose sums are exact in any order, so that no runtime needs a tolerance.

    Rows are small integers, and W_out picks columns of S and multiplies them by powers of two.
    """
    for one in (module for module in encoder.modules() if isinstance(module, PrefixMem)):
        one.memory.weight.copy_(torch.randint(-8, 9, one.memory.weight.shape))
        for projection in filter(None, (one.out_proj, one.head_proj)):
            weight = projection.weight.zero_()
            columns = torch.randint(weight.shape[1], (len(weight),))
            weight[torch.arange(len(weight)), columns] = torch.exp2(torch.randint(-2, 3, (len(weight),))).to(
                weight.dtype
            )
    return encoder


def quantized(encoder, kind):
    """Its sums are rounded, in an order that is part of its definition; two lags are one sum."""
    return with_exact_sums(encoder).quantize(kind)


KINDS = {
    "prefix": lambda: with_exact_sums(made_encoder(backend="cpu")),
    "prefix, hashed": lambda: with_exact_sums(made_encoder(spec={"addressing": "hash"}, backend="cpu")),
    "suffix": lambda: with_exact_sums(made_encoder(spec={"mode": "suffix", "active_levels": (1, 3)}, backend="cpu")),
    "full": lambda: with_exact_sums(made_encoder(spec={"mode": "full", "active_levels": (2,)}, backend="cpu")),
    "cross-item": lambda: with_exact_sums(cross_item_encoder(backend="cpu")),
    "one item back": lambda: with_exact_sums(cross_item_encoder(history=1, backend="cpu")),
    "lagged": lambda: with_exact_sums(lagged_encoder(backend="cpu")),
    "int8": lambda: quantized(made_encoder(backend="cpu"), "int8"),
    "fp8": lambda: quantized(made_encoder(backend="cpu"), "fp8"),
    "lagged, fp8": lambda: quantized(lagged_encoder(lags=2, backend="cpu"), "fp8"),
    "bfloat16": lambda: with_exact_sums(made_encoder(backend="cpu").bfloat16()),
    "float16": lambda: with_exact_sums(made_encoder(backend="cpu").half()),
    "float64": lambda: with_exact_sums(made_encoder(backend="cpu").double()),
}


def known():
    """The vocabulary of the examples; the token 3 has a code that is out of range, as no vocabulary should."""
    made = vocabulary()
    made.table[3] = torch.tensor((2, 99), dtype=torch.int32)
    return made


def token_rows(shape, seed=0):
    """Whole and cut SIDs, text, and ids outside the vocabulary."""
    generator = np.random.default_rng((*shape, seed))
    codes = torch.from_numpy(generator.choice((0, 1, 3), (shape[0], shape[1] // 3 + 2, 3)))
    rows = vocabulary().encode(codes).flatten(1)[:, 1 : shape[1] + 1]
    noise = torch.from_numpy(generator.choice((-1, -(2**40), 2**40, TOKENS, 3, 5), shape))
    return torch.where(torch.from_numpy(generator.random(shape) < 0.15), noise, rows)


def windows_of(input_ids, encoder):
    """The last tokens up to each token ``[B, T]``: ``[B * T, W]``."""
    before = encoder.config.lookback
    places = torch.arange(input_ids.shape[1])[:, None] + torch.arange(before + 1)
    return torch.nn.functional.pad(input_ids, (before, 0), value=-1)[:, places].flatten(0, 1)


def expected(encoder, input_ids, segment_ids=None, vocabulary=None):
    encoded = encoder.encode_stream(input_ids, known() if vocabulary is None else vocabulary, segment_ids)
    return [part for part in encoded if part is not None]


def assert_equal(found, encoded):
    found = [found] if isinstance(found, torch.Tensor) else list(found)
    assert [part.shape for part in found] == [part.shape for part in encoded]
    for part, other in zip(found, encoded, strict=True):
        assert part.dtype == other.dtype
        assert torch.equal(part, other)


def inputs_of(shape, segments, seed=0):
    segment_ids = torch.from_numpy(np.random.default_rng(seed).integers(0, 2, shape)).cumsum(1) // 4
    return (token_rows(shape, seed), segment_ids) if segments else (token_rows(shape, seed),)


def exported(module, example, strict=False):
    batch, length = torch.export.Dim("batch", min=0), torch.export.Dim("length", min=0)
    dynamic = tuple({0: batch} if module.window else {0: batch, 1: length} for _ in example)
    with torch.no_grad():
        return torch.export.export(module, example, dynamic_shapes=dynamic, strict=strict)


# The module


@st.composite
def encoders(draw):
    spec = draw(specs())
    lags, codes = 1, None
    if spec.history:
        lags = draw(st.integers(1, 2))
        codes = draw(st.sampled_from((None, *range(1, spec.item_levels))))
    config = PrefixMemConfig(spec, 2 * spec.heads, 5, lags=lags, earlier_codes=codes, output_slot=draw(st.booleans()))
    encoder = with_exact_sums(PrefixMem(config, backend="cpu"))
    kind = draw(st.sampled_from((None, "int8", "fp8")))
    return encoder if kind is None else encoder.quantize(kind)


@settings(max_examples=150)
@given(encoders(), st.data())
def test_the_module_is_the_encoder(encoder, data):
    """Of rows and of windows, with every kind of table."""
    spec = encoder.config.spec
    shape = data.draw(st.tuples(st.integers(0, 3), st.sampled_from((0, 1, 4, 13))))
    input_ids, table = token_case(spec, shape, data.draw(st.integers(0, 99)))
    table[::5, 1] += data.draw(st.sampled_from((0, 0, 70_000, -70_000)))  # codes out of range
    known = SIDVocabulary({}, spec.codebook_sizes)
    known.table = table
    segment_ids = data.draw(st.sampled_from((None, torch.arange(shape[1]).expand(shape) // 5)))
    found = exportable(encoder, known)(input_ids, segment_ids)
    assert_equal(found, expected(encoder, input_ids, segment_ids, known))
    steps = exportable(encoder, known, window=True)(windows_of(input_ids, encoder))
    assert_equal(steps, [part.flatten(0, 1) for part in expected(encoder, input_ids, None, known)])


@pytest.mark.parametrize("window", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_over_long_rows(kind, window):
    encoder = KINDS[kind]()
    module = exportable(encoder, known(), window=window)
    check(encoder, module, window, False, [*SHAPES, (4, 60)])
    if not window:
        check(encoder, module, window, True, [(4, 60)])


def test_numbers_of_eight_bits():
    bits = torch.arange(256, dtype=torch.uint8)
    numbers = bits.view(torch.float8_e4m3fn).float()
    are_numbers = ~numbers.isnan()
    assert are_numbers.sum() == 254
    found = torch.tensor(_E4M3)
    assert torch.equal(found[are_numbers], numbers[are_numbers])
    assert torch.equal(found[are_numbers].signbit(), numbers[are_numbers].signbit())


@pytest.mark.parametrize("kind", ["lagged", "lagged, fp8"])
def test_numbers_are_shared_with_the_encoder(kind):
    encoder = KINDS[kind]()
    module = exportable(encoder, known())
    own = {tensor.untyped_storage().data_ptr() for tensor in (*encoder.parameters(), *encoder.buffers())}
    assert {tensor.untyped_storage().data_ptr() for tensor in module.parameters()} <= own
    tables = [tensor for name, tensor in module.named_buffers() if name != "token_table"]
    assert {tensor.untyped_storage().data_ptr() for tensor in tables} <= own
    numbers = {id(p) for p in encoder.parameters()}
    assert {id(p) for p in module.parameters()} == numbers


def test_what_cannot_be_exported_is_refused(tmp_path):
    encoder, known = made_encoder(), vocabulary()
    for call, error, message in (
        (lambda: exportable(sid_transformer(), known), TypeError, "encoder is a SIDTransformer; give a PrefixMem"),
        (lambda: exportable(encoder, {}), TypeError, "vocabulary is a dict; give a SIDVocabulary"),
        (lambda: exportable(encoder, known, window=8), TypeError, "window"),
        (lambda: exportable(encoder, SIDVocabulary.from_table({}, (4, 5))), ValueError, "codebook_sizes"),
        (lambda: exportable(made_encoder(tables="host"), known), ValueError, 'tables = "host", and an exported'),
        (lambda: exportable(cross_item_encoder(dropout=0.5), known), ValueError, "dropout = 0.5.*encoder.eval"),
        (lambda: exportable(made_encoder(device="meta"), known), ValueError, "the table is on the meta device"),
        (lambda: exportable(encoder, known)(torch.ones(2, 3)), TypeError, "input_ids has dtype torch.float32"),
        (
            lambda: exportable(encoder, known, window=True)(torch.ones((2, 4), dtype=torch.int64)),
            ValueError,
            r"input_ids has shape \(2, 4\); give \[n, 3\]",
        ),
    ):
        with pytest.raises(error, match=message):
            call()
    exportable(cross_item_encoder(dropout=0.5).eval(), known)
    encoder.save_pretrained(tmp_path)
    mapped = PrefixMem.from_pretrained(tmp_path, tables="mapped")
    with pytest.raises(ValueError, match='tables = "mapped"'):
        exportable(mapped, known)
    encoder.memory.division = object()
    with pytest.raises(ValueError, match="exportable needs whole tables"):
        exportable(encoder, known)


# torch.export


FAST = [("suffix", True, False, True)]


def torch_export_cases():
    rest = [(kind, window, not window, False) for kind in KINDS for window in (False, True)]
    rest += [(kind, False, False, True) for kind in KINDS]
    return FAST + [slow(*case) for case in rest if case not in FAST]


@pytest.mark.parametrize(("kind", "window", "segments", "strict"), torch_export_cases())
def test_torch_export(kind, window, segments, strict):
    """For any batch and any length, in operators of PyTorch alone, also after it was saved."""
    encoder = KINDS[kind]()
    module = exportable(encoder, known(), window=window)
    example = inputs_of((3, 9), segments)
    program = exported(module, (windows_of(*example, encoder),) if window else example, strict)
    targets = {node.target for node in program.graph.nodes if node.op == "call_function"}
    assert {target.namespace for target in targets if isinstance(target, torch._ops.OpOverload)} == {"aten"}
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    check(encoder, torch.export.load(file).module(), window, segments)


def check(encoder, run, window, segments, shapes=SHAPES):
    """What a runtime returns, against the encoder."""
    for shape in shapes:
        inputs = inputs_of(shape, segments, seed=1)
        with torch.no_grad():
            encoded = expected(encoder, *inputs)
            if window:
                assert_equal(run(windows_of(*inputs, encoder)), [part.flatten(0, 1) for part in encoded])
            else:
                assert_equal(run(*inputs), encoded)
    assert any(part.count_nonzero() for part in encoded)


# AOTInductor, from Python and from C++

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")


def packaged(module, example, folder):
    program = exported(module, example)
    return torch._inductor.aoti_compile_and_package(program, package_path=str(folder / "encoder.pt2"))


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "window"), [("suffix", False), ("one item back", True), ("lagged", False), ("fp8", True)]
)
def test_aot_inductor(kind, window, tmp_path):
    encoder, segments = KINDS[kind](), not window
    example = inputs_of((3, 9), segments)
    module = exportable(encoder, known(), window=window)
    package = packaged(module, (windows_of(*example, encoder),) if window else example, tmp_path)
    check(encoder, torch._inductor.aoti_load_package(package), window, segments)


def document():
    """The text that says how the example is built."""
    texts = [file.read_text() for file in sorted((ROOT / "docs").glob("*.md"))]
    (text,) = (text for text in texts if "run_exported.cpp -o" in text)
    return text


def documented_commands():
    """Those that build the example, and the one that runs it."""
    lines = re.findall(r"^    (.*)$", document(), flags=re.MULTILINE)
    (first,) = (i for i, line in enumerate(lines) if line.startswith("TORCH="))
    (last,) = (i for i, line in enumerate(lines) if "./run_exported" in line)
    return "\n".join(lines[first:last]), lines[last]


def in_a_shell(commands, folder):
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)}
    command = ["bash", "-ec", commands]
    return subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True, text=True).stdout


@pytest.fixture(scope="module")
def run_exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run_exported")
    in_a_shell(documented_commands()[0], folder)
    return folder / "run_exported"


@needs_compiler
@pytest.mark.slow
@pytest.mark.usefixtures("temporary_folder")
def test_what_the_documents_say_of_cpp(run_exported):
    """Its lines of Python, and the command that runs the example."""
    scope: dict = {}
    section = document().partition("## Export")[2]
    exec("".join(re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)), scope)
    lines = re.findall(r"^    ((?:package|m) = .*)$", section, flags=re.MULTILINE)
    assert len(lines) == 2
    exec("\n".join(lines), scope)
    encoder, known, input_ids = scope["encoder"], scope["vocabulary"], scope["input_ids"]
    torch.testing.assert_close(scope["m"], encoder.encode_tokens(input_ids, known))
    torch.testing.assert_close(torch.from_numpy(scope["m_onnx"]), scope["m"])
    shutil.copy(run_exported, scope["folder"])
    printed = in_a_shell(documented_commands()[1], scope["folder"])
    tokens = torch.tensor([[7, 1001, 1300, 1514, 1770, 9]])
    found = torch.tensor([[[float(number) for number in line.split()] for line in printed.splitlines()]])
    torch.testing.assert_close(found, encoder.encode_tokens(tokens, known))
    assert found.count_nonzero()


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["suffix", "lagged", "fp8"])
def test_cpp_without_python(kind, run_exported, tmp_path):
    encoder = KINDS[kind]()
    package = packaged(exportable(encoder, known()), inputs_of((3, 9), False), tmp_path)
    with zipfile.ZipFile(package) as archive:
        archive.extractall(tmp_path)
    for library in (run_exported, *tmp_path.rglob("*.so")):
        needed = subprocess.run(["ldd", library], capture_output=True, text=True, check=True).stdout
        names = {line.split()[0] for line in needed.splitlines()}
        assert "libtorch_cpu.so" in names
        assert not [name for name in names if "python" in name]
    for shape in ((0, 0), (1, 1), (3, 2), (2, 17)):
        input_ids = token_rows(shape, seed=1)
        given = "".join(" ".join(map(str, row)) + "\n" for row in input_ids.tolist())
        command = [run_exported, package]
        printed = subprocess.run(command, input=given, env={}, capture_output=True, text=True, check=True, timeout=300)
        lines = [[np.float32(number) for number in line.split()] for line in printed.stdout.splitlines()]
        m = expected(encoder, input_ids)[0]
        assert_equal(torch.from_numpy(np.array(lines, np.float32).reshape(m.shape)), [m])
    assert m.count_nonzero()


@needs_compiler
@pytest.mark.slow
def test_the_cpp_example_fills_rows_up_and_says_how_it_is_called(run_exported, tmp_path):
    encoder = KINDS["prefix"]()
    package = packaged(exportable(encoder, known()), inputs_of((3, 9), False), tmp_path)
    rows = token_rows((2, 6))
    rows[0, 4:] = -1
    lines = [" ".join(map(str, rows[0, :4].tolist())), " ".join(map(str, rows[1].tolist()))]
    outputs = [
        subprocess.run([run_exported, package], input=given, capture_output=True, text=True, check=True).stdout
        for given in ("\n".join(lines), "\n".join(" ".join(map(str, row)) for row in rows.tolist()))
    ]
    assert outputs[0] == outputs[1]
    assert len(outputs[0].splitlines()) == 12
    failed = subprocess.run([run_exported], capture_output=True, text=True, check=False)
    assert (failed.returncode, failed.stderr) == (2, "usage: run_exported encoder.pt2 < tokens\n")


# ONNX


def onnx_session(module, example, folder):
    import onnxruntime

    batch, length = torch.export.Dim("batch", min=0), torch.export.Dim("length", min=0)
    dynamic = tuple({0: batch} if module.window else {0: batch, 1: length} for _ in example)
    with torch.no_grad():
        program = torch.onnx.export(module, example, dynamo=True, dynamic_shapes=dynamic, verbose=False)
    program.save(folder / "encoder.onnx", external_data=True)
    assert (folder / "encoder.onnx.data").exists()
    return onnxruntime.InferenceSession(folder / "encoder.onnx", providers=["CPUExecutionProvider"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "window"), [(kind, i % 2 == 1) for i, kind in enumerate(kind for kind in KINDS if kind != "bfloat16")]
)
def test_onnx(kind, window, tmp_path):
    encoder, segments = KINDS[kind](), not window
    example = inputs_of((3, 9), segments)
    module = exportable(encoder, known(), window=window)
    session = onnx_session(module, (windows_of(*example, encoder),) if window else example, tmp_path)
    names = [given.name for given in session.get_inputs()]
    assert names == ["input_ids", "segment_ids"][: 1 + segments]

    def run(*inputs):
        feed = {name: tensor.numpy() for name, tensor in zip(names, inputs, strict=True)}
        return [torch.from_numpy(found) for found in session.run(None, feed)]

    check(encoder, run, window, segments)


@pytest.mark.slow
def test_onnxruntime_multiplies_no_bfloat16_on_a_cpu(tmp_path):
    """As the documents say; with its copy in float32 it runs."""
    import copy

    encoder = KINDS["bfloat16"]()
    example = inputs_of((3, 9), False)
    with pytest.raises(Exception, match="NOT_IMPLEMENTED"):
        onnx_session(exportable(encoder, known()), example, tmp_path)
    session = onnx_session(exportable(copy.deepcopy(encoder).float(), known()), example, tmp_path)
    (m,) = session.run(None, {"input_ids": example[0].numpy()})
    assert torch.equal(torch.from_numpy(m), expected(encoder, *example)[0].float())
