"""Saving a model saves its encoder: what `attach` adds to save_pretrained and to PEFT's load_adapter.

A model's own weights files hold the encoder's tensors among the model's, so the Trainer resumes from them. PEFT saves
its adapters alone, so the encoder is saved beside them. Either way the folder ``prefixmem`` says what was attached.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from ..checkpoint import FOLDER, load_weights, save_encoder


def watch_files(model: nn.Module) -> None:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    base.save_pretrained = _SaveModel(base)
    if base is not model:
        model.save_pretrained, model.load_adapter = _SaveAdapters(model, base), _LoadAdapters(model, base)


def leave_files(model: nn.Module) -> None:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    for module in (model, base):
        for name in ("save_pretrained", "load_adapter"):
            if isinstance(module.__dict__.get(name), _OfModel):
                del module.__dict__[name]


class _OfModel:
    """A method of one model; a copy of the model gets its own."""

    def __init__(self, model: nn.Module, base: nn.Module | None = None) -> None:
        self.model, self.base = model, base if base is not None else model

    @property
    def _attachment(self) -> Any:
        return self.base.prefixmem_attachment


class _SaveModel(_OfModel):
    def __call__(self, save_directory: str | Path, *args: Any, is_main_process: bool = True, **options: Any) -> Any:
        """The model's save_pretrained, and beside it what attaches the encoder again."""
        save = type(self.model).save_pretrained
        result = save(self.model, save_directory, *args, is_main_process=is_main_process, **options)
        if is_main_process:
            attachment = self._attachment
            save_encoder(attachment.encoder, Path(save_directory) / FOLDER, attachment.vocabulary, weights=False)
        return result


class _SaveAdapters(_OfModel):
    def __call__(self, save_directory: str | Path, *args: Any, is_main_process: bool = True, **options: Any) -> Any:
        """The PeftModel's save_pretrained, and the encoder beside the adapters."""
        save = type(self.model).save_pretrained
        result = save(self.model, save_directory, *args, is_main_process=is_main_process, **options)
        if is_main_process:
            attachment = self._attachment
            save_encoder(attachment.encoder, Path(save_directory) / FOLDER, attachment.vocabulary)
        return result


class _LoadAdapters(_OfModel):
    def __call__(self, model_id: str, *args: Any, **options: Any) -> Any:
        """The PeftModel's load_adapter, and the encoder's weights where they lie beside the adapters."""
        result = type(self.model).load_adapter(self.model, model_id, *args, **options)
        folder = Path(model_id) / FOLDER
        if folder.is_dir():
            load_weights(self._attachment.encoder, folder)
        return result
