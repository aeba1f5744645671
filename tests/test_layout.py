"""The tree: imports go one way, without a circle, and an installation holds what a checkout holds."""

import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from tests.helpers.imports import MODULES, ROOT, imports_of

# From the ground up: a file imports its own folder and those before it.
FLOORS = (
    "ground",
    "addressing",
    "kernels",
    "operation",
    "sid",
    "encoder",
    "optim",
    "distributed",
    "huggingface",
    "recommender",
    "serving",
    "checks",
    "package",
    "examples",
    "bench",
    "cli",
)
FILES = [file for name, file in MODULES.items() if not name.startswith("tests")]


def floor_of(file: Path) -> str:
    parts = file.relative_to(ROOT).parts
    if parts[0] == "prefixmem_fast" and len(parts) == 2:
        return "package" if parts[1] == "__init__.py" else "ground"
    return parts[1] if parts[0] == "prefixmem_fast" else parts[0]


@cache
def arrows(file: Path) -> frozenset[Path]:
    """The files of the project that a file imports, inside functions and for type checkers too."""
    return frozenset(MODULES[name] for name in imports_of(file)) - {file}


@pytest.mark.parametrize("file", sorted(set(FILES)), ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_go_down(file):
    own = FLOORS.index(floor_of(file))
    above = [str(other.relative_to(ROOT)) for other in arrows(file) if FLOORS.index(floor_of(other)) > own]
    assert above == []


def test_no_circle_between_files():
    done: set[Path] = set()

    def visit(file: Path, path: tuple[Path, ...]) -> None:
        assert file not in path, " -> ".join(str(f.relative_to(ROOT)) for f in (*path, file))
        if file not in done:
            for other in arrows(file):
                visit(other, (*path, file))
            done.add(file)

    for file in FILES:
        visit(file, ())


def test_an_installation_holds_every_file(tmp_path):
    """What setup.py would put into a wheel, from a copy of the tree."""
    for name in ("setup.py", "README.md", "pyproject.toml", "prefixmem_fast", "kernels", "bench"):
        source = ROOT / name
        copy = shutil.copytree if source.is_dir() else shutil.copy
        copy(source, tmp_path / name)
    command = [sys.executable, "setup.py", "--quiet", "build_py", "--build-lib", "built"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    built = {str(file.relative_to(tmp_path / "built")) for file in (tmp_path / "built").rglob("*.py")}
    tree = {str(file.relative_to(ROOT)) for file in set(FILES)}
    assert built == {name if name.startswith("prefixmem_fast") else f"prefixmem_fast/{name}" for name in tree}
    code = "import prefixmem_fast.kernels, prefixmem_fast.bench; print(prefixmem_fast.kernels.__file__)"
    found = subprocess.run([sys.executable, "-c", code], cwd=tmp_path / "built", check=True, capture_output=True)
    assert Path(found.stdout.decode().strip()) == tmp_path / "built/prefixmem_fast/kernels/__init__.py"


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    """What setup.py would hand out, from a copy of the tree, unpacked."""
    folder = tmp_path_factory.mktemp("sdist")
    made_there = shutil.ignore_patterns(
        *("__pycache__", ".git", ".venv*", "*.egg-info", "runs", "build", "dist", "shared", ".hypothesis", ".*_cache")
    )
    shutil.copytree(ROOT, folder / "tree", ignore=made_there)
    command = [sys.executable, "setup.py", "--quiet", "sdist", "--dist-dir", str(folder)]
    subprocess.run(command, cwd=folder / "tree", check=True, capture_output=True)
    (archive,) = folder.glob("*.tar.gz")
    shutil.unpack_archive(archive, folder / "unpacked", filter="data")
    (unpacked,) = (folder / "unpacked").iterdir()
    return unpacked


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="an unpacked sdist has no list to compare with")
def test_an_sdist_holds_what_git_does(sdist):
    """But for what builds and checks the project elsewhere."""

    def listed(*options):
        names = subprocess.run(["git", "ls-files", *options], cwd=ROOT, check=True, capture_output=True, text=True)
        return {name for name in names.stdout.splitlines() if (ROOT / name).is_file()}

    found = {str(file.relative_to(sdist)) for file in sdist.rglob("*") if file.is_file()}
    tracked = {name for name in listed() if not name.startswith((".ci/", ".github/", ".pre-commit"))}
    assert tracked - found == set()
    assert {"tests/conftest.py", "tests/helpers/strategies.py", "CHANGELOG.md", "constraints.txt"} <= found
    written = {name for name in found if name in ("PKG-INFO", "setup.cfg") or ".egg-info/" in name}
    assert found - tracked - written <= listed("--others", "--exclude-standard")


def test_what_is_shown_elsewhere_links_to_nothing_that_is_not_there(sdist):
    text = (sdist / "PKG-INFO").read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    assert "https://arxiv.org/abs/2606.00324" in links
    assert all(link.startswith("https://") for link in links)
    assert "*Picture: one Semantic ID on its way through the encoder (docs/images/encoder.svg).*" in text
    assert "Hugging Face (docs/huggingface.md)" in text


def test_a_checkout_behaves_like_an_installation(tmp_path):
    """Without an installation: the path of the package reaches kernels/ and bench/ beside it."""
    code = "import prefixmem_fast.kernels, prefixmem_fast.bench; print(prefixmem_fast.kernels.__file__)"
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r}); {code}"]
    found = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    assert Path(found.stdout.decode().strip()) == ROOT / "kernels/__init__.py"
