"""What the files of the project import and define, read as text."""

import ast
import importlib
import importlib.util
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = ("prefixmem_fast", "kernels", "bench", "tests")
FILES = sorted(file for package in PACKAGES for file in (ROOT / package).rglob("*.py"))
# Peers of the benchmarks, what a GPU machine alone has, and what has an environment of its own.
OPTIONAL = ("deepspeed", "fbgemm_gpu", "liger_kernel", "playwright", "pynvml", "torchrec", "vllm")


def module_name(file: Path) -> str:
    parts = list(file.relative_to(ROOT).with_suffix("").parts)
    if parts[0] == "kernels":
        parts.insert(0, "prefixmem_fast")
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(file): file for file in FILES}
MODULES |= {f"prefixmem_fast.{name}": file for name, file in MODULES.items() if name.split(".")[0] == "bench"}


@cache
def tree_of(file: Path) -> ast.Module:
    """The file's code, and at its end the code that it hands to other processes as strings."""
    tree = ast.parse(file.read_text())
    for node in list(ast.walk(tree)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and "\nimport " in f"\n{node.value}":
            try:
                tree.body += [ast.If(test=node, body=ast.parse(node.value).body, orelse=[])]
            except SyntaxError:
                continue  # a sentence
    return tree


@cache
def names_of(module: str) -> frozenset[str]:
    """What a module of the project defines at its top level, and its submodules."""
    names = {name.rpartition(".")[2] for name in MODULES if name.rpartition(".")[0] == module}
    pending = list(tree_of(MODULES[module]).body)
    while pending:
        node = pending.pop()
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
            if node.name == "__getattr__":  # names that are found when they are asked for
                names |= {n.value for n in ast.walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, str)}
                names |= set(_lazy_names(module))
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
        elif isinstance(node, (ast.If, ast.Try, ast.With, ast.For)):
            inner = (ast.stmt, ast.excepthandler)
            pending += [child for child in ast.iter_child_nodes(node) if isinstance(child, inner)]
        elif isinstance(node, ast.excepthandler):
            pending += node.body
        else:
            names |= {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    return frozenset(names)


def _lazy_names(module: str) -> list[str]:
    return list(getattr(importlib.import_module(module), "__all__", ()))


def source_of(node: ast.ImportFrom, file: Path) -> str:
    """The module that an import names, absolute."""
    if not node.level:
        return node.module
    package = module_name(file).split(".")
    package = package if file.name == "__init__.py" else package[:-1]
    package = package[: len(package) - node.level + 1]
    return ".".join([*package, *([node.module] if node.module else [])])


def is_ours(module: str) -> bool:
    return module.split(".")[0] in PACKAGES


def imports_of(file: Path) -> set[str]:
    """The modules of the project that a file imports."""
    modules = set()
    for node in ast.walk(tree_of(file)):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names if alias.name in MODULES}
        elif isinstance(node, ast.ImportFrom) and is_ours(source := source_of(node, file)):
            for alias in node.names:
                name = f"{source}.{alias.name}"
                modules.add(name if name in MODULES else source)
    return modules & set(MODULES)


def assigned_in(file: Path) -> set[str]:
    """Names that the file uses for values too, so that an attribute of theirs may be of those."""
    nodes = list(ast.walk(tree_of(file)))
    stored = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    return stored | {node.arg for node in nodes if isinstance(node, ast.arg)}


def problems_of(file: Path) -> list[str]:
    problems, modules = [], {}  # modules: what the file calls a module of the project
    for node in ast.walk(tree_of(file)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if is_ours(alias.name):
                    if alias.name not in MODULES:
                        problems.append(f"{node.lineno}: there is no module {alias.name}")
                elif not exists(alias.name):
                    problems.append(f"{node.lineno}: {alias.name} cannot be imported")
        elif isinstance(node, ast.ImportFrom):
            source = source_of(node, file)
            if not is_ours(source):
                missing = [alias.name for alias in node.names if not exists(source, alias.name)]
                problems += [f"{node.lineno}: {source} has no {name}" for name in missing]
            elif source not in MODULES:
                problems.append(f"{node.lineno}: there is no module {source}")
            else:
                for alias in node.names:
                    if alias.name not in names_of(source):
                        problems.append(f"{node.lineno}: {source} has no {alias.name}")
                    if f"{source}.{alias.name}" in MODULES:
                        modules[alias.asname or alias.name] = f"{source}.{alias.name}"
    modules = {name: module for name, module in modules.items() if name not in assigned_in(file)}
    for node in ast.walk(tree_of(file)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
            module = modules[node.value.id]
            if node.attr not in names_of(module) and not node.attr.startswith("__"):
                problems.append(f"{node.lineno}: {module} has no {node.attr}")
    return problems


@cache
def exists(module: str, name: str | None = None) -> bool:
    """Whether a module of another package has a name; one that is not installed here cannot be asked."""
    root = module.split(".")[0]
    if root in OPTIONAL or module == "__future__":
        return True
    if importlib.util.find_spec(root) is None:
        return False
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError:
        return False
    return name is None or hasattr(found, name) or importlib.util.find_spec(f"{module}.{name}") is not None
