"""Microbenchmarks of prefixmem_fast: `python -m bench` on this machine, `python bench/gpu.py` for everything on a GPU."""
