import dataclasses
from pathlib import Path

import pytest

from pipeline.errors import StageError
from pipeline.manifest import Counts, Manifest, add_counts, changes, find_done, read_manifest, write_manifest

MADE = Manifest(
    stage="select",
    config={"steps": [{"name": "top", "fraction": 0.3}]},
    parents={"scores": "abc"},
    counts={"top": Counts(read=10, kept=3, dropped={"top": 6, "no_score": 1})},
    facts={"rows": 3},
)


def test_round_trip_and_same_bytes(tmp_path: Path) -> None:
    write_manifest(str(tmp_path), MADE)
    first = (tmp_path / "manifest.json").read_bytes()
    assert read_manifest(str(tmp_path)) == MADE
    write_manifest(str(tmp_path), MADE)
    assert (tmp_path / "manifest.json").read_bytes() == first


def test_lost_row_is_refused(tmp_path: Path) -> None:
    bad = dataclasses.replace(MADE, counts={"top": Counts(read=10, kept=3, dropped={"top": 6})})
    with pytest.raises(StageError, match=r"10 rows in, 9 accounted for"):
        write_manifest(str(tmp_path), bad)
    assert not list(tmp_path.iterdir())


def test_identity_is_what_was_asked_not_what_came_out() -> None:
    assert dataclasses.replace(MADE, facts={}, counts={}).identity == MADE.identity
    for other in ({"stage": "x"}, {"config": {}}, {"parents": {}}, {"format_version": 0}):
        assert dataclasses.replace(MADE, **other).identity != MADE.identity


def test_change_is_named_and_not_reused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_manifest(str(tmp_path), MADE)
    assert find_done(str(tmp_path), MADE) == MADE
    other = dataclasses.replace(MADE, config={"steps": [{"name": "top", "fraction": 0.4}]}, parents={})
    assert find_done(str(tmp_path), other) is None
    assert "config.steps.0.fraction changed from 0.3 to 0.4" in caplog.text
    assert changes(MADE, other)[1] == "parents.scores is gone"
    assert find_done(str(tmp_path / "none"), MADE) is None


def test_broken_manifest_says_so(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"stage": ')
    with pytest.raises(StageError, match="not a winnow manifest"):
        read_manifest(str(tmp_path))


def test_counts_add_up() -> None:
    total = add_counts([Counts(read=3, kept=1, dropped={"b": 1, "a": 1}), Counts(read=2, kept=1, failed={"x": 1})])
    assert total == Counts(read=5, kept=2, dropped={"a": 1, "b": 1}, failed={"x": 1})
    assert list(total.dropped) == ["a", "b"]
    total.check("sum")
