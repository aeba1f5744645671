import json
import pkgutil
import platform
from dataclasses import replace

import pytest
import torch

from prefixmem_fast._choices import SHAPES
from prefixmem_fast._environment import TESTED
from prefixmem_fast.checks import cases
from prefixmem_fast.cli import main, verify
from prefixmem_fast.kernels import atomic_backward as backward
from prefixmem_fast.kernels import forward, rows
from prefixmem_fast.operation import cpu


def run_json(capsys, *arguments):
    code = main([*arguments, "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_info(capsys):
    code, facts = run_json(capsys, "info")
    assert code == 0
    assert {"prefixmem_fast", "python", "torch", "triton", "numpy", "transformers", "peft"} < set(facts["versions"])
    assert facts["versions"]["python"] == platform.python_version()
    assert facts["tested"]["transformers"] == list(TESTED["transformers"])
    assert facts["backends"] == {"triton": None, "native": None, "cpu": None, "reference": None}
    main(["info"])
    assert f"tested with {', '.join(TESTED['transformers'])}" in capsys.readouterr().out


def test_info_without_the_optional_packages(capsys, monkeypatch):
    monkeypatch.setattr("prefixmem_fast.checks.environment.installed_version", lambda package: None)
    _, facts = run_json(capsys, "info")
    assert facts["versions"]["triton"] == "not installed"
    assert "peft" not in facts["versions"]


def test_info_says_why_a_backend_is_missing(capsys, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    _, facts = run_json(capsys, "info")
    assert "TRITON_INTERPRET=1" in facts["backends"]["triton"]


@pytest.mark.parametrize("number", [1, pytest.param(6, marks=pytest.mark.slow)])
def test_verify(capsys, number):
    code, report = run_json(capsys, "verify", "--cases", str(number), "--seed", "4")
    assert code == 0
    assert report["cases"] == number
    assert report["comparisons"] > 10 * number
    assert report["mismatches"] == []
    assert report["backends"] == ["reference", "triton", "native", "cpu"]
    assert all(0 <= worst["of_bound"] <= 1 for worst in report["worst"].values())


def test_verify_of_several_batches(capsys):
    code, report = run_json(capsys, "verify", "--cases", "2", "--batches", "3", "--backend", "cpu")
    assert (code, report["cases"], report["batches"], report["mismatches"]) == (0, 2, 6, [])


@pytest.mark.slow
def test_verify_of_shapes(capsys):
    code, report = run_json(
        capsys, "verify", "--shapes", "all", "--batches", "2", "--largest", "31", "--backend", "cpu"
    )
    assert (code, report["cases"], report["batches"], report["mismatches"]) == (0, len(SHAPES), 2 * len(SHAPES), [])
    assert main(["verify", "--shapes", "paper,wide", "--batches", "1", "--largest", "2", "--backend", "cpu"]) == 0
    assert "2 of 2 shapes, 2 batches" in capsys.readouterr().out


def test_batches_of_shapes_are_what_they_are_called():
    generator = torch.Generator().manual_seed(0)
    for name, shape in cases.SHAPES.items():
        spec = shape.spec(64)
        uniform, zipf, same, hot, ended, invalid = (
            cases.kind_of_codes(spec, kind, 200, shape.codes, generator) for kind in cases.KINDS
        )
        sizes = torch.tensor(spec.window_sizes)
        for codes in (uniform, zipf, same, hot):
            assert ((codes >= 0) & (codes < sizes)).all()
        assert (zipf.double() / sizes).mean() < 0.6 * (uniform.double() / sizes).mean()
        assert len(same.unique(dim=0)) == 1
        assert len(hot[::2, :-1].unique(dim=0)) == 1
        assert ((ended >= 0).any(1) & (ended < 0).any(1)).any()
        assert (invalid >= sizes).any() or name == "suffix"
        assert all((codes == codes.to(shape.codes)).all() for codes in (uniform, zipf, ended, invalid))
    assert tuple(cases.SHAPES) == SHAPES


@pytest.mark.parametrize(
    "fault",
    [
        lambda update: replace(update, hyper=update.hyper._replace(lr=update.hyper.lr * 1.5)),
        lambda update: replace(update, seed=None),
        lambda update: replace(update, seed=update.seed + 1),
    ],
    ids=["learning rate", "rounded to nearest", "other bits"],
)
def test_verify_of_shapes_finds_faults_of_an_update(capsys, monkeypatch, fault):
    """Of one backend alone; what it is held against is as it was."""
    fused_update = cpu.fused_update
    monkeypatch.setattr(cpu, "fused_update", lambda *given: fused_update(*given[:-1], fault(given[-1])))
    arguments = ["--shapes", "paper", "--batches", "1", "--largest", "31", "--backend", "cpu"]
    code, report = run_json(capsys, "verify", *arguments)
    assert code == 1
    assert all("cpu SGD fused" in mismatch and "rows" in mismatch for mismatch in report["mismatches"])


@pytest.mark.slow
def test_verify_of_many_cases(capsys):
    """As many as rare combinations need, such as codes of a dtype that cannot count their codebook."""
    code, report = run_json(capsys, "verify", "--cases", "250", "--backend", "cpu")
    assert (code, report["mismatches"]) == (0, [])


def test_verify_is_reproducible(capsys):
    assert run_json(capsys, "verify", "--cases", "3", "--backend", "reference") == run_json(
        capsys, "verify", "--cases", "3", "--backend", "reference"
    )


def _off_by_one(function):
    def wrong(*arguments, **options):
        out = function(*arguments, **options)
        return out + 1e-3 if out.is_floating_point() else out + 1

    return wrong


@pytest.mark.slow
def test_verify_finds_planted_faults(capsys, monkeypatch):
    """In one run, as each is named by itself."""
    faults = {
        "triton sums": (forward, "prefix_memory_fwd"),
        "triton token sums": (forward, "token_memory_fwd"),
        "triton gradient": (backward, "prefix_memory_bwd"),
        "triton rows": (rows, "prefix_rows"),
    }
    for module, function in faults.values():
        monkeypatch.setattr(module, function, _off_by_one(getattr(module, function)))
    code, report = run_json(capsys, "verify", "--cases", "1", "--seed", "3")
    assert code == 1
    for where in faults:
        assert any(mismatch.startswith(where) for mismatch in report["mismatches"]), where


def test_verify_finds_a_fault_of_the_reference(capsys, monkeypatch):
    from prefixmem_fast.operation import reference

    monkeypatch.setattr(reference, "forward", _off_by_one(reference.forward))
    code, report = run_json(capsys, "verify", "--cases", "4", "--backend", "reference")
    assert code == 1
    assert any("against the oracle" in mismatch for mismatch in report["mismatches"])


FAULTS = {
    "rules: the sum in place of the mean": (
        "operation.rules.RULES",
        lambda rules: {**rules, "row_adagrad": rules["row_adagrad"]._replace(update=_of_larger_gradient)},
        "RowWiseAdagrad",
    ),
    "rules: decay": ("operation.rules.decay", lambda decay: lambda w, hyper: w, "rows: outside of what rounding"),
    "rounding": (
        "operation.rules.random_bits",
        lambda bits: lambda *arguments: bits(*arguments) ^ 0xFFFF,
        "torch.bfloat16",
    ),
    "steps": (
        "optim.rows.RowOptimizer.begin",
        lambda begin: lambda self, weight: (begin(self, weight), self.state[weight]["step"].add_(1))[0],
        "steps: not equal",
    ),
    "decoding: beams": (
        "encoder.decoding.DecodingState.reorder",
        lambda reorder: lambda self, beams: reorder(self, beams.flip(0)),
        "decoding step",
    ),
    "decoding: prompt": (
        "encoder.decoding.DecodingState.prefill",
        lambda prefill: lambda self, ids: self.encoder.encode_tokens(ids, self.vocabulary),
        "decoding step",
    ),
    "quantized: scales": (
        "operation.sums.dequantized",
        lambda read: lambda table, rows: read(table._replace(scales=table.scales * (1 + 2**-6)), rows),
        "reference int8 windows",
    ),
    "lags": (
        "encoder.prefixmem.PrefixMem._sum_lags",
        lambda sum_lags: lambda self, S: sum_lags(self, S.flip(-3)),
        "2 lags of all codes",
    ),
    "first codes": (
        "encoder.prefixmem.first_codes",
        lambda first_codes: lambda windows, spec, count: windows,
        "3 lags of 1 codes",
    ),
    "trie": (
        "sid.trie.SIDTrie.is_leaf",
        lambda leaf: lambda self, nodes: leaf(self, nodes + 1),
        "tokens that the items",
    ),
    "search": ("sid.trie.SIDTrie.items_of", lambda items: lambda self, nodes: items(self, nodes.flip(0)), "items of a"),
}


def _of_larger_gradient(w, g, s, hyper):
    from prefixmem_fast.operation.rules import row_adagrad

    return row_adagrad(w, g * g.shape[1] ** 0.5, s, hyper)


@pytest.mark.parametrize("fault", FAULTS)
def test_verify_finds_faults_around_the_operation(capsys, monkeypatch, fault):
    """Of the definitions themselves, which every backend shares with the reference."""
    where, change, message = FAULTS[fault]
    module, _, name = f"prefixmem_fast.{where}".rpartition(".")
    owner = pkgutil.resolve_name(module)
    monkeypatch.setattr(owner, name, change(getattr(owner, name)))
    code, report = run_json(capsys, "verify", "--backend", "reference", "--cases", "16")
    assert code == 1
    assert any(message in mismatch for mismatch in report["mismatches"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["verify", "--cases", "0"], "--cases = 0"),
        (["verify", "--batches", "0"], "--batches = 0"),
        (["verify", "--largest", "31"], "--largest goes with --shapes"),
        (["verify", "--shapes", "round"], "--shapes = 'round' is unknown; allowed are all, or some of paper, float32"),
        (["verify", "--compile"], "unset it"),
        (["verify", "--compile", "--triton", "0.0.1"], "neither a folder with triton in it nor a version"),
        (
            ["verify", "--compile", "--targets", "sm_1"],
            "--targets = 'sm_1' is unknown; allowed are all, or some of sm_80",
        ),
        (["verify", "--compile", "--triton", ""], "--triton = '' names no release; give folders, or versions"),
        (["verify", "--compile", "--launchers", ","], "--launchers = ',' names none; name some of the report's"),
        (["verify", "--compile", "--save", "setup.py"], "--save = 'setup.py' is no folder that can be written"),
        (["verify", "--compile", "--save", "setup.py/x"], "--save = 'setup.py/x' is no folder that can be written"),
        (["verify", "--compile", "--cases", "3"], "--cases does not go with --compile; leave one of them out"),
        (["verify", "--compile", "--seed", "0"], "--seed does not go with --compile"),
        (["verify", "--traffic", "--backend", "auto"], "--backend does not go with --traffic"),
        (["verify", "--traffic", "--seconds", "3"], "--seconds does not go with --traffic"),
        (["verify", "--cases", "3", "--shapes", "all"], "--cases does not go with --shapes"),
        (["verify", "--shapes", "all", "--largest", "65537"], "--largest = 65537; give 65536 or less"),
        (["verify", "--launchers", "sgd_bwd"], "--launchers goes with --compile"),
        (["verify", "--save", "."], "--save goes with --compile"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(capsys, arguments, message):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_verify_on_a_backend_that_cannot_run(capsys, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(["verify", "--backend", "triton"]) == 2
    assert "TRITON_INTERPRET=1" in capsys.readouterr().err
    assert main(["verify", "--cases", "1"]) == 0
    assert "triton not checked" in capsys.readouterr().out


def test_unknown_command():
    with pytest.raises(SystemExit) as stop:
        main(["fly"])
    assert stop.value.code == 2


def test_verify_stops_after_its_seconds(capsys):
    code, report = run_json(capsys, "verify", "--backend", "cpu", "--cases", "50", "--seconds", "0.001")
    assert code == 0
    assert report["cases"] == 1
    assert main(["verify", "--seconds", "0"]) == 2
    assert "--seconds = 0.0; give more than 0" in capsys.readouterr().err
    arguments = ["--backend", "reference", "--cases", "2", "--batches", "1000", "--seconds", "0.001"]
    _, report = run_json(capsys, "verify", *arguments)
    assert (report["cases"], report["batches"]) == (1, 1)


def test_the_largest_batch_of_a_shape():
    assert max(cases.BATCH_SIZES) == verify._LARGEST


def test_bench_is_the_benchmark_suite(capsys, monkeypatch):
    assert main(["bench", "scale", "--items", "1e6", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["items"] == 1e6
    assert main(["bench", "run", "nothing"]) == 2
    assert capsys.readouterr().err.startswith("prefixmem bench: no benchmark is named 'nothing'")

    def absent(name):
        raise ModuleNotFoundError(name)

    monkeypatch.setattr("prefixmem_fast.cli.bench.importlib.import_module", absent)
    assert main(["bench", "list"]) == 2
    assert "pip install -e ." in capsys.readouterr().err
