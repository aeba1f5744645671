"""Optimizers whose step costs what the touched rows cost, and one call for a whole model with an encoder.

rules.py      the optimizers in plain PyTorch: the definitions
rows.py       SGD, RowWiseAdagrad, RowWiseAdam, LazyAdam
rounding.py   stochastic rounding of bfloat16 tables
"""

from .rows import SGD, LazyAdam, RowOptimizer, RowWiseAdagrad, RowWiseAdam

__all__ = ["SGD", "LazyAdam", "RowOptimizer", "RowWiseAdagrad", "RowWiseAdam"]
