"""Block sizes and warps: what `prefixmem tune` chooses, keeps and prints, and that launches take it."""

import json
import warnings
from unittest import mock

import pytest
import torch

from prefixmem_fast import AddressSpec
from prefixmem_fast._launch import Launch, forget
from prefixmem_fast.checks import tuning
from prefixmem_fast.cli import main
from prefixmem_fast.kernels import settings, tiles
from prefixmem_fast.kernels.settings import DEFAULTS, SETTINGS, Settings, file_of, settings_for, store
from prefixmem_fast.operation.backends import functions_of
from prefixmem_fast.operation.rules import Hyper, RowUpdate

FASTEST = Settings(4096, 8, 2, 1200, 4096, 1, 1536, 2048, 2048)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("PREFIXMEM_TUNE", raising=False)
    tiles._device_of.cache_clear()
    yield tmp_path / "prefixmem_fast" / "tune"
    tiles._device_of.cache_clear()
    forget()


def test_a_default_is_a_candidate():
    assert all(setting.default in setting.candidates for setting in SETTINGS.values())
    assert sum(map(len, tuning.combinations().values())) < 40, "of them are measured in two minutes"
    for grid in tuning.combinations().values():
        assert all(SETTINGS[name].default == value for name, value in grid[0].items())


def test_a_choice_is_of_one_gpu_and_one_release(cache, monkeypatch):
    file = store("NVIDIA H100 80GB/HBM3", FASTEST)
    assert file.parent == cache
    assert [path.name for path in cache.iterdir()] == [file.name]
    assert settings_for("NVIDIA H100 80GB/HBM3") == FASTEST
    assert settings_for("NVIDIA H200") == DEFAULTS
    monkeypatch.setattr(settings, "__version__", "0.0.1")
    assert settings_for("NVIDIA H100 80GB/HBM3") == DEFAULTS


@pytest.mark.parametrize("value", ["off", "OFF"])
def test_the_environment_asks_for_the_defaults(value, monkeypatch):
    store("gpu", FASTEST)
    monkeypatch.setenv("PREFIXMEM_TUNE", value)
    assert settings_for("gpu") == DEFAULTS


def test_without_a_folder_there_is_no_choice(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setattr(settings.Path, "home", mock.Mock(side_effect=RuntimeError("no home")))
    assert settings_for("gpu") == DEFAULTS
    with pytest.raises(ValueError, match="set XDG_CACHE_HOME"):
        store("gpu", FASTEST)


def changed(**values):
    return lambda found: {**found, **values}


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (None, "is not JSON"),
        (lambda found: [], "not for this GPU"),
        (changed(gpu="another"), "not for this GPU"),
        (changed(triton="1.0"), "not for this GPU"),
        (changed(settings=None), "its settings are not forward_bytes"),
        (changed(settings={**FASTEST._asdict(), "more": 1}), "its settings are not forward_bytes"),
        (
            changed(settings={**FASTEST._asdict(), "edge_warps": 3}),
            "its edge_warps = 3 is unknown; allowed are 1, 2, 4",
        ),
        (changed(settings={**FASTEST._asdict(), "edge_warps": True}), "its edge_warps = True is unknown"),
    ],
)
def test_a_file_that_cannot_be_used_is_named_once(change, why):
    file = store("interpreter", FASTEST)
    text = "{" if change is None else json.dumps(change(json.loads(file.read_text())))
    file.write_text(text)
    with pytest.warns(UserWarning, match="is ignored") as told:
        assert tiles.current_device().settings == DEFAULTS
    assert len(told) == 1
    assert str(file) in str(told[0].message)
    assert why in str(told[0].message)
    assert str(told[0].message).endswith("run prefixmem tune again, or delete it")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tiles.current_device().settings == DEFAULTS


def launched_by(call):
    """By kernel, the constants of a call's launches, their options and the first number of their grids."""
    found, launch = {}, Launch.__call__

    def recording(self, grid, *args):
        found[self.kernel.__name__] = (self.constants, self.options["num_warps"], grid[0])
        return launch(self, grid, *args)

    with mock.patch.object(Launch, "__call__", recording):
        call()
    return found


def calls():
    triton, spec = functions_of("triton"), AddressSpec((3,) * 2, heads=1, table_rows=40)
    codes, weight = torch.randint(0, 3, (20, 2)), torch.randn(spec.total_rows, 64)
    dS = torch.randn(20, 2, 64)
    update = RowUpdate(weight, "sgd", [], torch.ones((), dtype=torch.int64), Hyper(0.0, 0.0))
    return {
        "forward": lambda: triton.forward(codes, weight, spec),
        "atomics": lambda: triton.dense_gradient(dS, codes, spec),
        "fixed bits": lambda: triton.dense_gradient(dS, codes, spec, deterministic=True),
        "update": lambda: triton.fused_update(dS, codes, spec, update),
    }


def test_launches_take_the_choice_and_fixed_bits_do_not():
    """Of the interpreter, whose choice is kept as that of a GPU."""
    before = {name: launched_by(call) for name, call in calls().items()}
    store("interpreter", FASTEST)
    assert {name: launched_by(call) for name, call in calls().items()} == before, "it is read once"
    tiles._device_of.cache_clear()
    after = {name: launched_by(call) for name, call in calls().items()}
    assert after["fixed bits"] == before["fixed bits"]
    differ = {kernel for name in after for kernel, how in after[name].items() if how != before[name][kernel]}
    assert differ == {
        "prefix_memory_fwd_kernel",
        "prefix_memory_bwd_kernel",
        "sum_prefixes_kernel",
        "sum_edges_kernel",
    }
    assert after["forward"]["prefix_memory_fwd_kernel"][1] == FASTEST.forward_warps
    assert after["update"]["sum_edges_kernel"][1] == FASTEST.edge_warps
    torch.use_deterministic_algorithms(True)
    try:
        assert {name: launched_by(call) for name, call in calls().items()} == before
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("size", SETTINGS["decode_bytes"].candidates)
def test_windows_of_every_setting(size):
    works = tuning.works_on("cpu", sids=4, sequences=3, table_rows=20, codebook=3)
    with tiles.trying(DEFAULTS._replace(decode_bytes=size)):
        works["decoding"].call()


# The measurement, with a device whose times are known


def works(problem=None):
    """A call for each kernel, which notes the settings that it ran with; `problem` raises or gives what it launched."""
    ran = []

    def call():
        ran.append(tiles.current_device().settings)
        if problem is not None:
            problem(ran[-1])

    resets = []
    return {of: tuning.Work(call, lambda: resets.append(1)) for of in tuning.combinations()}, ran, resets


def times(**seconds):
    """Seconds of a call by the settings in force: 1, but for those named."""

    def seconds_of(work):
        work.reset(), work.call()
        chosen = tiles.current_device().settings._asdict()
        took = 1.0
        for name, by_value in seconds.items():
            took *= by_value.get(chosen[name], 1.0)
        return took

    return seconds_of


def test_the_fastest_is_chosen():
    calls, ran, resets = works()
    clock = times(forward_bytes={16384: 0.5}, forward_warps={8: 0.9}, walk_tiles={2: 0.98}, merge_programs={1536: 2.0})
    *_, (trial, chosen) = tuning.trials(calls, clock, 60)
    assert chosen == DEFAULTS._replace(forward_bytes=16384, forward_warps=8), "less than 3 % is no gain"
    assert trial.of == "decoding"
    assert len(ran) == len(resets), "what a kernel adds to is reset before each call"
    assert tiles.current_device().settings == DEFAULTS
    assert ran[-1].forward_bytes == 16384, "later kernels are measured beside what is chosen"


def test_what_does_not_run_or_spills_is_skipped(monkeypatch):
    def problem(ran):
        if ran.forward_bytes == 16384:
            raise RuntimeError("out of resources: shared memory\nmore")
        if ran.forward_warps == 8:
            kernel = mock.MagicMock(__name__="a_kernel", pre_run_hooks=[])
            kernel.__getitem__.return_value = lambda *args: mock.Mock(n_spills=4)
            Launch(kernel)((1, 1, 1))

    calls, _, _ = works(problem)
    found = [trial for trial, _ in tuning.trials(calls, times(forward_bytes={16384: 0.1}), 60) if trial.note]
    notes = {tuple(trial.values.values()): trial.note for trial in found if trial.of == "forward"}
    assert notes[16384, 4] == "does not run: out of resources: shared memory"
    assert notes[8192, 8] == "spills registers: a_kernel"
    assert all(trial.microseconds is None for trial in found)


def test_no_trial_begins_after_the_time(monkeypatch):
    clock = iter(range(1000))
    monkeypatch.setattr(tuning.time, "monotonic", lambda: next(clock))
    calls, _, _ = works()
    found = list(tuning.trials(calls, times(forward_bytes={16384: 0.5}), 5))
    assert sum(trial.microseconds is not None for trial, _ in found) == 5
    assert found[-1][0].note == "not measured: 5 seconds have passed"


# The command


def test_without_a_gpu_the_defaults_are_printed(capsys, cache):
    assert main(["tune"]) == 0
    first, *lines = capsys.readouterr().out.splitlines()
    assert first.startswith("not measured: ")
    assert [line.split()[:2] for line in lines] == [[name, str(s.default)] for name, s in SETTINGS.items()]
    assert all(line.endswith(setting.reason) for line, setting in zip(lines, SETTINGS.values(), strict=True))
    assert main(["tune", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["settings"] == DEFAULTS._asdict()
    assert not cache.exists()


def test_bad_seconds(capsys):
    assert main(["tune", "--seconds", "0"]) == 2
    assert capsys.readouterr().err == "prefixmem tune: --seconds = 0.0; give more than 0\n"


def test_a_choice_is_kept(capsys, cache, monkeypatch):
    """With a device that is only said to be there."""
    calls, _, _ = works()
    monkeypatch.setattr("prefixmem_fast.cli.tune._no_gpu", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(tuning, "works_on", lambda device: calls)
    monkeypatch.setattr(tuning, "DeviceClock", lambda: times(edge_warps={4: 0.5}))
    assert main(["tune"]) == 0
    out = capsys.readouterr().out
    assert settings_for("a GPU") == DEFAULTS._replace(edge_warps=4)
    assert f"file: {file_of('a GPU')}" in out
    assert "edge_warps           4  measured; default 2" in out
    monkeypatch.setenv("PREFIXMEM_TUNE", "off")
    assert main(["tune", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["not in force"] == "PREFIXMEM_TUNE=off is set"
    assert len(printed["trials"]) == sum(map(len, tuning.combinations().values()))


def test_info_says_what_is_in_force(capsys, monkeypatch):
    from prefixmem_fast.checks import environment

    file = store("a GPU", FASTEST)
    assert environment._settings_of("a GPU") == {"from": str(file), **FASTEST._asdict()}
    assert environment._settings_of("another")["from"] == "defaults"
    monkeypatch.setenv("PREFIXMEM_TUNE", "off")
    assert environment._settings_of("a GPU") == {"from": "PREFIXMEM_TUNE=off", **DEFAULTS._asdict()}
    assert main(["info"]) == 0
    assert "\nsettings          defaults\n" in capsys.readouterr().out


def test_a_folder_that_cannot_be_entered_gives_the_defaults(cache, monkeypatch):
    def refused(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(settings, "read_json", refused)
    with pytest.warns(UserWarning, match="is ignored: .*Permission denied; run prefixmem tune again, or delete it"):
        assert settings.settings_for("some GPU") == settings.DEFAULTS


@pytest.mark.parametrize("name", ["a file", "a folder in the place of the file"])
def test_where_a_choice_cannot_be_kept_is_said_before_anything_is_measured(name, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    if name == "a file":
        (tmp_path / "cache").write_text("")
    else:
        settings.file_of("some GPU").mkdir(parents=True)
    with pytest.raises(ValueError, match="cannot be written; set XDG_CACHE_HOME to a folder that can"):
        settings.check_store("some GPU")


def trial_times(times, chosen=settings.DEFAULTS, seconds=60):
    """What is chosen where the n-th trial takes times[n] (None: it does not run) and all others a second."""
    n = -1

    def call():
        nonlocal n
        n += 1
        if times.get(n, 1.0) is None:
            raise RuntimeError("out of resources")

    works = dict.fromkeys(tuning.combinations(), tuning.Work(call))
    return list(tuning.trials(works, lambda work: times.get(n, 1.0), seconds, chosen))[-1][1]


def test_the_fastest_is_chosen_and_small_gains_are_not():
    first = next(iter(tuning.combinations().values()))
    assert trial_times({}) == settings.DEFAULTS
    assert trial_times({1: 0.98}) == settings.DEFAULTS
    assert trial_times({1: 0.9, 2: 0.8, 3: 0.85}) == settings.DEFAULTS._replace(**first[2])
    assert trial_times({0: None, 3: 0.99}) == settings.DEFAULTS._replace(**first[3]), "the defaults do not run"


def test_what_is_not_measured_keeps_the_earlier_choice():
    earlier = settings.DEFAULTS._replace(edge_warps=4, forward_warps=8)
    assert trial_times({}, earlier, seconds=-1) == earlier
    assert trial_times({}, earlier) == settings.DEFAULTS


@pytest.mark.parametrize(("warps", "registers"), [(1, 255), (8, 255), (16, 128), (32, 64)])
def test_a_program_has_the_registers_of_a_multiprocessor_at_most(warps, registers):
    device = tiles.Device("cuda", 32, DEFAULTS)
    assert tiles.roomy_launch(device, warps)["maxnreg"] == registers
    assert tiles.roomy_launch(device, warps, 64)["maxnreg"] == 64
    assert "maxnreg" not in tiles.roomy_launch(tiles.Device("hip", 64, DEFAULTS), warps)
