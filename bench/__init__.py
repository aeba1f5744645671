"""Microbenchmarks: `python -m bench` on this machine, `python bench/gpu.py` for the whole suite on a GPU."""
