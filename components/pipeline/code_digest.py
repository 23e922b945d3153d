"""What code a stage can reach: the import closure of its module inside the project, and its digest.

The closure follows every import statement, those inside functions too, because stages import
heavy libraries late. Imports under ``if TYPE_CHECKING:`` do not run and do not count. A digest is
taken of the syntax tree without docstrings, so that a comment or a reformatted line re-runs
nothing; files beside a module that bear its name (``page.html.j2`` of ``page.py``) belong to it.
Files are read anew each time and only parsing is remembered, by content: a clock that stands still
between two edits hides none of them.
"""

from __future__ import annotations

import ast
import functools
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
PACKAGES = ("components",)


def module_file(module: str, root: Path = ROOT) -> Path | None:
    """The file of a dotted module of the project, or None if the project has no such module."""
    base = root.joinpath(*module.split("."))
    # In the order in which Python looks: a package hides a module of the same name.
    for candidate in (base / "__init__.py", base.with_suffix(".py")):
        if candidate.is_file():
            return candidate
    return None


def import_closure(module: str, root: Path = ROOT) -> tuple[str, ...]:
    """Names of all project modules that importing and running ``module`` can reach, sorted.

    A package's ``__init__`` runs when any module below it is imported, so it is in the closure.
    """
    reached: set[str] = set()
    waiting = [module]
    while waiting:
        name = waiting.pop()
        if name in reached:
            continue
        if "." in name:
            waiting.append(name.rpartition(".")[0])
        if module_file(name, root) is None:
            continue
        reached.add(name)
        waiting.extend(_read(name, root).imports)
    return tuple(sorted(reached))


def closure_digests(module: str, root: Path = ROOT) -> dict[str, str]:
    """Digest (hex) of every module that ``module`` can reach."""
    return {name: _module_digest(name, root) for name in import_closure(module, root)}


def combined_digest(digests: dict[str, str]) -> str:
    """One digest of a closure."""
    lines = "\n".join(f"{name} {digest}" for name, digest in sorted(digests.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def closure_files(module: str, root: Path = ROOT) -> list[Path]:
    """Files of the closure, with the data files that belong to its modules, sorted."""
    files: list[Path] = []
    for name in import_closure(module, root):
        file = module_file(name, root)
        assert file is not None
        files += [file, *_companions(file)]
    return sorted(files)


def _companions(file: Path) -> list[Path]:
    if file.name == "__init__.py":
        return []
    # `page.py~`, `page.py.orig` and `page.pyc` are left by tools and say nothing new.
    return sorted(
        other
        for other in file.parent.glob(f"{file.stem}.*")
        if not other.name.startswith(file.name) and other.is_file()
    )


@dataclass(frozen=True)
class _Module:
    """What one module imports of the project, and its syntax tree without docstrings, digested."""

    imports: frozenset[str]
    digest: str


def _read(module: str, root: Path) -> _Module:
    file = module_file(module, root)
    assert file is not None
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    return _parse(file.read_bytes(), str(file), package)


@functools.cache
def _parse(source: bytes, file: str, package: str) -> _Module:
    tree = ast.parse(source, file)
    imports = frozenset(_imports(tree, package))
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            node.body = [statement for statement in node.body if not _does_nothing(statement)]
    return _Module(imports, hashlib.sha256(ast.dump(tree).encode()).hexdigest())


def _does_nothing(statement: ast.stmt) -> bool:
    """A constant on its own: a docstring, or ``...``."""
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)


def _imports(tree: ast.Module, package: str) -> Iterator[str]:
    for node in _running_nodes(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = package.split(".")
                parent = parts[: len(parts) - node.level + 1]
                base = ".".join([*parent, base] if base else parent)
            # `from package import module` names a module; `from module import name` does not.
            names = [base, *(f"{base}.{alias.name}" for alias in node.names)]
        yield from (name for name in names if name.split(".")[0] in PACKAGES)


def _running_nodes(tree: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, ast.If) and _is_type_checking(child.test):
            for branch in child.orelse:
                yield branch
                yield from _running_nodes(branch)
            continue
        yield child
        yield from _running_nodes(child)


def _is_type_checking(test: ast.expr) -> bool:
    return (isinstance(test, ast.Name) and test.id == "TYPE_CHECKING") or (
        isinstance(test, ast.Attribute) and test.attr == "TYPE_CHECKING"
    )


def _module_digest(module: str, root: Path) -> str:
    file = module_file(module, root)
    assert file is not None
    digest = hashlib.sha256(_read(module, root).digest.encode())
    for companion in _companions(file):
        content = hashlib.sha256(companion.read_bytes()).hexdigest()
        digest.update(f"{companion.name} {content}\n".encode())
    return digest.hexdigest()
