"""What code a stage can reach: the import closure of its module inside the project, and its digest.

The closure follows every import statement, those inside functions too, because stages import
heavy libraries late. Imports under ``if TYPE_CHECKING:`` do not run and do not count. A digest is
taken of the syntax tree without docstrings, so that a comment or a reformatted line re-runs
nothing; files beside a module that bear its name (``page.html.j2`` of ``page.py``) belong to it.
"""

from __future__ import annotations

import ast
import functools
import hashlib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
PACKAGES = ("components",)


def module_file(module: str, root: Path = ROOT) -> Path | None:
    """The file of a dotted module of the project, or None if the project has no such module."""
    base = root.joinpath(*module.split("."))
    for candidate in (base.with_suffix(".py"), base / "__init__.py"):
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
        if name in reached or module_file(name, root) is None:
            continue
        reached.add(name)
        waiting.extend(_imports(name, root))
        if "." in name:
            waiting.append(name.rpartition(".")[0])
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
    return sorted(
        other
        for other in file.parent.glob(f"{file.stem}.*")
        if other != file and other.is_file() and other.suffix != ".pyc"
    )


@functools.cache
def _parse(file: Path, modified_ns: int) -> ast.Module:
    return ast.parse(file.read_bytes(), str(file))


def _tree(file: Path) -> ast.Module:
    return _parse(file, file.stat().st_mtime_ns)


def _imports(module: str, root: Path) -> set[str]:
    file = module_file(module, root)
    assert file is not None
    is_package = file.name == "__init__.py"
    package = module if is_package else module.rpartition(".")[0]
    found: set[str] = set()
    for node in _running_nodes(_tree(file)):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parent = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parent, base] if base else parent)
            found.add(base)
            # `from package import module` names a module; `from module import name` does not.
            found.update(f"{base}.{alias.name}" for alias in node.names)
    return {name for name in found if name.split(".")[0] in PACKAGES}


def _running_nodes(tree: ast.AST) -> list[ast.AST]:
    nodes: list[ast.AST] = []
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
            for branch in child.orelse:
                nodes += [branch, *_running_nodes(branch)]
            continue
        nodes += [child, *_running_nodes(child)]
    return nodes


def _module_digest(module: str, root: Path) -> str:
    file = module_file(module, root)
    assert file is not None
    digest = hashlib.sha256(_normalised(file, file.stat().st_mtime_ns).encode())
    for companion in _companions(file):
        digest.update(companion.name.encode() + b"\0" + companion.read_bytes())
    return digest.hexdigest()


@functools.cache
def _normalised(file: Path, modified_ns: int) -> str:
    tree = ast.parse(file.read_bytes(), str(file))
    for node in ast.walk(tree):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        first = node.body[0] if node.body else None
        if (
            isinstance(first, ast.Expr)
            and isinstance(first.value, ast.Constant)
            and isinstance(first.value.value, str)
        ):
            node.body = node.body[1:]
    return ast.dump(tree)
