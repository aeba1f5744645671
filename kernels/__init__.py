"""Triton kernels of PrefixMem, one file a family. Installed as `prefixmem_fast.kernels`.

    forward.py           S over codes and over a token stream
    windows.py           S of the last token of each window
    atomic_backward.py   dense gradient by float32 atomics
    sorted_backward.py   the sorting backward: a dense gradient with fixed bits, a list of touched rows, or their update
      sorted_codes.py      the sort: one serves all orders, because prefixes nest
      sorted_prefixes.py   sums over the prefixes of sorted SIDs, in blocks and over the edges of blocks
      shared_rows.py       rows that several prefixes share: found by claims, and their sums merged
      sorted_rows.py       sums over a list sorted by row: suffix mode, sparse gradients, crowded tables
      aside.py             sums put aside between launches
      update.py            what becomes of a row's sum: stored, or the optimizers' updates
    rows.py              the rows themselves
    address.py           the hash, the rows and the codes in registers   }
    tokens.py            Semantic IDs in a token stream                  } what they share
    tiles.py             tiles and launch options                        }
    settings.py          block sizes and warps, and those that were measured

Names inside the kernels: `o_` offsets, `m_` masks, `p_` pointers, `b_` blocks in registers, `i_` program indices;
BM SIDs, BH heads, BW columns of a head's row and BT tokens are the sides of a tile. Levels and orders count from 1.

Set TRITON_INTERPRET=1 before triton is imported to run every kernel on CPU tensors.
"""
