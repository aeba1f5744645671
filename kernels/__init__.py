"""Triton kernels of PrefixMem, one file a family. Installed as `prefixmem_fast.kernels`.

    address.py    the hash, the rows and the codes in registers; what all kernels share
    forward.py    S over codes and over a token stream
    backward.py   dense gradient by float32 atomics
    segment.py    dense gradient by a stable sort and fixed-order sums: the deterministic mode
    rows.py       the rows themselves

Set TRITON_INTERPRET=1 before triton is imported to run every kernel on CPU tensors.
"""
