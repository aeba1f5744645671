"""Saving a model saves its encoder: what `attach` adds to save_pretrained and to PEFT's load_adapter.

A model's own weights files hold the encoder's tensors among the model's, so the Trainer resumes from them. PEFT saves
its adapters alone, so the encoder is saved beside them. Either way the folder ``prefixmem`` says what was attached.
"""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

from torch import nn

from ..checkpoint import FOLDER
from ..encoder.saving import load_weights, save_encoder
from .hooks import unwrapped


def watch_files(model: nn.Module, base: nn.Module) -> None:
    """`base` is the model of transformers in `model`, or `model` itself."""
    base.save_pretrained = _SaveModel(base, base)
    if base is not model:
        model.save_pretrained, model.load_adapter = _SaveAdapters(model, base), _LoadAdapters(model, base)


def leave_files(model: nn.Module, base: nn.Module) -> None:
    for module in (model, base):
        for name in ("save_pretrained", "load_adapter"):
            if isinstance(module.__dict__.get(name), _Method):
                del module.__dict__[name]


class _Method:
    """A method of one model, held weakly; a copy of the model gets its own."""

    def __init__(self, model: nn.Module, base: nn.Module) -> None:
        self._model, self._base = weakref.ref(model), weakref.ref(base)

    def __reduce__(self) -> Any:
        return type(self), (self._model(), self._base())

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return type(self)(*(memo.get(id(ref()), ref()) for ref in (self._model, self._base)))

    def _original(self, name: str, *args: Any, **options: Any) -> Any:
        model = self._model()
        if model is None:
            raise RuntimeError(f"the model of this {name} is gone; keep it in a variable")
        return getattr(type(model), name)(model, *args, **options)

    def _save(self, folder: str | Path, *, weights: bool) -> None:
        attachment = getattr(self._base(), "prefixmem_attachment", None)
        if attachment is not None:
            encoder = unwrapped(attachment.encoder)
            save_encoder(encoder, Path(folder) / FOLDER, attachment.vocabulary, weights=weights)


class _SaveModel(_Method):
    def __call__(self, save_directory: str | Path, is_main_process: bool = True, **options: Any) -> Any:
        """The model's save_pretrained, and beside it what attaches the encoder again."""
        if options.get("push_to_hub"):
            raise ValueError("push_to_hub=True would leave the encoder's folder out; call model.push_to_hub() instead")
        result = self._original("save_pretrained", save_directory, is_main_process=is_main_process, **options)
        if is_main_process:
            readable = options.get("safe_serialization", True) is not False and options.get("variant") is None
            self._save(save_directory, weights=not readable)
        return result


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
            load_weights(unwrapped(attachment.encoder), Path(model_id) / FOLDER)
        return result
