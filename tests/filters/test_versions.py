"""A version is part of the identity of scores and fits: code that decides values does not change behind its back.

versions.json holds, per kind of filter and of fit, its version and a hash of that code.  After a change:
  values may differ        raise `version` in the filter's build() or the fit's row of FIT_KINDS, then refresh
  values are bit-equal     refresh: `python tests/filters/test_versions.py`
"""

import ast
import hashlib
import inspect
import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from filters import TABLE
from jobs.fit_kinds import FIT_KINDS

ROOT = Path(__file__).parent.parent.parent
NOTED = Path(__file__).parent / "versions.json"
DECIDES = {
    "caption_entities": ("filters/captions.py", "filters/wordnet/words.py", "filters/wordnet/phrases.py"),
    "clip_score": (
        "filters/text_mask.py",
        "pipeline/images.py",
        "pipeline/clip_model.py",
        "pipeline/hub_files.py",
        "pipeline/tokens.py",
    ),
    "caption_length": ("filters/captions.py",),
    "metaclip": ("filters/wordnet/words.py",),
    "caption_language": (
        "filters/captions.py",
        "filters/lid/guess.py",
        "filters/lid/model.py",
        "filters/lid/tree.py",
        "filters/lid/words.py",
    ),
    "image_cluster": ("pipeline/nearest.py", "filters/vectors.py", "pipeline/embeddings.py"),
    "neg_clip_loss": ("filters/vectors.py", "pipeline/embeddings.py", "pipeline/select_draw.py"),
    "norm_sim_d": ("pipeline/uid_table.py",),
    "semdedup": ("pipeline/uid_table.py",),
    "probe": ("pipeline/probe.py", "filters/vectors.py", "pipeline/gather.py", "pipeline/embeddings.py"),
    "norm_sim": ("filters/vectors.py", "pipeline/embeddings.py"),
}
"""Files that decide values beside the filter's own."""
_CLUSTERS = ("pipeline/kmeans.py", "pipeline/nearest.py", "pipeline/gather.py", "pipeline/embeddings.py")
FITS = {
    "kmeans": _CLUSTERS,
    "semdedup": ("pipeline/semdedup.py", "pipeline/uid_table.py", *_CLUSTERS),
    "norm_sim_d": ("pipeline/norm_sim_d.py", "pipeline/uid_table.py", "pipeline/gather.py", "pipeline/embeddings.py"),
    "probe": ("pipeline/probe.py", "pipeline/gather.py", "pipeline/embeddings.py"),
}
"""Kind of fit -> files that decide what it finds, beside its function in jobs/fit_kinds.py."""


def bare(node: Any) -> Any:
    """A syntax tree as plain lists, without docstrings, comments and layout; alike on all versions of Python."""
    if isinstance(node, list):
        return [bare(n) for n in node if not (isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant))]
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = [[name, bare(value)] for name, value in ast.iter_fields(node)]
    return [type(node).__name__, *(field for field in fields if field[1] not in ([], "None"))]


def hash_code(sources: list[str]) -> str:
    return hashlib.sha256(json.dumps([bare(ast.parse(source)) for source in sources]).encode()).hexdigest()


def find_version(source: str) -> int:
    """The number in `Filter(..., version=N)`."""
    calls = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Call) and ast.unparse(n.func) == "Filter"]
    (version,) = [k.value.value for k in calls[0].keywords if k.arg == "version" and isinstance(k.value, ast.Constant)]
    return int(version)


def describe(kind: str) -> dict[str, Any]:
    files = (f"filters/{kind}.py", *DECIDES.get(kind, ()))
    sources = [(ROOT / file).read_text() for file in files]
    return {"version": find_version(sources[0]), "code": hash_code(sources), "files": list(files)}


def describe_fit(kind: str) -> dict[str, Any]:
    sources = [inspect.getsource(FIT_KINDS[kind].make), *((ROOT / file).read_text() for file in FITS[kind])]
    files = ["jobs/fit_kinds.py", *FITS[kind]]
    return {"version": FIT_KINDS[kind].version, "code": hash_code(sources), "files": files}


DESCRIBE = {row.kind: partial(describe, row.kind) for row in TABLE}
DESCRIBE |= {f"fit {kind}": partial(describe_fit, kind) for kind in FIT_KINDS}


def judge(kind: str, noted: dict[str, Any], found: dict[str, Any]) -> str | None:
    """What is to be done about a filter or a kind of fit, or None."""
    refresh = "refresh tests/filters/versions.json: python tests/filters/test_versions.py"
    if found["version"] < noted["version"]:
        return f"version of {kind} fell from {noted['version']} to {found['version']}; versions only rise."
    if found["version"] > noted["version"]:
        return f"{kind} is now version {found['version']}: {refresh}"
    if found != noted:
        return (
            f"code that decides what {kind} gives changed ({', '.join(found['files'])}), and its version is still "
            f"{noted['version']}. If any value can differ, raise `version` in {found['files'][0]}. Then {refresh}"
        )
    return None


@pytest.mark.parametrize("kind", list(DESCRIBE))
def test_values_do_not_change_behind_their_version(kind: str) -> None:
    todo = judge(kind, json.loads(NOTED.read_text())[kind], DESCRIBE[kind]())
    assert todo is None, todo


def test_nothing_is_noted_for_what_is_gone() -> None:
    assert set(json.loads(NOTED.read_text())) == DESCRIBE.keys()


CODE = 'def f(x):\n    """Doc."""\n    return x + 1\nLIMIT = 3\n"""Says what it is."""\n'


@pytest.mark.parametrize(
    ("change", "same"),
    [
        (("Doc.", "Another doc."), True),
        (("return x + 1", "return (x\n        + 1)  # one more"), True),
        (('"""Says what it is."""\n', ""), True),
        (("x + 1", "x + 2"), False),
        (("LIMIT = 3", "LIMIT = 4"), False),
        (("return x + 1", "return None"), False),
    ],
)
def test_the_hash_follows_the_code_and_nothing_else(change: tuple[str, str], same: bool) -> None:
    assert change[0] in CODE
    assert (hash_code([CODE]) == hash_code([CODE.replace(*change)])) is same


@pytest.mark.parametrize(
    ("found", "word"),
    [
        ({"version": 2, "code": "b"}, "changed .*raise `version`.*refresh"),
        ({"version": 3, "code": "b"}, "is now version 3: refresh"),
        ({"version": 1, "code": "a"}, "fell from 2 to 1"),
    ],
)
def test_a_change_is_told_with_its_remedy(found: dict[str, Any], word: str) -> None:
    noted = {"version": 2, "code": "a", "files": ["filters/f.py"]}
    assert judge("f", noted, noted) is None
    assert re.search(word, judge("f", noted, noted | found) or "")


if __name__ == "__main__":
    NOTED.write_text(json.dumps({kind: make() for kind, make in DESCRIBE.items()}, indent=1) + "\n")
