"""What a run is: one flat set of options, from a YAML or JSON file and from flags, saved with the run."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import math
import re
import types
import typing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ..._choices import ADDRESSING, GRADS, MODES, MOST_HISTORY
from ..._files import write_text
from ..._inputs import shown, unique_keys

CONFIG = "config.yaml"  # the options in the folder of a run
_INPUTS = "inputs"  # in it, what inputs.py keeps
ARMS = ("plain", "prefixmem", "cross-item", "sid-transformer")
MEMORY_ARMS = ("prefixmem", "cross-item")
SPLITS = ("leave-two-out", "time")
ROW_OPTIMIZERS = ("adagrad", "adam", "lazy-adam", "sgd")
SCHEDULES = ("cosine", "linear", "constant")
PRECISIONS = ("float32", "bfloat16")
_MOST = {
    **dict.fromkeys(("steps", "accumulation", "warmup_steps", "log_every", "eval_every", "patience"), (1 << 31) - 1),
    **dict.fromkeys(("max_items", "max_text_tokens", "batch_size", "memory_dim", "history_dim", "sid_width"), 1 << 20),
    **dict.fromkeys(("pack", "sid_layers"), 1 << 12),
    "restart_rows": (1 << 31) - 1,
    "history": MOST_HISTORY,
}
_SECTIONS = {"synthetic": "data", "model": "model", "encoder": "encoder", "steps": "training"}  # by their first option


def option(default: Any, help: str, choices: tuple[str, ...] | None = None) -> Any:
    metadata = {"help": help, "choices": choices}
    if isinstance(default, list):
        return dataclasses.field(default_factory=default.copy, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True)
class RunConfig:
    """The options of `prefixmem train` and `prefixmem pretrain`; each is a flag and a key of the file.

    Raises:
        TypeError, ValueError: an option has another type or a value that is not allowed; the message names it.
    """

    # data
    synthetic: bool = option(False, "train on the synthetic catalogue, in place of items and interactions")
    items: str | None = option(None, "index of the items' Semantic IDs: .json, .npy, .pt or .parquet")
    interactions: list[str] | None = option(None, "histories: .json, .csv or .parquet; several files in time order")
    text: str | None = option(None, "text of the items: .json")
    text_field: str = option("title", "which entry of an item's text to read")
    token_format: str | None = option(None, "template of the index's tokens; recognised unless given")
    codebook_sizes: list[int] | None = option(None, "K_1,..,K_L; what the index shows unless given")
    split: str = option("leave-two-out", "how histories are split", SPLITS)
    time_fractions: list[float] = option([0.8, 0.9], "of split=time: shares of interactions before its two moments")
    max_items: int = option(20, "items of a history that the model sees")
    max_text_tokens: int = option(32, "tokens of an item's text")
    histories: float = option(1.0, "weight of the sequences of SIDs alone")
    interleaved: float = option(0.0, "weight of the sequences of text and SIDs in turn")
    pairs: float = option(0.0, "weight of the pairs text and SID, in both directions")
    # model
    model: str | dict = option("decoder", "decoder, tiger, a folder or name of a pre-trained model, or a config.json")
    model_options: dict | None = option(None, "entries of the model's configuration to change, as JSON")
    tokenizer: str | None = option(None, "folder or name of a tokenizer; the model's, or one made from the text")
    arm: str = option("prefixmem", "what is added to the embeddings of SIDs", ARMS)
    # encoder
    encoder: str | None = option(None, "folder of a pre-trained encoder; its W_out starts afresh")
    table_rows: int = option(200_000, "T, rows of a memory table")
    memory_dim: int = option(64, "d_mem, columns of the memory")
    heads: int = option(4, "H, tables of an order")
    max_order: int = option(4, "N, the largest order")
    active_levels: list[int] | None = option(
        None, "prefix lengths at which the memory is read; unless given the two before the last, L-2 and L-1"
    )
    mode: str = option("prefix", "which codes an order reads", MODES)
    addressing: str = option("auto", "exact rows where they fit, or all hashed", ADDRESSING)
    address_seed: int = option(0, "seed of the primes")
    history: int = option(0, "cross-item orders: how many of the items before are read; with arm=cross-item at least 1")
    history_codes: list[int] | None = option(
        None,
        "first codes of an earlier item that its rows are keyed by, tables for each number; the whole SID unless given",
    )
    history_rows: int = option(200_000, "rows of a table of cross-item orders")
    history_dim: int = option(64, "columns of the memory of cross-item orders")
    history_heads: int = option(2, "tables of a cross-item order")
    history_output: bool = option(
        True, "the memory of cross-item orders is also added to the last hidden states, before the output layer"
    )
    output_init_std: float = option(1e-3, "standard deviation of W_out at its start")
    memory_dropout: float = option(0.0, "share of SID tokens whose memory is left out in training")
    grad: str = option("sparse", "where the gradient of the tables goes", GRADS)
    row_optimizer: str = option("adagrad", "optimizer of the rows with grad=sparse and fused", ROW_OPTIMIZERS)
    row_weight_decay: float = option(0.0, "weight decay of the touched rows")
    history_lr: float | None = option(
        None, "learning rate of the rows of cross-item orders, constant after the warm-up; the encoder's unless given"
    )
    restart_rows: int = option(
        0, "steps, of an epoch say, after which the tables of cross-item orders start anew; 0 never"
    )
    encoder_lr_multiple: float = option(5.0, "the encoder's learning rate over the model's; 1 for a SID-Transformer")
    sid_layers: int = option(4, "layers of the SID-Transformer")
    sid_width: int = option(128, "width of the SID-Transformer")
    # training
    steps: int = option(1000, "optimizer steps")
    batch_size: int = option(64, "rows of a batch, a process, on average: fewer where they are long")
    pack: int = option(1, "sequences packed into a row")
    accumulation: int = option(1, "batches of an optimizer step")
    learning_rate: float = option(1e-3, "peak learning rate of the model")
    schedule: str = option("cosine", "of the learning rate", SCHEDULES)
    warmup_steps: int = option(100, "steps of linear warm-up")
    weight_decay: float = option(0.0, "of the model's matrices")
    adam_beta2: float = option(0.999, "AdamW's decay of squared gradients; lower suits short runs")
    muon_lr: float | None = option(None, "learning rate of Muon for the model's inner matrices; AdamW without it")
    max_grad_norm: float = option(1.0, "gradients are clipped to it; 0 does not clip, as grad=fused needs")
    precision: str = option("float32", "of the model's arithmetic", PRECISIONS)
    log_every: int = option(10, "steps between losses")
    eval_every: int = option(100, "steps between validations; checkpoints are saved with them")
    eval_users: int | None = option(2000, "users of a validation; null takes all")
    patience: int = option(0, "validations without a lower loss after which training stops; 0 never stops early")
    keep_best: bool = option(True, "keep the model of the lowest validation loss, else the last")
    seed: int = option(0, "of weights, order and dropout")

    def __post_init__(self) -> None:
        for field, kinds in _kinds().items():
            value = _plain(getattr(self, field.name))
            if isinstance(value, int) and abs(value) >= 1 << 64:
                raise ValueError(f"{field.name} = {shown(value)} is too large a number")
            if float in kinds and isinstance(value, int) and not isinstance(value, bool):
                value = float(value)
            if list[str] in kinds and isinstance(value, str):
                value = [value]
            if not _matches(value, kinds):
                quoted = isinstance(value, bool) and str in kinds
                hint = "; YAML reads no, off, yes and on as booleans unless they are quoted" if quoted else ""
                raise TypeError(f"{field.name} = {shown(value)}; {_described(kinds)} was expected{hint}")
            if value in ("", []):
                raise ValueError(f"{field.name} is empty; leave it out, or give {_described(kinds)}")
            choices = field.metadata["choices"]
            if choices and value not in choices:
                raise ValueError(f"{field.name} = {shown(value)}; allowed are {', '.join(choices)}")
            object.__setattr__(self, field.name, value)
        for name in (
            "steps",
            "batch_size",
            "pack",
            "accumulation",
            "max_items",
            "max_text_tokens",
            "log_every",
            "eval_every",
            "table_rows",
            "heads",
            "max_order",
            "memory_dim",
            "history_rows",
            "history_dim",
            "history_heads",
            "sid_layers",
            "sid_width",
        ):
            _at_least(self, name, 1)
        for name in (
            "histories",
            "interleaved",
            "pairs",
            "weight_decay",
            "row_weight_decay",
            "max_grad_norm",
            "warmup_steps",
            "patience",
            "learning_rate",
            "encoder_lr_multiple",
            "output_init_std",
            "history",
            "restart_rows",
            "seed",
        ):
            _at_least(self, name, 0)
        if self.seed >= 1 << 32:
            raise ValueError(f"seed = {self.seed}; give less than 2^32, as numpy's generators take")
        for name, most in _MOST.items():
            if getattr(self, name) > most:
                raise ValueError(f"{name} = {getattr(self, name)}; give {most} or less")
        if self.active_levels is not None and min(self.active_levels) < 1:
            raise ValueError(f"active_levels = {self.active_levels}; levels count from 1")
        counts = self.history_codes
        if counts is not None and (min(counts, default=0) < 1 or len({*counts}) < len(counts)):
            raise ValueError(f"history_codes = {counts}; give numbers of 1 or more, each once, L for the whole SID")
        if self.muon_lr is not None:
            _at_least(self, "muon_lr", 0)
        if self.history_lr is not None:
            _at_least(self, "history_lr", 0)
            if self.grad == "dense":
                raise ValueError(
                    f"history_lr = {self.history_lr} with grad = 'dense', whose tables AdamW trains; give "
                    "grad = 'sparse' or 'fused'"
                )
        if self.arm == "cross-item" and not self.history:
            object.__setattr__(self, "history", 1)
        if self.encoder is not None and self.arm not in MEMORY_ARMS:
            raise ValueError(f"encoder = {self.encoder!r} with arm = {self.arm!r}, which has none; leave it out")
        if self.arm == "prefixmem" and not self.history and self.encoder is None:
            for name in ("history_codes", "history_lr", "restart_rows"):
                if getattr(self, name):
                    raise ValueError(
                        f"{name} = {getattr(self, name)} is of cross-item orders, and history = 0; give history as well"
                    )
        for name in ("eval_every", "steps"):
            if self.restart_rows and getattr(self, name) % self.restart_rows:
                raise ValueError(
                    f"{name} = {getattr(self, name)} is no multiple of restart_rows = {self.restart_rows}; tables are "
                    "filled, and worth testing and keeping, just before they start anew; give one"
                )
        if self.eval_users is not None:
            _at_least(self, "eval_users", 1)
        if not self.histories + self.interleaved + self.pairs:
            raise ValueError("histories, interleaved and pairs are all 0; give one of them a weight")
        if not 0 <= self.adam_beta2 < 1:
            raise ValueError(f"adam_beta2 = {self.adam_beta2}; allowed are 0 <= beta < 1")
        if not 0 <= self.memory_dropout < 1:
            raise ValueError(f"memory_dropout = {self.memory_dropout}; allowed are 0 <= p < 1")
        if self.eval_every % self.log_every:
            raise ValueError(f"eval_every = {self.eval_every} is no multiple of log_every = {self.log_every}; give one")
        if len(self.time_fractions) != 2 or not 0 < self.time_fractions[0] < self.time_fractions[1] < 1:
            raise ValueError(
                f"time_fractions = {self.time_fractions}; two ascending numbers between 0 and 1 were expected"
            )
        if self.grad == "fused" and (self.max_grad_norm or self.accumulation > 1) and self.arm in MEMORY_ARMS:
            wrong = [("max_grad_norm", self.max_grad_norm, 0), ("accumulation", self.accumulation, 1)]
            found = [f"{name} = {right} (it is {value})" for name, value, right in wrong if value != right]
            raise ValueError(f"grad = 'fused' neither clips nor accumulates; give {' and '.join(found)}")
        if self.synthetic and (self.items or self.interactions or self.text):
            raise ValueError("synthetic goes without items, interactions and text; leave one or the other out")
        if not self.synthetic and not (self.items and self.interactions):
            raise ValueError("items and interactions are needed, or synthetic")

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def replace(self, **changes: Any) -> RunConfig:
        return dataclasses.replace(self, **changes)


NAMES = tuple(field.name for field in dataclasses.fields(RunConfig))


def add_flags(parser: argparse.ArgumentParser) -> None:
    """A flag for each option; those not given are None."""
    group = parser
    for field, kinds in _kinds().items():
        if field.name in _SECTIONS:
            group = parser.add_argument_group(_SECTIONS[field.name])
        flag = "--" + field.name.replace("_", "-")
        default = field.default_factory() if field.default is dataclasses.MISSING else field.default
        text = field.metadata["help"].replace("%", "%%")
        text += (
            ""
            if default is None or default is False
            else f" (default: {json.dumps(default) if isinstance(default, list) else default})"
        )
        if kinds == (bool,):
            group.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, help=text)
        else:
            several = {"nargs": "+"} if field.name == "interactions" else {}
            group.add_argument(flag, default=None, metavar=_metavar(field, kinds), help=text, **several)


def config_from(options: argparse.Namespace, file: str | Path | None, **defaults: Any) -> RunConfig:
    """The options of a file, changed by flags; `defaults` hold where neither speaks.

    Raises:
        FileNotFoundError, TypeError, ValueError: the file is not there or is no mapping of options, or an option is
            wrong.
    """
    values = {**defaults, **(read_options(file) if file else {})}
    from_file = set(values) - set(defaults)
    for field, kinds in _kinds().items():
        flag = getattr(options, field.name, None)
        if flag is not None:
            values[field.name] = _parse(field.name, flag, kinds)
            from_file.discard(field.name)
    try:
        return RunConfig(**values)
    except (TypeError, ValueError) as error:
        if str(error).partition(" ")[0] not in from_file:
            raise
        raise type(error)(f"config {file}: {error}") from None


def read_options(file: str | Path) -> dict[str, Any]:
    """The options of a YAML or JSON file.

    Raises:
        FileNotFoundError, ValueError: the file is not there, or is no mapping of options.
    """
    return read_run(file)[0]


def read_run(file: str | Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The options of a file, and the inputs that a run has written there; see `read_options`."""
    import yaml

    file = Path(file)
    if not file.is_file():
        raise FileNotFoundError(f"config {file} is not there; give a YAML or JSON file")
    try:
        text = file.read_text(encoding="utf-8")
        if file.suffix == ".json":
            values = json.loads(text, object_pairs_hook=partial(unique_keys, kind="option"))
        else:
            values = yaml.load(text, _with_exponents(yaml.SafeLoader))
    except (yaml.YAMLError, RecursionError, TypeError, ValueError) as error:
        raise ValueError(f"config {file} is neither YAML nor JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"config {file} holds a {type(values).__name__}; option: value was expected")
    inputs = values.pop(_INPUTS, {})
    unknown = [name for name in values if name not in NAMES]
    if unknown:
        near = difflib.get_close_matches(str(unknown[0]), NAMES, n=1)
        hint = f"; {near[0]} is near" if near else ""
        raise ValueError(
            f"config {file}: option {shown(unknown[0])} is unknown{hint}; prefixmem train --help lists them"
        )
    if not _are_inputs(inputs):
        raise ValueError(f"config {file}: {_INPUTS} is not what a run has written there; leave it out")
    return values, inputs


def write_options(config: RunConfig, file: Path, inputs: dict[str, Any] | None = None) -> None:
    import yaml

    dumper = _with_exponents(yaml.SafeDumper)
    values = {**config.to_dict(), **({_INPUTS: inputs} if inputs else {})}
    text = yaml.dump(values, Dumper=dumper, sort_keys=False, allow_unicode=True)
    if yaml.load(text, _with_exponents(yaml.SafeLoader)) != values:  # a name with a line break of Unicode in it
        text = yaml.dump(values, Dumper=dumper, sort_keys=False)
    write_text(file, text)


def _with_exponents(kind: type) -> type:
    """A YAML loader or dumper for which 1e-3 is a number, as in YAML 1.2 and JSON; in YAML 1.1 it is a string."""
    number = re.compile(r"^[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+$")
    extended = type(kind.__name__, (kind,), {})
    if hasattr(kind, "construct_mapping"):
        extended.add_constructor("tag:yaml.org,2002:map", _unique_mapping)
    extended.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+0123456789."))
    return extended


def _unique_mapping(loader: Any, node: Any) -> dict[Any, Any]:
    """A YAML mapping whose keys are each there once, where YAML itself takes the last."""
    loader.flatten_mapping(node)
    pairs = [(loader.construct_object(key), loader.construct_object(value, deep=True)) for key, value in node.value]
    return unique_keys(pairs, "option")


def _are_inputs(inputs: Any) -> bool:
    """Whether `inputs` has the form that inputs.py writes."""
    forms = ({"path", "absolute", "from_run", "sha256"}, {"path", "revision"})
    return isinstance(inputs, dict) and all(
        isinstance(entries, list)
        and all(
            isinstance(entry, dict) and set(entry) in forms and all(isinstance(v, str) for v in entry.values())
            for entry in entries
        )
        for entries in inputs.values()
    )


def _kinds() -> dict[dataclasses.Field, tuple[Any, ...]]:
    """Each option and the types that its values may have."""
    hints = typing.get_type_hints(RunConfig)
    types_of = {}
    for field in dataclasses.fields(RunConfig):
        hint = hints[field.name]
        union = typing.get_origin(hint) in (typing.Union, types.UnionType)
        types_of[field] = typing.get_args(hint) if union else (hint,)
    return types_of


def _plain(value: Any) -> Any:
    return [*value] if isinstance(value, tuple) else value


def _matches(value: Any, kinds: tuple[Any, ...]) -> bool:
    for kind in kinds:
        inner = typing.get_args(kind)
        if inner:
            numbers = (int, float) if inner[0] is float else inner[0]
            if isinstance(value, list) and all(isinstance(v, numbers) and not isinstance(v, bool) for v in value):
                return True
        elif isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
            return True
    return False


def _described(kinds: tuple[Any, ...]) -> str:
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "a string", dict: "a mapping"}
    names[type(None)] = "null"
    return " or ".join(names.get(kind) or f"a list of {typing.get_args(kind)[0].__name__}" for kind in kinds)


def _metavar(field: dataclasses.Field, kinds: tuple[Any, ...]) -> str:
    if field.metadata["choices"]:
        return "{" + ",".join(field.metadata["choices"]) + "}"
    kind = kinds[0]
    if field.name in ("items", "interactions", "text"):
        return "FILE"
    return {int: "N", float: "X", dict: "JSON"}.get(kind, "A,B,.." if typing.get_args(kind) else "NAME")


def _parse(name: str, text: Any, kinds: tuple[Any, ...]) -> Any:
    """The value that a flag's string stands for."""
    if not isinstance(text, str):
        return text
    nothing = ("none", "null", "all") if int in kinds else ("none", "null")
    if type(None) in kinds and text.lower() in nothing:
        return None
    if dict in kinds and text.lstrip().startswith("{"):
        try:
            return json.loads(text)
        except ValueError as error:
            raise ValueError(f"{name} = {shown(text)} is no JSON: {error}") from None
    try:
        for kind in kinds:
            if typing.get_args(kind):
                return [typing.get_args(kind)[0](part) for part in text.split(",") if part.strip()]
            if kind is int and re.fullmatch(r"[0-9.]+[eE][+]?[0-9]+", text) and float(text).is_integer():
                return int(float(text))
            if kind in (int, float):
                return kind(text)
    except ValueError:
        raise ValueError(f"{name} = {shown(text)}; {_described(kinds)} was expected") from None
    return text


def _at_least(config: RunConfig, name: str, least: int) -> None:
    if not least <= getattr(config, name) < math.inf:
        raise ValueError(f"{name} = {getattr(config, name)}; give {least} or more")
