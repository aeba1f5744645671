"""What the tables of a catalogue cost in rows and bytes, and which place holds them, by formulas.

    prefixes of order n    P_n = K^n (1 - exp(-I / K^n))             I items of uniform codes; at most min(K^n, I)
    rows, one each         R   = H * sum_n P_n                       n up to min(N, deepest active level)
    rows of hashed tables  R   = H * sum_n T                         T rows a table
    bytes                  R * (w * b + s)                           w columns of b bytes, s bytes of optimizer state
    prefixes a row         P / T                                     of the last order
    shared in a head       1 - exp(-P / T)                           prefixes whose row there is another's too
    no row of its own      the same to the power of H                heads hash independently
    traffic of a SID       N * H * w * b read, twice that and state to train, A * H * w * b of S and of its gradient

Real codes are not uniform: fewer prefixes are live than this says.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

GPU_BYTES = {"80 GB": 80e9, "141 GB": 141e9}
HOST_BYTES, HOST_GPUS = 2e12, 8  # memory of a large host, and its GPUs
GPU_ROOM = 0.7  # share of a GPU's memory that tables may take beside a language model
HOST_ROOM = 0.8  # of a host's memory


@dataclass(frozen=True)
class CatalogueSize:
    """A catalogue and the encoder over it, at the paper's widths unless said otherwise.

    Attributes:
        items: I, of the catalogue.
        codes: K, of each level.
        orders: N.
        heads: H.
        width: w, numbers of a row.
        row_bytes: bytes of a row's numbers, w * b.
        state_bytes: bytes of optimizer state a row.
        active: A, the number of active levels.
        levels: L.
    """

    items: float
    codes: int = 2048
    orders: int = 4
    heads: int = 4
    width: int = 64
    row_bytes: int = 2 * 64  # bfloat16
    state_bytes: int = 4  # row-wise Adagrad
    active: int = 2
    levels: int = 5

    def prefixes(self) -> list[float]:
        """Distinct prefixes of each order."""
        found = []
        for n in range(1, self.orders + 1):
            load = self.items * float(self.codes) ** -n  # items a possible prefix; 0 where K^n is past float64
            found.append(self.items * (-math.expm1(-load) / load if load else 1.0))
        return found

    def exact_rows(self) -> float:
        return self.heads * sum(self.prefixes())

    def hashed_rows(self, table_rows: float) -> int:
        """Rows of all tables; an order whose prefixes all fit takes a row each (`addressing="auto"`)."""
        from ..addressing import AddressSpec

        return AddressSpec((self.codes,) * self.levels, self.orders, self.heads, int(table_rows)).total_rows

    def bytes(self, rows: float) -> float:
        """Bytes of so many rows and their optimizer state."""
        return rows * (self.row_bytes + self.state_bytes)

    def shared(self, table_rows: float) -> tuple[float, float]:
        """Share of the prefixes of the last order whose row in one head is another's too, and so in every head."""
        in_a_head = -math.expm1(-self.prefixes()[-1] / table_rows)
        return in_a_head, in_a_head**self.heads

    def read_bytes(self) -> int:
        """Bytes of the rows that the forward pass of a SID reads."""
        return self.orders * self.heads * self.row_bytes

    def trained_bytes(self) -> int:
        """Bytes a SID: rows and state in and out, S and its gradient."""
        rows = self.orders * self.heads * 2 * (self.row_bytes + self.state_bytes)
        return self.read_bytes() + rows + 2 * self.active * self.heads * self.row_bytes


def where(size: float) -> str:
    """The smallest place that holds so many bytes."""
    for name, room in GPU_BYTES.items():
        if size <= GPU_ROOM * room:
            return f"one GPU of {name}"
    for name, room in GPU_BYTES.items():
        if size <= GPU_ROOM * room * HOST_GPUS:
            return f"{HOST_GPUS} GPUs of {name}, rows divided"
    if size <= HOST_ROOM * HOST_BYTES:
        return "the memory of one host of 2 TB"
    return f"{math.ceil(size / (HOST_ROOM * HOST_BYTES))} hosts of 2 TB"


def size_text(size: float) -> str:
    """Bytes in words, in units of 1000: 3.17 GB."""
    for unit, bytes_each in (("TB", 1e12), ("GB", 1e9)):
        if size >= bytes_each:
            return f"{size / bytes_each:.3g} {unit}"
    return f"{size / 1e6:.3g} MB"
