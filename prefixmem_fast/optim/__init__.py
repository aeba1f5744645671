"""Optimizers whose step costs what the touched rows cost, and one call for a whole model with an encoder.

rows.py    SGD, RowWiseAdagrad, RowWiseAdam, LazyAdam; `operation/rules.py` defines what they do to a row
model.py   for_model: rows one way, everything else by AdamW
clip.py    clip_grad_norm_ over dense and sparse gradients
"""

from .clip import clip_grad_norm_
from .model import ModelOptimizer, for_model
from .rows import SGD, LazyAdam, RowOptimizer, RowWiseAdagrad, RowWiseAdam

__all__ = [
    "SGD",
    "LazyAdam",
    "ModelOptimizer",
    "RowOptimizer",
    "RowWiseAdagrad",
    "RowWiseAdam",
    "clip_grad_norm_",
    "for_model",
]
