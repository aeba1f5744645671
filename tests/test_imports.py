"""Every import of the project, those inside functions included, names something that exists."""

import ast

import pytest

from tests.helpers import imports
from tests.helpers.imports import FILES, ROOT, problems_of


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_every_import_names_something(file):
    assert problems_of(file) == []


def test_a_broken_import_is_seen(monkeypatch):
    """Inside a function, of a module and of what it defines."""
    broken = "def step():\n    from ..kernels import updates\n    from .. import _checks\n    _checks.positif('x', 1)\n"
    file = ROOT / "prefixmem_fast" / "optim" / "broken.py"  # never written: only its name says where it stands
    tree_of = imports.tree_of
    monkeypatch.setattr(imports, "tree_of", lambda f: ast.parse(broken) if f == file else tree_of(f))
    assert problems_of(file) == [
        "2: prefixmem_fast.kernels has no updates",
        "4: prefixmem_fast._checks has no positif",
    ]
