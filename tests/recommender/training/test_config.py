"""Options from flags and files, their checks, and that what is written is read again."""

import argparse
import dataclasses
import json

import pytest
import yaml

from prefixmem_fast.recommender.training.config import (
    ARMS,
    CONFIG,
    NAMES,
    PRECISIONS,
    ROW_OPTIMIZERS,
    SCHEDULES,
    SPLITS,
    RunConfig,
    add_flags,
    config_from,
    read_options,
    write_options,
)

# Flag, what is typed, what it means.
FLAGS = [
    ("--items", "index.json", "index.json"),
    ("--text", "text.json", "text.json"),
    ("--text-field", "brand", "brand"),
    ("--token-format", "<{level}_{code}>", "<{level}_{code}>"),
    ("--codebook-sizes", "256,128", [256, 128]),
    ("--codebook-sizes", "256", [256]),
    ("--codebook-sizes", "null", None),
    ("--split", "time", "time"),
    ("--time-fractions", "0.7,.9", [0.7, 0.9]),
    ("--max-items", "7", 7),
    ("--histories", "0.5", 0.5),
    ("--pairs", "2", 2.0),
    ("--model", "tiger", "tiger"),
    ("--model", '{"model_type": "llama", "hidden_size": 8}', {"model_type": "llama", "hidden_size": 8}),
    ("--model-options", ' {"dropout": 0.1}', {"dropout": 0.1}),
    ("--model-options", "null", None),
    ("--tokenizer", "none", None),
    ("--arm", "sid-transformer", "sid-transformer"),
    ("--active-levels", "2, 3", [2, 3]),
    ("--output-init-std", "1e-2", 0.01),
    ("--learning-rate", "3e-4", 0.0003),
    ("--schedule", "linear", "linear"),
    ("--precision", "bfloat16", "bfloat16"),
    ("--eval-users", "all", None),
    ("--tokenizer", "all", "all"),
    ("--eval-users", "50", 50),
    ("--keep-best", None, True),
    ("--no-keep-best", None, False),
    ("--seed", "12", 12),
]


def parser():
    made = argparse.ArgumentParser()
    add_flags(made)
    return made


def read(*flags, file=None, **defaults):
    return config_from(parser().parse_args(flags), file, **defaults)


@pytest.fixture
def file(tmp_path):
    """Writes a file of options: file("steps: 5")."""

    def write(content, name="run.yaml"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def catalogue(**changes):
    return RunConfig(**{"items": "i.json", "interactions": ["h.json"], **changes})


class TestFlags:
    def test_none_is_the_default(self):
        assert read("--synthetic") == RunConfig(synthetic=True)
        assert read("--items", "i.json", "--interactions", "h.json") == catalogue()
        assert all(value is None for value in vars(parser().parse_args([])).values())

    def test_defaults_are_lists_of_their_own(self):
        one, two = RunConfig(synthetic=True), RunConfig(synthetic=True)
        assert one.time_fractions == [0.8, 0.9]
        assert one.time_fractions is not two.time_fractions

    @pytest.mark.parametrize(("flag", "typed", "value"), FLAGS)
    def test_one(self, flag, typed, value):
        given = ["--interactions", "h.json", "--items", "i.json", flag, *([typed] if typed is not None else [])]
        name = flag.removeprefix("--no-").lstrip("-").replace("-", "_")
        found = getattr(read(*given), name)
        assert found == value
        assert type(found) is type(value)

    def test_several_files(self):
        assert read("--items", "i.json", "--interactions", "a.csv", "b.csv").interactions == ["a.csv", "b.csv"]

    def test_every_option_has_a_flag_with_its_help(self):
        text = " ".join(parser().format_help().split())
        for field in dataclasses.fields(RunConfig):
            assert "--" + field.name.replace("_", "-") in text
            assert field.metadata["help"] in text
        assert "(default: 1000)" in text
        assert "(default: [0.8, 0.9])" in text
        assert "{plain,prefixmem,cross-item,sid-transformer}" in text

    @pytest.mark.parametrize(
        ("flags", "error", "message"),
        [
            (["--steps", "many"], ValueError, "steps = 'many'; a whole number was expected"),
            (["--steps", "1.5"], ValueError, r"steps = '1\.5'; a whole number was expected"),
            (["--learning-rate", "fast"], ValueError, "learning_rate = 'fast'; a number was expected"),
            (["--eval-users", "some"], ValueError, "eval_users = 'some'; a whole number or null was expected"),
            (["--codebook-sizes", "4,b"], ValueError, "codebook_sizes = '4,b'; a list of int or null was expected"),
            (["--time-fractions", "0.1,x"], ValueError, "time_fractions = '0.1,x'; a list of float was expected"),
            (["--model", "{'a': 1}"], ValueError, r"model = \"\{'a': 1\}\" is no JSON: .*line 1 column 2"),
            (["--model-options", "dropout=1"], TypeError, "model_options = 'dropout=1'; a mapping or null was"),
            (["--model-options", "[1]"], TypeError, r"model_options = '\[1\]'; a mapping or null was expected"),
            (
                ["--arm", "memory"],
                ValueError,
                "arm = 'memory'; allowed are plain, prefixmem, cross-item, sid-transformer",
            ),
            (["--steps", "null"], ValueError, "steps = 'null'; a whole number was expected"),
        ],
    )
    def test_errors(self, flags, error, message):
        with pytest.raises(error, match=message):
            read("--synthetic", *flags)

    def test_an_unknown_flag(self, capsys):
        with pytest.raises(SystemExit):
            read("--synthetic", "--stepz", "3")
        assert "--stepz" in capsys.readouterr().err


class TestFiles:
    YAML = """
    items: index.json   # a comment
    interactions: [a.csv, b.csv]
    learning_rate: 1e-3
    weight_decay: 2.5E+1
    histories: 2
    output_init_std: .5e-2
    codebook_sizes: [4, 4]
    eval_users: null
    keep_best: false
    model: {model_type: llama, hidden_size: 8}
    """

    def test_yaml(self, file):
        config = read(file=file(self.YAML))
        assert config == RunConfig(
            items="index.json",
            interactions=["a.csv", "b.csv"],
            learning_rate=0.001,
            weight_decay=25.0,
            histories=2.0,
            output_init_std=0.005,
            codebook_sizes=[4, 4],
            eval_users=None,
            keep_best=False,
            model={"model_type": "llama", "hidden_size": 8},
        )
        assert isinstance(config.histories, float)
        assert isinstance(config.learning_rate, float)

    @pytest.mark.parametrize("number", ["1e-3", "1E-3", "1.e-3", ".1e-2", "+1e-3", "0.001", "10e-4", "1.0e-03"])
    def test_numbers(self, number, file):
        assert read(file=file(f"synthetic: true\nlearning_rate: {number}")).learning_rate == 0.001

    @pytest.mark.parametrize("name", ["1e-3b", "e-3", "run-1e-3", "'1e-3'", "1e", "a1e5"])
    def test_names_that_are_no_numbers(self, name, file):
        assert read(file=file(f"synthetic: true\ntokenizer: {name}")).tokenizer == name.strip("'")

    @pytest.mark.parametrize("indent", [None, 2, "\t"])
    @pytest.mark.parametrize("ascii", [True, False])
    def test_json(self, indent, ascii, file):
        options = {
            "items": "caf\u00e9 \U0001f600.json",
            "interactions": ["h/a.csv"],
            "learning_rate": 1e-5,
            "model": {"a": [1, None]},
            "steps": 7,
            "keep_best": True,
            "text": None,
        }
        content = json.dumps(options, indent=indent, ensure_ascii=ascii).replace("/", "\\/")
        assert read(file=file(content, "run.json")) == RunConfig(**options)

    def test_json_by_another_name(self, file):
        options = {"items": "i.json", "interactions": ["h/a.csv"], "learning_rate": 1e-5, "text": None}
        assert read(file=file(json.dumps(options, indent=2), "run.yaml")) == RunConfig(**options)

    def test_flag_over_file_over_default(self, file):
        path = file("synthetic: true\nsteps: 5\nkeep_best: true\neval_users: 9\nseed: 3")
        config = read("--steps", "6", "--no-keep-best", "--eval-users", "all", file=path, seed=1, patience=4, steps=2)
        assert (config.steps, config.keep_best, config.eval_users) == (6, False, None)
        assert (config.seed, config.patience) == (3, 4)
        assert config.batch_size == RunConfig(synthetic=True).batch_size

    def test_a_namespace_without_the_flags(self, file):
        assert config_from(argparse.Namespace(other=1), file("synthetic: true")) == RunConfig(synthetic=True)

    @pytest.mark.parametrize(
        ("content", "error", "message"),
        [
            ("steps: [1", ValueError, r"config .*run\.yaml is neither YAML nor JSON: (?s:.*)line"),
            (b"\xff\xfe\x00", ValueError, r"config .*run\.yaml is neither YAML nor JSON"),
            ("", ValueError, r"config .*run\.yaml holds a NoneType; option: value was expected"),
            ("- steps", ValueError, "holds a list; option: value was expected"),
            ("5", ValueError, "holds a int; option: value was expected"),
            ("synthetic: true\nstepz: 5", ValueError, r"run\.yaml: option 'stepz' is unknown; steps is near"),
            ("7: 5", ValueError, "option 7 is unknown"),
            ("!!python/object/apply:os.getcwd []", ValueError, "is neither YAML nor JSON"),
            ("synthetic: true\nsteps: many", TypeError, "steps = 'many'; a whole number was expected"),
            ("synthetic: true\nsteps: 1e3", TypeError, r"steps = 1000\.0; a whole number was expected"),
            ("synthetic: true\nsteps: true", TypeError, "steps = True; a whole number was expected"),
            ("synthetic: true\nsteps: null", TypeError, "steps = None; a whole number was expected"),
        ],
    )
    def test_errors(self, content, error, message, file):
        with pytest.raises(error, match=message):
            read(file=file(content))

    # A few lines of YAML may stand for any number of values.
    ALIASES = "".join(f"  {b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcd", "bcde", strict=True))

    @pytest.mark.parametrize(
        "content",
        [
            f"interactions: &a [x, y]\nmodel_options:\n{ALIASES}time_fractions: *e\n",
            f"synthetic: true\narm: {'x' * 5000}\n",
            f"{'x' * 500}: 5\n",
        ],
        ids=["aliases", "value", "option"],
    )
    def test_long_values_are_shortened(self, content, file):
        with pytest.raises((TypeError, ValueError)) as error:
            read(file=file(content))
        assert len(str(error.value)) < 500

    def test_missing(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"config .*none\.yaml is not there; give a YAML or JSON file"):
            read(file=tmp_path / "none.yaml")
        with pytest.raises(FileNotFoundError, match="is not there"):
            read_options(tmp_path)


class TestTypes:
    @pytest.mark.parametrize(
        ("changes", "expected"),
        [
            ({"keep_best": 1}, "keep_best = 1; true or false"),
            ({"keep_best": "yes"}, "keep_best = 'yes'; true or false"),
            ({"batch_size": 2.0}, r"batch_size = 2\.0; a whole number"),
            ({"learning_rate": "1e-3"}, "learning_rate = '1e-3'; a number"),
            ({"learning_rate": True}, "learning_rate = True; a number"),
            ({"learning_rate": None}, "learning_rate = None; a number"),
            ({"items": 5}, "items = 5; a string or null"),
            ({"interactions": ["h.json", 3]}, r"interactions = \['h\.json', 3\]; a list of str or null"),
            ({"codebook_sizes": [4, True]}, r"codebook_sizes = \[4, True\]; a list of int or null"),
            ({"codebook_sizes": [4.0]}, r"codebook_sizes = \[4\.0\]; a list of int or null"),
            ({"codebook_sizes": 4}, "codebook_sizes = 4; a list of int or null"),
            ({"time_fractions": ["0.1", 0.2]}, r"time_fractions = \['0\.1', 0\.2\]; a list of float"),
            ({"model": 3}, "model = 3; a string or a mapping"),
            ({"model": ["llama"]}, r"model = \['llama'\]; a string or a mapping"),
            ({"model_options": "x"}, "model_options = 'x'; a mapping or null"),
            ({"eval_users": True}, "eval_users = True; a whole number or null"),
            ({"split": None}, "split = None; a string"),
        ],
    )
    def test_wrong(self, changes, expected):
        with pytest.raises(TypeError, match=rf"^{expected} was expected"):
            catalogue(**changes)

    def test_tuples_are_lists_and_whole_numbers_are_numbers(self):
        config = catalogue(interactions=("a.csv",), codebook_sizes=(4, 5), learning_rate=1)
        assert config.interactions == ["a.csv"]
        assert config.codebook_sizes == [4, 5]
        assert isinstance(config.learning_rate, float)

    def test_it_does_not_change(self):
        config = RunConfig(synthetic=True)
        with pytest.raises(dataclasses.FrozenInstanceError):
            config.steps = 3
        assert config.replace(steps=3).steps == 3
        with pytest.raises(ValueError, match="steps = 0"):
            config.replace(steps=0)


class TestValues:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            (
                {"history_codes": [3, 4]},
                r"history_codes = \[3, 4\] is of cross-item orders, and history = 0; give hist",
            ),
            ({"history_lr": 0.1}, "history_lr = 0.1 is of cross-item orders"),
            ({"restart_rows": 200}, "restart_rows = 200 is of cross-item orders"),
            (
                {"history": 1, "history_codes": [2, 2]},
                r"history_codes = \[2, 2\]; give numbers of 1 or more, each once",
            ),
            ({"history": 1, "restart_rows": 300}, "eval_every = 200 is no multiple of restart_rows = 300; tables are"),
            ({"history": 1, "restart_rows": 200, "steps": 500}, "steps = 500 is no multiple of restart_rows = 200"),
            ({"arm": "plain", "encoder": "x"}, "encoder = 'x' with arm = 'plain', which has none; leave it out"),
            ({"arm": "sid-transformer", "encoder": "x"}, "encoder = 'x' with arm = 'sid-transformer'"),
        ],
    )
    def test_options_that_would_do_nothing(self, changes, message):
        with pytest.raises(ValueError, match=f"^{message}"):
            RunConfig(synthetic=True, eval_every=200, log_every=200, **changes)
        of_a_pretrained_encoder = {"encoder": "x", "history_lr": 0.1, "restart_rows": 500, "eval_every": 500}
        assert RunConfig(synthetic=True, **of_a_pretrained_encoder).history == 0

    @pytest.mark.parametrize(
        ("name", "choices"),
        [
            ("split", SPLITS),
            ("arm", ARMS),
            ("row_optimizer", ROW_OPTIMIZERS),
            ("schedule", SCHEDULES),
            ("precision", PRECISIONS),
        ],
    )
    def test_choices(self, name, choices):
        for choice in choices:
            assert getattr(RunConfig(synthetic=True, **{name: choice}), name) == choice
        with pytest.raises(ValueError, match=f"{name} = 'other'; allowed are {', '.join(choices)}"):
            RunConfig(synthetic=True, **{name: "other"})

    @pytest.mark.parametrize(
        "name",
        [
            "steps",
            "batch_size",
            "pack",
            "accumulation",
            "max_items",
            "max_text_tokens",
            "log_every",
            "eval_every",
            "sid_layers",
            "sid_width",
            "eval_users",
        ],
    )
    def test_one_or_more(self, name):
        for value in (0, -3):
            with pytest.raises(ValueError, match=f"^{name} = {value}; give 1 or more"):
                RunConfig(synthetic=True, **{name: value})
        assert getattr(RunConfig(**{"synthetic": True, "eval_every": 1, "log_every": 1, name: 1}), name) == 1

    @pytest.mark.parametrize(
        "name",
        [
            "histories",
            "interleaved",
            "pairs",
            "weight_decay",
            "row_weight_decay",
            "max_grad_norm",
            "warmup_steps",
            "patience",
            "learning_rate",
            "seed",
            "encoder_lr_multiple",
        ],
    )
    def test_zero_or_more(self, name):
        with pytest.raises(ValueError, match=rf"^{name} = -1(\.0)?; give 0 or more"):
            RunConfig(synthetic=True, **{name: -1})
        assert getattr(RunConfig(**{"synthetic": True, "pairs": 1, name: 0}), name) == 0
        if RunConfig.__annotations__[name] == "float":
            with pytest.raises(ValueError, match=f"{name} = nan"):
                RunConfig(synthetic=True, **{name: float("nan")})

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"histories": 0}, "histories, interleaved and pairs are all 0; give one of them a weight"),
            ({"memory_dropout": 1.0}, r"memory_dropout = 1\.0; allowed are 0 <= p < 1"),
            ({"memory_dropout": -0.1}, r"memory_dropout = -0\.1; allowed are 0 <= p < 1"),
            ({"log_every": 30}, "eval_every = 100 is no multiple of log_every = 30; give one"),
            ({"time_fractions": [0.9, 0.8]}, r"time_fractions = \[0\.9, 0\.8\]; two ascending numbers between 0 and 1"),
            ({"time_fractions": [0.8, 0.8]}, "time_fractions = .*; two ascending numbers"),
            ({"time_fractions": [0, 0.8]}, "time_fractions = .*; two ascending numbers"),
            ({"time_fractions": [0.8, 1]}, "time_fractions = .*; two ascending numbers"),
            ({"time_fractions": [0.8]}, "time_fractions = .*; two ascending numbers"),
            ({"time_fractions": [0.1, 0.2, 0.3]}, "time_fractions = .*; two ascending numbers"),
            ({"grad": "fused"}, "grad = 'fused' neither clips nor accumulates; give max_grad_norm = 0 .it is 1.0"),
            ({"grad": "fused", "max_grad_norm": 0, "accumulation": 2}, "give accumulation = 1 .it is 2"),
            ({"items": "i.json"}, "synthetic goes without items, interactions and text"),
            ({"interactions": ["h.json"]}, "synthetic goes without items, interactions and text"),
            ({"text": "t.json"}, "synthetic goes without items, interactions and text"),
            ({"synthetic": False}, "items and interactions are needed, or synthetic"),
            ({"synthetic": False, "items": "i.json"}, "items and interactions are needed, or synthetic"),
            ({"synthetic": False, "interactions": ["h.json"]}, "items and interactions are needed, or synthetic"),
            ({"synthetic": False, "items": "i.json", "interactions": []}, "interactions is empty; leave it out"),
        ],
    )
    def test_that_do_not_fit(self, changes, message):
        with pytest.raises(ValueError, match=message):
            RunConfig(**{"synthetic": True, **changes})

    @pytest.mark.parametrize(
        "changes",
        [
            {"histories": 0, "pairs": 0.1},
            {"memory_dropout": 0.99},
            {"log_every": 50},
            {"time_fractions": [0.1, 0.2]},
            {"grad": "fused", "max_grad_norm": 0},
            {"grad": "fused", "arm": "plain"},
            {"eval_users": None},
        ],
    )
    def test_that_fit(self, changes):
        config = RunConfig(synthetic=True, **changes)
        assert all(getattr(config, name) == value for name, value in changes.items())


class TestWritten:
    @pytest.mark.parametrize(
        "config",
        [
            RunConfig(synthetic=True),
            catalogue(
                text="café.json",
                learning_rate=1e-5,
                weight_decay=1e20,
                eval_users=None,
                split="time",
                codebook_sizes=[4, 5],
                model={"model_type": "llama", "a": [1, None, {"b": 1e-9}]},
                interactions=["a b.csv", "\U0001f600: #.csv", "-", "no", "7"],
                time_fractions=[1e-4, 0.5],
            ),
        ],
    )
    def test_round_trip(self, config, tmp_path):
        write_options(config, tmp_path / CONFIG)
        options = read_options(tmp_path / CONFIG)
        assert RunConfig(**options) == config
        assert tuple(options) == NAMES  # in the order of the options
        assert read(file=tmp_path / CONFIG) == config
        assert read("--seed", "5", file=tmp_path / CONFIG) == config.replace(seed=5)
        assert yaml.safe_load((tmp_path / CONFIG).read_text(encoding="utf-8")) == options
        assert [path.name for path in tmp_path.iterdir()] == [CONFIG]

    @pytest.mark.parametrize("name", ["12e4567", "1e-3", "3E5", "1.5e3", "null", "true", "1", "1_0", "2024-01-01", "~"])
    def test_names_that_look_like_something_else(self, name, tmp_path):
        config = RunConfig(synthetic=True, encoder=name, tokenizer=name)
        write_options(config, tmp_path / CONFIG)
        assert RunConfig(**read_options(tmp_path / CONFIG)) == config

    def test_a_file_is_replaced(self, tmp_path):
        for steps in (5, 6):
            write_options(RunConfig(synthetic=True, steps=steps), tmp_path / CONFIG)
            assert read_options(tmp_path / CONFIG)["steps"] == steps

    def test_what_is_asked_for_is_a_copy(self):
        config = catalogue(model={"a": [1]})
        config.to_dict()["model"]["a"].append(2)
        assert config.model == {"a": [1]}
