"""Saving a model saves its encoder: what `attach` adds to save_pretrained and to PEFT's load_adapter.

A model's own weights files hold the encoder's tensors among the model's, so the Trainer resumes from them. PEFT saves
its adapters alone, so the encoder is saved beside them: by the PeftModel that it is attached to, or, where PEFT came
later and has a copy of it for each adapter (modules_to_save), with each adapter's config. Either way the folder
``prefixmem`` says what was attached.
"""

from __future__ import annotations

import re
import warnings
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..checkpoint import FOLDER
from ..encoder.saving import load_weights, save_encoder
from .hooks import NAME, unwrapped

_CHECKPOINT = re.compile(r"checkpoint-\d+")  # of a Trainer, whose callback saves the tables there


def watch_files(model: nn.Module, base: nn.Module) -> None:
    """`base` is the model of transformers in `model`, or `model` itself."""
    base.save_pretrained = _SaveModel(base, base)
    base.register_state_dict_pre_hook(_WatchConfigs(base, base))
    if base is not model:
        model.save_pretrained, model.load_adapter = _SaveAdapters(model, base), _LoadAdapters(model, base)


def leave_files(model: nn.Module, base: nn.Module) -> None:
    for module in (model, base):
        for name in ("save_pretrained", "load_adapter"):
            if isinstance(module.__dict__.get(name), _Method):
                del module.__dict__[name]
    for key, hook in list(base._state_dict_pre_hooks.items()):
        if isinstance(hook, _Method):
            del base._state_dict_pre_hooks[key]


class _Method:
    """A method of one model, held weakly, with further arguments; a copy of the model gets its own."""

    def __init__(self, model: Any, base: nn.Module, *more: str) -> None:
        self._model, self._base, self._more = weakref.ref(model), weakref.ref(base), more

    def __reduce__(self) -> Any:
        return type(self), (self._model(), self._base(), *self._more)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return type(self)(*(memo.get(id(ref()), ref()) for ref in (self._model, self._base)), *self._more)

    def _original(self, name: str, *args: Any, **options: Any) -> Any:
        model = self._model()
        if model is None:
            raise RuntimeError(f"the model of this {name} is gone; keep it in a variable")
        return getattr(type(model), name)(model, *args, **options)

    def _save(self, folder: str | Path, *, weights: bool, whole: Mapping[str, Tensor] | None = None) -> None:
        attachment = getattr(self._base(), "prefixmem_attachment", None)
        if attachment is not None:
            encoder = unwrapped(attachment.encoder)
            divisions = [d for module in encoder.modules() if (d := getattr(module, "division", None)) is not None]
            in_checkpoint = _CHECKPOINT.fullmatch(Path(folder).name)
            if not all(division.saved_apart and in_checkpoint for division in divisions):
                warnings.warn(
                    f"{folder} gets the model without the tables of its encoder, which are divided over processes: "
                    "call prefixmem_fast.distributed.save_pretrained(model, folder) on every rank, or save_tables",
                    stacklevel=3,
                )
            if divisions:
                return
            save_encoder(encoder, Path(folder) / FOLDER, attachment.vocabulary, weights=weights, whole=whole)


class _SaveModel(_Method):
    def __call__(self, save_directory: str | Path, is_main_process: bool = True, **options: Any) -> Any:
        """The model's save_pretrained, and beside it what attaches the encoder again."""
        if options.get("push_to_hub"):
            raise ValueError("push_to_hub=True would leave the encoder's folder out; call model.push_to_hub() instead")
        start, given = f"{NAME}.", options.get("state_dict") or {}  # which transformers empties
        whole = {name.removeprefix(start): tensor for name, tensor in given.items() if name.startswith(start)}
        single, index = (Path(save_directory) / f"model.safetensors{end}" for end in ("", ".index.json"))
        before = _status(single), _status(index)
        result = self._original("save_pretrained", save_directory, is_main_process=is_main_process, **options)
        if is_main_process:
            readable = options.get("safe_serialization", True) is not False and options.get("variant") is None
            one, many = (_status(file) not in (None, old) for file, old in zip((single, index), before, strict=True))
            hidden = many and not one and single.is_file()
            # Files of an earlier save hold the encoder of then.
            self._save(save_directory, weights=not readable or hidden or not (one or many), whole=whole)
            if hidden:
                warnings.warn(
                    f"{single} is of an earlier save, and transformers reads it before the files that it has just "
                    "written beside it: remove it",
                    stacklevel=2,
                )
        return result


def _status(file: Path) -> tuple[int, ...] | None:
    """What a write into a file changes; None where none is there."""
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


class _SaveAdapters(_Method):
    def __call__(self, save_directory: str | Path, *args: Any, is_main_process: bool = True, **options: Any) -> Any:
        """The PeftModel's save_pretrained, and the encoder beside the adapters."""
        options["is_main_process"] = is_main_process
        result = self._original("save_pretrained", save_directory, *args, **options)
        if is_main_process:
            self._save(save_directory, weights=True)
        return result


class _LoadAdapters(_Method):
    def __call__(self, model_id: str, *args: Any, **options: Any) -> Any:
        """The PeftModel's load_adapter, and the encoder's weights where they lie beside the adapters."""
        result = self._original("load_adapter", model_id, *args, **options)
        attachment = getattr(self._base(), "prefixmem_attachment", None)
        if attachment is not None and (Path(model_id) / FOLDER).is_dir():
            changed = load_weights(unwrapped(attachment.encoder), Path(model_id) / FOLDER)
            name = args[0] if args else options.get("adapter_name")
            others = [other for other in self._model().peft_config if other != name]
            if changed and others:
                warnings.warn(
                    f"all adapters share one encoder, and from now on it is that of {model_id}, also with "
                    f"{', '.join(others)}, which had another one; load the adapter whose encoder is wanted last, or "
                    "keep a model for each",
                    stacklevel=2,
                )
        return result


class _WatchConfigs(_Method):
    def __call__(self, *_: Any) -> None:
        """Before the model's state_dict, which PEFT asks for in a save: the configs of its adapters save the encoder.

        PEFT came after `attach` where it has wrapped the encoder, so nothing here has seen its PeftModel.
        """
        base = self._base()
        encoder = getattr(getattr(base, "prefixmem_attachment", None), "encoder", None)
        for name in getattr(encoder, "modules_to_save", ()):
            config = getattr(base, "peft_config", {}).get(name)
            if config is not None:
                config.save_pretrained = _SaveConfig(config, base, name)


class _SaveConfig(_Method):
    """The save_pretrained of an adapter's config, and the adapter's copy of the encoder beside it."""

    def __call__(self, save_directory: str | Path, **options: Any) -> Any:
        result = self._original("save_pretrained", save_directory, **options)
        attachment = getattr(self._base(), "prefixmem_attachment", None)
        encoders = getattr(getattr(attachment, "encoder", None), "modules_to_save", {})
        (adapter,) = self._more
        if adapter in encoders:
            save_encoder(encoders[adapter], Path(save_directory) / FOLDER, attachment.vocabulary)
        return result
