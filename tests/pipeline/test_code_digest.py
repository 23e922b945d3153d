"""An edit re-runs what can reach it and nothing else: the cache key of code, by mutation."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from components.pipeline.code_digest import (
    ROOT,
    closure_digests,
    closure_files,
    combined_digest,
    import_closure,
    module_file,
)
from components.pipeline.stage import load_registry

#: The oracle: import-linter's graph of a tree, made by another parser in another process.
GRAPH = """
import grimp, json
graph = grimp.build_graph("components", exclude_type_checking_imports=True, cache_dir=None)
imports = {m: sorted(graph.find_modules_directly_imported_by(m)) for m in graph.modules}
print(json.dumps(imports))
"""

#: What Python itself loads when a module is imported, without calling anything.
LOADED = """
import importlib, json, sys
loaded = {}
for module in sys.argv[1:]:
    for name in [n for n in sys.modules if n.split(".")[0] == "components"]:
        del sys.modules[name]
    importlib.import_module(module)
    loaded[module] = sorted(
        n for n, m in sys.modules.items()
        if n.split(".")[0] == "components" and getattr(m, "__file__", None)
    )
print(json.dumps(loaded))
"""


def python(tree: Path, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=tree,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the components, to be edited and put back."""
    root = tmp_path_factory.mktemp("tree")
    shutil.copytree(
        ROOT / "components", root / "components", ignore=shutil.ignore_patterns("__pycache__")
    )
    return root


@pytest.fixture(scope="module")
def modules(tree: Path) -> list[str]:
    """All modules of the copy."""
    files = (tree / "components").rglob("*.py")
    names = (file.relative_to(tree).with_suffix("").parts for file in files)
    return sorted(".".join(n[:-1] if n[-1] == "__init__" else n) for n in names)


@pytest.fixture(scope="module")
def stage_modules() -> list[str]:
    return sorted({stage.module for stage in load_registry().values()})


@pytest.fixture(scope="module")
def closures(tree: Path, stage_modules: list[str]) -> dict[str, set[str]]:
    """For each module of stages what the oracle says that it reaches."""
    imports: dict[str, list[str]] = json.loads(python(tree, "-c", GRAPH))

    def reach(start: str) -> set[str]:
        reached: set[str] = set()
        waiting = [start]
        while waiting:
            name = waiting.pop()
            if name not in reached and name in imports:
                reached.add(name)
                waiting += imports[name]
                # Importing a module runs the `__init__` of every package around it.
                waiting += [name.rpartition(".")[0]]
        return reached

    return {module: reach(module) for module in stage_modules}


def digests(tree: Path, stage_modules: list[str]) -> dict[str, str]:
    return {m: combined_digest(closure_digests(m, tree)) for m in stage_modules}


def test_an_edit_of_any_module_changes_exactly_the_stages_that_reach_it(
    tree: Path, modules: list[str], stage_modules: list[str], closures: dict[str, set[str]]
) -> None:
    before = digests(tree, stage_modules)
    assert len(modules) > 40
    for module in modules:
        file = module_file(module, tree)
        assert file is not None
        source = file.read_bytes()
        file.write_bytes(source + b"\n_EDITED = 1\n")
        after = digests(tree, stage_modules)
        file.write_bytes(source)
        changed = {m for m in stage_modules if before[m] != after[m]}
        assert changed == {m for m in stage_modules if module in closures[m]}, module
    assert digests(tree, stage_modules) == before


def test_every_folder_of_modules_is_a_package() -> None:
    # Without `__init__` neither the import rules nor an installed package know of its modules.
    folders = {file.parent for file in (ROOT / "components").rglob("*.py")}
    assert [f for f in sorted(folders) if not (f / "__init__.py").is_file()] == []


def test_the_closure_holds_every_module_that_python_loads(
    tree: Path, stage_modules: list[str]
) -> None:
    for module, loaded in json.loads(python(tree, "-c", LOADED, *stage_modules)).items():
        assert set(loaded) <= set(import_closure(module, tree)), module


def test_no_stage_reaches_the_command_line_or_the_runner(stage_modules: list[str]) -> None:
    # Otherwise an edit of how stages are run would train every model anew.
    machinery = {f"components.pipeline.{name}" for name in ("cli", "runner", "prefect_flow", "dvc")}
    for module in stage_modules:
        assert not machinery & set(import_closure(module)), module


def reworded(source: str) -> str:
    """The same program: other comments, docstrings and layout."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef | ast.Module):
            if ast.get_docstring(node) is not None:
                node.body[0] = ast.Expr(ast.Constant("Other words."))
            elif not isinstance(node, ast.Module):
                node.body.insert(0, ast.Expr(ast.Constant("Words where there were none.")))
    return "# A comment.\n" + ast.unparse(ast.fix_missing_locations(tree)) + "\n\n# The end.\n"


def test_comments_docstrings_and_layout_change_nothing(
    tree: Path, modules: list[str], stage_modules: list[str], tmp_path: Path
) -> None:
    copy = tmp_path / "reworded"
    shutil.copytree(tree, copy)
    for module in modules:
        file = module_file(module, copy)
        assert file is not None
        file.write_text(reworded(file.read_text()))
    assert digests(copy, stage_modules) == digests(tree, stage_modules)


def test_every_single_statement_counts(tree: Path, tmp_path: Path) -> None:
    source = (tree / "components/pipeline/storage.py").read_text()
    whole = digest_of(tmp_path, source)
    statements = 0
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.stmt) or isinstance(node, ast.Pass) or is_text(node):
            continue
        statements += 1
        assert digest_of(tmp_path, without(source, node)) != whole, ast.unparse(node)
    assert statements > 80


def is_text(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def without(source: str, statement: ast.stmt) -> str:
    lines = source.splitlines(keepends=True)
    start, end = statement.lineno - 1, statement.end_lineno
    decorators = getattr(statement, "decorator_list", [])
    if decorators:
        start = decorators[0].lineno - 1
    return "".join([*lines[:start], " " * statement.col_offset + "pass\n", *lines[end:]])


def digest_of(root: Path, source: str) -> str:
    file = root / "components" / "one.py"
    file.parent.mkdir(exist_ok=True)
    file.write_text(source)
    return closure_digests("components.one", root)["components.one"]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A package with one of every kind of import."""
    files = {
        "__init__.py": "",
        "top.py": "import components.plain\n"
        "from components.package import thing\n"
        "from components.package.deep import module\n"
        "from typing import TYPE_CHECKING\n"
        "import typing\n"
        "if TYPE_CHECKING:\n    import components.only_types\n"
        "else:\n    import components.at_run_time\n"
        "if typing.TYPE_CHECKING:\n    import components.only_types\n"
        "if not TYPE_CHECKING:\n    import components.at_run_time_too\n"
        "def f():\n    from components import late\n"
        "try:\n    from . import relative\nexcept ImportError:\n    pass\n",
        **{
            f"{name}.py": ""
            for name in ("plain", "only_types", "at_run_time", "at_run_time_too", "relative")
        },
        "late.py": "import components.later",
        "later.py": "",
        "unrelated.py": "",
        "package/__init__.py": "from .sibling import thing",
        "package/sibling.py": "from ..cousin import x",
        "package/other.py": "",
        "cousin.py": "",
        # A folder without __init__ is a package all the same.
        "package/deep/module.py": "",
        # A package hides a module of its name.
        "cousin/__init__.py": "",
    }
    for name, source in files.items():
        file = tmp_path / "components" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(source)
    return tmp_path


def test_every_kind_of_import_is_followed(project: Path) -> None:
    names = [
        "",
        "at_run_time",
        "at_run_time_too",
        "cousin",
        "late",
        "later",
        "package",
        "package.deep.module",
        "package.sibling",
        "plain",
        "relative",
        "top",
    ]
    expected = tuple(f"components.{name}".rstrip(".") for name in names)
    assert import_closure("components.top", project) == expected
    assert module_file("components.cousin", project) == project / "components/cousin/__init__.py"


def test_a_cycle_of_imports_ends(tmp_path: Path) -> None:
    (tmp_path / "components").mkdir()
    (tmp_path / "components/a.py").write_text("import components.b")
    (tmp_path / "components/b.py").write_text("import components.a")
    assert import_closure("components.a", tmp_path) == ("components.a", "components.b")


def test_files_that_bear_the_name_of_a_module_belong_to_it(project: Path) -> None:
    folder = project / "components"
    (folder / "plain.html.j2").write_text("<p>")
    (folder / "plainer.html.j2").write_text("<p>")
    before = closure_digests("components.top", project)
    assert folder / "plain.html.j2" in closure_files("components.top", project)
    assert folder / "plainer.html.j2" not in closure_files("components.top", project)
    (folder / "plainer.html.j2").write_text("<b>")
    for left_by_a_tool in ("plain.py~", "plain.py.orig", "plain.pyc", "plain.pyi"):
        (folder / left_by_a_tool).write_text("old")
    assert closure_digests("components.top", project) == before
    (folder / "plain.html.j2").write_text("<b>")
    after = closure_digests("components.top", project)
    assert [m for m in after if after[m] != before[m]] == ["components.plain"]


def test_an_edit_that_keeps_size_and_time_is_seen(project: Path) -> None:
    file = project / "components" / "plain.py"
    file.write_text("x = 1")
    times = file.stat()
    before = closure_digests("components.top", project)
    file.write_text("x = 2")
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert closure_digests("components.top", project) != before


def test_the_place_of_the_project_does_not_matter(tree: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "else where"
    shutil.copytree(tree, elsewhere)
    module = "components.data.split_stage"
    assert closure_digests(module, elsewhere) == closure_digests(module, tree)


# End to end: a small project whose stages import two modules deep, run as a user runs it.

TINY_PROJECT = {
    "__init__.py": "",
    "stage.py": """
from pydantic import BaseModel
from components.pipeline.stage import stage
from components.tiny import middle

class NoParams(BaseModel):
    pass

@stage(outputs=("count",), params=NoParams)
def first(params, inputs, outputs, run):
    outputs["count"].write_json(middle.count())
    return {}
""",
    "second_stage.py": """
from pydantic import BaseModel
from components.pipeline.stage import stage

class NoParams(BaseModel):
    pass

@stage(inputs=("count",), outputs=("double",), params=NoParams)
def second(params, inputs, outputs, run):
    from components.tiny.late import twice
    outputs["double"].write_json(twice(inputs["count"].read_json()))
    return {}
""",
    "middle.py": "from components.tiny import deep\n\ndef count():\n    return len(deep.NAMES)\n",
    "deep.py": "NAMES = ['a', 'b']\n",
    "late.py": "def twice(n):\n    return 2 * n\n",
    "unrelated.py": "x = 1\n",
}

RUN_ALL = """
import sys
from pathlib import Path
from components.pipeline.params import load_params
from components.pipeline.runner import Runner, open_store
from components.pipeline.settings import Settings
from components.pipeline.stage import load_registry
settings = Settings(Path("home").absolute(), "store", "", None, None)
registry = load_registry()
runner = Runner(settings, open_store(settings), load_params(registry, file=Path("params.yaml")))
said = []
for name in ("first", "second"):
    why = runner.plan([registry[name]])[0].reason
    manifest, cached = runner.execute(registry[name])
    said.append(f"{name}: {'cached' if cached else why}")
value = runner.inputs_of(registry["second"])["count"].read_json()
print("; ".join(said), "|", value)
"""


@pytest.fixture(scope="module")
def tiny_project(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tiny project")
    (root / "components").mkdir()
    (root / "components/__init__.py").write_text("")
    shutil.copytree(tree / "components/pipeline", root / "components/pipeline")
    (root / "components/tiny").mkdir()
    for name, source in TINY_PROJECT.items():
        (root / "components/tiny" / name).write_text(source)
    (root / "params.yaml").write_text("")
    (root / "run_all.py").write_text(RUN_ALL)
    return root


def test_an_edit_two_imports_deep_runs_the_stage_and_its_dependants_again(
    tiny_project: Path,
) -> None:
    def run() -> str:
        return python(tiny_project, "run_all.py").strip()

    def edit(name: str, source: str) -> None:
        (tiny_project / "components/tiny" / name).write_text(source)

    assert run() == "first: never ran in this store; second: never ran in this store | 2"
    assert run() == "first: cached; second: cached | 2"
    edit("unrelated.py", "x = 2\n")
    edit("deep.py", "# Two names.\nNAMES = ['a',   'b']\n")
    assert run() == "first: cached; second: cached | 2"
    edit("deep.py", "NAMES = ['a', 'b', 'c']\n")
    changed = "first: code components.tiny.deep changed"
    assert run() == f"{changed}; second: input count changed | 3"
    # Other code, same outputs: the stages below stay cached.
    edit("deep.py", "NAMES = ['x', 'y', 'z']\n")
    assert run() == f"{changed}; second: cached | 3"
    edit("late.py", "def twice(n):\n    return n + n\n")
    assert run() == "first: cached; second: code components.tiny.late changed | 3"


EDIT_WHILE_RUNNING = """
from pathlib import Path
from components.pipeline.errors import StageError
import components.tiny.middle as middle
whole, file = middle.count, Path("components/tiny/deep.py")
def count_and_edit():
    file.write_text("NAMES = []")
    return whole()
middle.count = count_and_edit
try:
    exec(Path("run_all.py").read_text())
except StageError as error:
    print(error)
"""


def test_code_that_is_edited_while_it_runs_publishes_nothing(tiny_project: Path) -> None:
    deep = tiny_project / "components/tiny/deep.py"
    deep.write_text("NAMES = [1, 2, 3, 4, 5]\n")
    said = python(tiny_project, "-c", EDIT_WHILE_RUNNING)
    assert "components.tiny.deep changed while this process ran" in said
    assert "remedy:" in said
    assert python(tiny_project, "run_all.py").strip().endswith("| 0")
    deep.write_text("NAMES = [1, 2, 3, 4, 5]\n")
    assert "first: code components.tiny.deep changed" in python(tiny_project, "run_all.py")
