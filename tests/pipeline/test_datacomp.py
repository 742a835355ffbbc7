"""CommonPool's metadata as DataComp leaves it, healthy and with each failure that its users met."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from made_datacomp import A, B, cut, rewrite, uids_of

from pipeline.datacomp.metadata import COLUMNS, check_metadata
from pipeline.datacomp.tables import parse_column
from pipeline.errors import PoolError
from pipeline.manifest import Counts
from pipeline.subset import read_subset
from pipeline.uid import format_uids


def metadata_table(uids: list[str], **columns: Any) -> pa.Table:
    """A parquet as the hub has it."""
    num = len(uids)
    made = {"uid": uids, "url": ["https://x.org/1"] * num, "text": ["a red square"] * num, "sha256": ["0" * 64] * num}
    made |= {
        "original_width": [640] * num,
        "original_height": [480] * num,
        "face_bboxes": [[[0.1, 0.1, 0.2, 0.2]]] * num,
    }
    made |= {name: [0.25] * num for name in COLUMNS if name.startswith("clip_")}
    types = {name: kind for name, (kind, _) in COLUMNS.items()}
    arrays = {name: pa.array(made[name], types[name]) for name in types}
    return pa.table(arrays | columns)


def write_arrays(path: Path, num: int, **other: np.ndarray) -> None:
    widths = {"b32_img": 4, "b32_txt": 4, "l14_img": 6, "l14_txt": 6, "dedup": 5}
    np.savez(path, **{name: np.zeros((num, width), np.float16) for name, width in widths.items()} | other)


@pytest.fixture
def metadata(tmp_path: Path) -> Path:
    """Two files of five rows, with npz."""
    folder = tmp_path / "data" / "metadata"
    folder.mkdir(parents=True)
    for name, start in ((A, 0), (B, 5)):
        pq.write_table(metadata_table(uids_of(start, 5)), folder / f"{name}.parquet")
        write_arrays(folder / f"{name}.npz", 5)
    return folder


def test_healthy_metadata(metadata: Path, tmp_path: Path) -> None:
    section = check_metadata(str(metadata), str(tmp_path / "scratch"))
    assert section.findings == [] and section.counts == Counts(read=10, kept=10)
    assert section.numbers == {"files": 2, "npz files": 2, "rows": 10, "uids": 10, "repeated": 0}
    assert section.facts["columns"]["uid"] == {"string": 2} and section.facts["arrays"]["l14_img"] == {"float16 x 6": 2}
    assert section.uids and format_uids(read_subset(section.uids)).to_pylist() == sorted(uids_of(0, 10))


def set_column(name: str, values: list[Any], kind: pa.DataType) -> Callable[[pa.Table], pa.Table]:
    def change(table: pa.Table) -> pa.Table:
        return table.set_column(table.column_names.index(name), name, pa.array(values, kind))

    return change


def drop(*names: str) -> Callable[[Path], None]:
    return lambda folder: rewrite(folder, lambda table: table.drop_columns(list(names)))


def hold(name: str, values: list[Any], kind: pa.DataType | None = None) -> Callable[[Path], None]:
    return lambda folder: rewrite(folder, set_column(name, values, kind or pa.string()))


def move_into_part(folder: Path) -> None:
    (folder / "part_3").mkdir()
    for suffix in (".parquet", ".npz"):
        (folder / f"{B}{suffix}").rename(folder / "part_3" / f"{B}{suffix}")


def spoil_pages(folder: Path) -> None:
    """A footer that can be read over data that cannot: what a file system leaves after a crash."""
    path = folder / f"{B}.parquet"
    content = bytearray(path.read_bytes())
    content[4:300] = bytes(296)
    path.write_bytes(bytes(content))


def spoil_faces(path: Path) -> None:
    """Of a sound parquet, make all pages of face_bboxes unreadable."""
    footer = pq.read_metadata(path).row_group(0)
    column = next(c for c in map(footer.column, range(footer.num_columns)) if c.path_in_schema.startswith("face"))
    start = column.dictionary_page_offset or column.data_page_offset
    content = bytearray(path.read_bytes())
    content[start : start + column.total_compressed_size] = bytes(column.total_compressed_size)
    path.write_bytes(content)


METADATA_FAILURES: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "cut": (lambda f: cut(f / f"{B}.parquet"), "broken", f"1 of 2 files ({B}.parquet: "),
    "empty": (lambda f: (f / f"{B}.parquet").write_bytes(b""), "broken", "cannot be read"),
    "pages": (spoil_pages, "broken", "cannot be read"),
    "no uid": (drop("uid"), "broken", "lack column 'uid'"),
    "no text": (drop("text"), "broken", "lack column 'text'"),
    "no score": (drop("clip_l14_similarity_score"), "warning", "lack column 'clip_l14_similarity_score': clip_score"),
    "double": (hold("original_width", [1.0] * 5, pa.float64()), "warning", "'original_width' is double in 1 files"),
    "null text": (hold("text", ["a", None, "b", None, "c"]), "warning", "2 rows have a null caption"),
    "null url": (hold("url", ["a", None, "b", "d", "c"]), "warning", "1 rows have a null 'url'"),
    "bad uid": (hold("uid", [*uids_of(5, 3), None, "no uid"]), "warning", "2 rows have no uid of 32 hex digits"),
    "repeated": (hold("uid", uids_of(2, 5)), "warning", "3 rows have the uid of another row"),
    "short npz": (lambda f: write_arrays(f / f"{B}.npz", 4), "broken", f"({B}.npz: 4 rows, 5 in the parquet)"),
    "uneven npz": (lambda f: write_arrays(f / f"{B}.npz", 5, dedup=np.zeros((6, 2), "f2")), "broken", "6 rows, 5 in"),
    "cut npz": (lambda f: cut(f / f"{B}.npz"), "broken", f"1 of 2 npz ({B}.npz: cannot be read as npz"),
    "few arrays": (
        lambda f: np.savez(f / f"{B}.npz", l14_img=np.zeros((5, 6), "f2")),
        "warning",
        "no b32_img, b32_txt, ",
    ),
    "no npz": (lambda f: (f / f"{B}.npz").unlink(), "warning", f"1 of 2 files ({B}.parquet) have no npz"),
    "no parquet": (lambda f: (f / f"{B}.parquet").unlink(), "warning", f"1 of 2 npz ({B}.npz) have no parquet"),
    "incomplete": (lambda f: (f / "x.incomplete").touch(), "warning", "an interrupted download left x.incomplete"),
    "cache": (lambda f: (f.parent / "hf").mkdir(), "warning", "an interrupted download left ../hf"),
    "parts": (move_into_part, "warning", f"1 of 2 files (part_3/{B}.parquet) stand in part_* folders"),
    "other": (lambda f: (f / "README.md").touch(), "note", "passed over: README.md"),
}


@pytest.mark.parametrize(("spoil", "level", "message"), METADATA_FAILURES.values(), ids=METADATA_FAILURES)
def test_what_is_wrong_with_metadata_is_named(
    metadata: Path, tmp_path: Path, spoil: Callable[[Path], object], level: str, message: str
) -> None:
    spoil(metadata)
    section = check_metadata(str(metadata), str(tmp_path / "scratch"))
    assert [(f.level, message in f.message) for f in section.findings] == [(level, True)], section.findings
    section.counts.check("metadata")
    kept = section.counts.kept
    assert section.numbers["uids"] + section.numbers["repeated"] == kept and json.dumps(section.facts, allow_nan=False)


def test_caption_serves_as_text_and_more_columns_are_noted(metadata: Path, tmp_path: Path) -> None:
    for name in (A, B):
        rewrite(
            metadata,
            lambda table: table.rename_columns(["caption" if c == "text" else c for c in table.column_names]),
            name,
        )
    found = check_metadata(str(metadata), str(tmp_path / "scratch")).findings
    assert [(f.level, f.message.split(":")[0]) for f in found] == [
        ("warning", "all 2 files lack column 'text'"),
        ("note", "columns that the hub's files do not have"),
    ]


def test_scale_says_how_much_is_missing(metadata: Path, tmp_path: Path) -> None:
    (finding,) = check_metadata(str(metadata), str(tmp_path / "scratch"), scale="small").findings
    assert finding.level == "warning" and "10 rows are 0.00% of the 12,800,000 of small" in finding.message


def test_faces_are_not_read(metadata: Path, tmp_path: Path) -> None:
    """They are the widest column, and no footer says how many are null."""
    spoil_faces(metadata / f"{B}.parquet")
    with pytest.raises((OSError, pa.ArrowException)):
        pq.read_table(metadata / f"{B}.parquet", columns=["face_bboxes"])
    assert check_metadata(str(metadata), str(tmp_path / "scratch")).findings == []


def test_nulls_are_counted_where_the_footer_does_not_say(metadata: Path, tmp_path: Path) -> None:
    table = metadata_table(uids_of(5, 5), text=pa.array(["a", None, None, "b", None]))
    pq.write_table(table, metadata / f"{B}.parquet", write_statistics=False, row_group_size=2)
    (finding,) = check_metadata(str(metadata), str(tmp_path / "scratch")).findings
    assert "3 rows have a null caption" in finding.message


@pytest.mark.parametrize("folder", ["nowhere", "empty"])
def test_no_metadata_is_an_error(tmp_path: Path, folder: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(PoolError, match="--data_dir"):
        check_metadata(str(tmp_path / folder), str(tmp_path / "scratch"))


@pytest.mark.parametrize(
    ("column", "uids", "num_bad"),
    [
        (pa.array([], pa.string()), [], 0),
        (pa.array([A, B.upper()]), [A, B], 0),
        (pa.array([f"{A[:8]}-{A[8:]}", None, "", "x" * 32, A + "0", "\u00e4" * 16]), [A], 5),
        (pa.array([A, None], pa.large_string()), [A], 1),
        (pa.array([bytes.fromhex(B), None], pa.binary(16)), [B], 1),
        (pa.array([1, 2]), [], 2),
        (pa.array([A, B, A]).dictionary_encode(), [A, B, A], 0),
    ],
)
def test_uids_are_read_from_what_holds_them(column: pa.Array, uids: list[str], num_bad: int) -> None:
    found, bad = parse_column(column)
    assert format_uids(found).to_pylist() == uids and bad == num_bad
