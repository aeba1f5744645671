"""Real Semantic IDs and histories, for the study of quality and for the workload "histories".

The files are those of the public repository Nishikata97/CollisionGenRec at commit 505d5be3 (MIT licence). Their reviews
are the Amazon review sets of McAuley et al. (Beauty of 2014 with its 5-core, Scientific of 2018), for research use.
This package carries none of them. They are read from the folder that PREFIXMEM_DATA or --data names, there is no
default, and a file whose SHA-256 is another is refused.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

VARIABLE = "PREFIXMEM_DATA"
SOURCE = "https://raw.githubusercontent.com/Nishikata97/CollisionGenRec/505d5be3166f7c38ae67957daf8a3b7ec7092577/data"
# name below the folder -> name below the source, SHA-256
FILES = {
    "beauty/interactions.json": (
        "Beauty/Beauty.inter.json",
        "ee5a1dbca3c8fb7651322f5b04f7a3965da655d01f6e80d366e4d60ac116b08c",
    ),
    "beauty/mql4grec.index.json": (
        "Beauty/indexes/mql4grec/Beauty.index.json",
        "1fcfb4d3686de6e8714e4e3fc65eb83242be821b64514b9b76bf607f214661ad",
    ),
    "beauty/rqvae_zcr.index.json": (
        "Beauty/indexes/rqvae_zcr/Beauty.index.json",
        "0c22e693d4c552a1f8eb2b8de94dd5a5b8ae74bc928a7dc9a3685d3249b36695",
    ),
    "scientific/interactions.json": (
        "Scientific/Scientific.inter.json",
        "32c6c01876ebecebdfabd2dbd358594be36655e9e7b168772a7a3aa3624ee1b4",
    ),
    "scientific/rqvae_zcr.index.json": (
        "Scientific/indexes/rqvae_zcr/Scientific.index.json",
        "863a1f35ad30b15b0707ad5b15dcf56adb8c86e243fe6ce3e0ed3f4bb54298ca",
    ),
    "scientific/rqvae_native.index.json": (
        "Scientific/indexes/rqvae_native/Scientific.index.json",
        "437abc79599eb3238bfc5369c86606c34bbe1f7f8897d169004fe6a75cbfa788",
    ),
    "scientific/rkmeans_zcr.index.json": (
        "Scientific/indexes/rkmeans_zcr/Scientific.index.json",
        "4a654151cc7597619a879c502f95c5470cae3c4212f8cb7128665b7a6bf00c02",
    ),
}


def checked_folder(names: Iterable[str], folder: Path | None = None) -> Path:
    """The folder of real data, where it holds the named files as their source has them.

    Args:
        folder: in place of the one that PREFIXMEM_DATA names.

    Raises:
        FileNotFoundError: no folder is named, or a file is not in it.
        ValueError: a file is another than the source's.
    """
    named = folder or os.environ.get(VARIABLE)
    if not named:
        raise FileNotFoundError(
            f"no folder of real data: set {VARIABLE} or give --data; bench/quality/README.md says how to fill it"
        )
    for name in names:
        source, digest = FILES[name]
        path, again = Path(named) / name, f"curl --create-dirs -o {Path(named) / name} {SOURCE}/{source}"
        if not path.is_file():
            raise FileNotFoundError(f"{path} is not there; get it: {again}")
        if (actual := _digest(path)) != digest:
            raise ValueError(f"{path} has the SHA-256 {actual} and not {digest}; get it again: {again}")
    return Path(named)


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
