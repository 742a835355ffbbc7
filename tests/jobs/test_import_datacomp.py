"""`winnow import-datacomp` as a user starts it: table, findings, exit codes; what select, shards and DataComp take."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from made_scores import write_scores
from made_shards import keys_of, write_all
from toy import toy_row

from jobs.import_datacomp import main
from jobs.stage_select import run_select
from pipeline.manifest import Manifest, read_manifest, write_manifest
from pipeline.select import AtLeast, Step
from pipeline.subset import read_subset
from pipeline.uid import format_uids, parse_uids

U16 = np.dtype("u8,u8")


def uids_of(*numbers: int) -> list[str]:
    return [str(toy_row(n)["uid"]) for n in numbers]


@pytest.fixture
def data(make_pool: object, tmp_path: Path) -> Path:
    """What DataComp's --data_dir holds: metadata of 32 rows, two shards with all their images, a shuffled subset."""
    pool: Path = make_pool(name="shards")  # type: ignore[operator]
    for name in ("00000000", "00000001"):
        (pool / f"{name}_stats.json").write_text(json.dumps({"count": 16, "successes": 16}))
    (tmp_path / "metadata").mkdir()
    rows = [{name: toy_row(n)[name] for name in ("uid", "url", "text")} for n in range(40)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "metadata" / f"{'0' * 32}.parquet")
    parse_uids(pa.array(uids_of(31, 2, 2, 7, 99, 35))).tofile(tmp_path / "mine.npy")
    return tmp_path


def test_the_whole_of_it(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--metadata", str(data / "metadata"), "--shards", str(data / "shards"), "--subset", str(data / "mine.npy")]
    words += ["--out", str(data / "out")]
    assert main(words) == 0
    said = capsys.readouterr().out
    for section, label, number, share in [
        ("metadata", "rows", 40, ""),
        ("metadata", "with an image", 32, "    80.00%"),
        ("shards", "success", 32, "   100.00%"),
        ("shards", "in the metadata", 32, "   100.00%"),
        ("subset mine", "uids", 5, ""),
        ("subset mine", "in the metadata", 4, "    80.00%"),
        ("subset mine", "with an image", 3, "    60.00%"),
    ]:
        after = said[said.index(f"{section}\n") :]
        assert f"  {label:24s}{number:16,}{share}\n" in after
    assert "warning  subset mine: 1 of its 5 uids are not in the metadata. Some of the metadata is missing" in said
    made = data / "out" / "subsets" / "mine.npy"
    assert format_uids(read_subset(str(made))).to_pylist() == sorted(uids_of(31, 2, 2, 7, 99, 35))
    account = json.loads((data / "out" / "import.json").read_bytes(), parse_constant=pytest.fail)
    assert str(data) not in json.dumps(account) and account["facts"]["sections"]["shards"]["numbers"]["tars"] == 2
    before = {path.name: path.read_bytes() for path in (data / "out").rglob("*.*") if path.is_file()}
    assert main(words) == 0 and set(before) == {"import.json", "mine.npy", "mine.json"}
    assert before == {path.name: path.read_bytes() for path in (data / "out").rglob("*.*") if path.is_file()}


def test_shards_are_written_from_an_imported_subset(data: Path) -> None:
    assert main(["--subset", str(data / "mine.npy"), "--out", str(data / "out")]) == 0
    uids = format_uids(read_subset(str(data / "out" / "subsets" / "mine.npy"))).to_pylist()
    facts = write_all(data / "shards", uids, data / "made", rows_per_shard=9, keys="uid")
    kept = sorted(key[:32] for keys in keys_of(data / "made") for key in keys)
    assert facts["rows"] == 4 and kept == sorted(uids_of(31, 2, 2, 7))


def test_a_subset_of_select_is_datacomps_as_it_is(tmp_path: Path) -> None:
    """resharder.py:661-673: numpy's magic, np.load mapped, dtype u8,u8.  Import changes no byte of it."""
    table = pa.table({"uid": uids_of(*range(50)), "words": pa.array([n % 7 for n in range(50)], pa.int32())})
    scores = str(write_scores(tmp_path / "scores", {"a": table[:20], "b": table[20:]}, {"words": "words"}))
    step = Step(name="long", at_least=AtLeast(by="words", value=3))
    run_select(lambda: pytest.fail("no Spark"), scores, "long", [step], str(tmp_path / "subsets"))
    made = tmp_path / "subsets" / "long.npy"
    loaded = np.load(made, mmap_mode="r")
    assert made.read_bytes()[:6] == b"\x93NUMPY" and loaded.dtype == U16 and loaded.ndim == 1
    assert loaded.tolist() == sorted(divmod(int(u, 16), 2**64) for n, u in enumerate(uids_of(*range(50))) if n % 7 >= 3)
    assert main(["--subset", str(made), "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "subsets" / "long.npy").read_bytes() == made.read_bytes()


def test_broken_files_exit_with_one_and_the_rest_is_done(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (data / "metadata" / f"{'1' * 32}.parquet").write_bytes(b"PAR1 and no more")
    (data / "list.txt").write_text("\n".join(uids_of(1, 2)))
    words = ["--metadata", str(data / "metadata"), "--out", str(data / "out")]
    words += ["--subset", str(data / "list.txt"), "--subset", str(data / "mine.npy")]
    assert main(words) == 1
    said = capsys.readouterr()
    assert "1 of 2 files (11111111111111111111111111111111.parquet: " in said.out and "list.txt is text" in said.out
    assert "2 of the findings above mean that something is broken" in said.err
    assert len(read_subset(str(data / "out" / "subsets" / "mine.npy"))) == 6
    manifest = read_manifest(str(data / "out"), name="import.json")
    assert manifest and [f["level"] for f in manifest.facts["findings"]].count("broken") == 2


def test_a_subset_that_broke_leaves_none_behind(data: Path) -> None:
    words, made = ["--subset", str(data / "mine.npy"), "--out", str(data / "out")], data / "out" / "subsets"
    assert main(words) == 0 and {path.name for path in made.iterdir()} == {"mine.npy", "mine.json"}
    (data / "mine.npy").write_text("hello")
    assert main(words) == 1 and not list(made.iterdir())
    (made / "mine.npy").write_bytes(b"precious")
    assert main(words) == 1 and (made / "mine.npy").read_bytes() == b"precious"


def test_what_was_given_is_not_deleted(data: Path) -> None:
    words, made = (
        ["--subset", str(data / "mine.npy"), "--out", str(data / "out")],
        data / "out" / "subsets" / "mine.npy",
    )
    assert main(words) == 0
    made.write_bytes(b"cut short")
    assert main(["--subset", str(made), *words[2:]]) == 1 and made.read_bytes() == b"cut short"


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ([], 2, "nothing to look through"),
        (["--shards", "nowhere"], 1, "'nowhere' has no tar"),
        (["--metadata", "nowhere"], 1, "'nowhere' is no folder"),
        (["--subset", "a/x.npy", "--scale", "small"], 2, "how many rows --metadata should have"),
        (["--subset", "a/x.npy", "--subset", "b/x.bin"], 2, "would both be subset 'x'"),
        (["--subset", "nowhere.npy"], 1, "1 of the findings above"),
    ],
)
def test_mistakes_are_explained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], code: int, message: str
) -> None:
    assert main([*words, "--out", str(tmp_path / "out")]) == code
    assert message in capsys.readouterr().err


def test_what_others_made_is_left_alone(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(data / "shards")
    assert main(["--shards", folder, "--out", folder]) == 2
    write_manifest(str(data / "out"), Manifest(stage="import", config={}, parents={}), name="import.json")
    assert main(["--shards", folder, "--out", str(data / "out")]) == 1
    said = capsys.readouterr().err
    assert "is one of the folders to look through" in said and "holds the output of `winnow import`" in said
