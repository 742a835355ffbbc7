"""The rules of the layout, as tests: who may import whom, where Spark lives, sizes, names."""

import ast
import importlib.metadata
import importlib.util
import re
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAY_IMPORT: dict[str, set[str]] = {
    "pipeline": set(),
    "filters": {"pipeline"},
    "training": {"pipeline"},
    "eval38": {"pipeline", "training"},
    "jobs": {"pipeline", "filters", "training", "eval38"},
}
SPARK_FILES = {"pipeline/spark.py", "pipeline/spark_session.py"}
OPEN_CLIP_FILES = {"pipeline/clip_model.py"}
BANNED_NAMES = re.compile(r"(^|_)(utils?|helpers?|common|misc|core|base|manager)(_|$)")
MAX_FILE_LINES, MAX_FUNCTION_LINES, MAX_MEDIAN_FUNCTION_LINES = 400, 60, 12


def source_files() -> list[Path]:
    return sorted(f for package in MAY_IMPORT for f in (ROOT / package).rglob("*.py"))


def relative(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


def imported_names(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def functions(file: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node


def lines_of(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


def test_there_is_something_to_check() -> None:
    assert len(source_files()) > 40


def test_no_other_distribution_owns_our_names() -> None:
    owners = importlib.metadata.packages_distributions()
    for package in MAY_IMPORT:
        assert set(owners.get(package, ["winnow"])) == {"winnow"}, f"{package}: {owners[package]}"
        spec = importlib.util.find_spec(package)
        assert spec and spec.origin and Path(spec.origin).is_relative_to(ROOT), spec


@pytest.mark.parametrize("file", source_files(), ids=relative)
def test_imports_go_one_way(file: Path) -> None:
    package = relative(file).split("/")[0]
    ours = {name.split(".")[0] for name in imported_names(file)} & set(MAY_IMPORT)
    assert ours <= MAY_IMPORT[package] | {package}


def test_only_the_edge_imports_pyspark() -> None:
    users = {relative(f) for f in source_files() if any(n.split(".")[0] == "pyspark" for n in imported_names(f))}
    assert {u for u in users if not u.startswith("jobs/")} <= SPARK_FILES


def test_one_door_to_open_clip() -> None:
    users = {relative(f) for f in source_files() if any(n.split(".")[0] == "open_clip" for n in imported_names(f))}
    assert users == OPEN_CLIP_FILES


def test_jobs_are_not_named_like_another_module() -> None:
    """spark-submit puts jobs/ first on the path, so jobs/select.py would hide the standard library's."""
    installed = {name for name in importlib.metadata.packages_distributions() if name not in MAY_IMPORT}
    taken = set(sys.stdlib_module_names) | installed | set(MAY_IMPORT)
    assert {f.stem for f in (ROOT / "jobs").glob("*.py")} & (taken - {"__init__", "__main__"}) == {
        "__init__",
        "__main__",
    } & taken


@pytest.mark.parametrize("file", source_files(), ids=relative)
def test_files_are_small_and_say_what_they_are(file: Path) -> None:
    text = file.read_text()
    assert text.count("\n") <= MAX_FILE_LINES
    assert ast.get_docstring(ast.parse(text)), "a module docstring says which arrow or noun of the line it is"
    assert not BANNED_NAMES.search(file.stem)
    long = [f"{node.name}: {lines_of(node)}" for node in functions(file) if lines_of(node) > MAX_FUNCTION_LINES]
    assert not long


def test_functions_are_short_in_the_middle() -> None:
    assert statistics.median(lines_of(n) for f in source_files() for n in functions(f)) <= MAX_MEDIAN_FUNCTION_LINES


def test_public_functions_have_docstrings() -> None:
    bare = [
        f"{relative(file)}:{node.name}"
        for file in source_files()
        for node in ast.parse(file.read_text()).body
        if isinstance(node, (ast.FunctionDef, ast.ClassDef))
        and not node.name.startswith("_")
        and not ast.get_docstring(node)
    ]
    assert not bare


def test_tests_are_not_packages() -> None:
    assert not list((ROOT / "tests").rglob("__init__.py"))


def test_every_verb_has_a_job() -> None:
    from jobs import VERBS

    for module, _ in VERBS.values():
        assert (ROOT / (module.replace(".", "/") + ".py")).is_file()


def test_nothing_big_is_tracked() -> None:
    big = [p for p in ROOT.rglob("*") if p.is_file() and p.stat().st_size > 1_000_000]
    assert not [p for p in big if not any(part.startswith((".", "demo-out")) for part in p.relative_to(ROOT).parts)]
