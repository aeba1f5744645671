"""The operation: codes, or a token stream, and the table to the memory S, and its gradient back to the table.

functions.py      what users call: prefix_rows, prefix_memory, token_memory, window_memory
operators.py      the same as torch custom operators, with their derivatives
quantized.py      the same of tables of 8 bits a number: quantized_prefix_memory, quantized_token_memory
quantization.py   a table to 8 bits a number with a scale a row, and back
row_gradients.py  the gradient as rows: grad="sparse" and grad="fused"
spent_gradient.py what stands in weight.grad after a fused update
sparse_norm.py    the norm of sparse gradients that torch lacks
table_state.py    what is known of a table between calls: its backend and its optimizer
interface.py      the functions that every backend has
backends.py       which backend runs, chosen once; each is one file:
  reference.py      plain PyTorch: the definition
  cpu.py            PyTorch that stays in a CPU's caches
  triton.py         the kernels; the one file that imports them
rules.py          what an optimizer does to a touched row: the definitions
rounding.py       stochastic rounding of bfloat16 tables
"""

from .backends import BackendError
from .functions import prefix_memory, prefix_rows, token_memory, window_memory

__all__ = ["BackendError", "prefix_memory", "prefix_rows", "token_memory", "window_memory"]
