"""Layouts and damage of the sets that are not plain classification."""

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from made_evalsets import (
    NUM_PICTURES,
    draw_picture,
    list_captions,
    list_games,
    make_captioned_archive,
    make_captioned_tars,
    make_games,
    make_labelled,
    write_archive,
    write_table,
    write_tars,
)

from eval38 import fairness, retrieve, winogavil
from eval38.classify import Outcome
from eval38.embed import Embedder, Encoder, Seen, see_images
from eval38.plan import EVALUATORS
from eval38.rows import ImageRow, LostImage
from eval38.tasks import Task, find_task, folder_of
from pipeline.clip_model import open_model
from pipeline.errors import EvalError

FLICKR, GAME = find_task("retrieval/flickr_1k_test_image_text_retrieval"), find_task("misc/winogavil")
FMOW, FACES = find_task("wilds/fmow"), find_task("fairness/fairface")


@pytest.fixture(scope="module")
def model() -> Embedder:
    return Embedder(Encoder(open_model("winnow-vit-tiny"), device="cpu", precision="fp32"), quiet=True)


def _folder(tmp_path: Path, task: Task) -> Path:
    folder = tmp_path / folder_of(task)
    folder.mkdir()
    return folder


def _evaluate(task: Task, tmp_path: Path, model: Embedder) -> Outcome:
    evaluator = EVALUATORS[task.kind]
    found = evaluator.read_set(task, str(tmp_path))
    list(evaluator.list_prompts(found))
    (seen,) = see_images(evaluator.read_rows(found), [model.encoder], batch_size=16, name=task.name, quiet=True)
    assert isinstance(seen, Seen)
    return evaluator.evaluate(found, seen, model)


def _write_fmow(folder: Path, metadata: list[bytes | None]) -> None:
    """Write FMoW's words and one tar whose rows have label 0 and the given .npy."""
    make_labelled(folder, FMOW, [0])
    rows = [{"cls": b"0", "png": draw_picture(n)} for n in range(len(metadata))]
    for row, content in zip(rows, metadata, strict=True):
        if content is not None:
            row["npy"] = content
    write_tars(folder, rows)


def _pack(values: object) -> bytes:
    file = io.BytesIO()
    np.save(file, np.array(values))
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (_pack([0, 1]), r"s0000001.npy should be a vector of at least 3 integers \(region, year, y\)"),
        (_pack([[0, 1, 0, 0]]), r"not int64 of shape \(1, 4\)"),
        (_pack([0.5, 1.0, 0.0, 0.0]), "should hold integers"),
        (_pack([0, float("nan"), 0, 0]), "should hold integers"),
        (_pack(["0", "1", "0", "0"]), "at least 3 integers"),
        (_pack([0, 1, 0]), "has 3 columns, rows before it 4"),
        (_pack([0, 1, 7, 0]), "says y = 7, but the label is 0"),
        (_pack([-1, 1, 0, 0]), "'region' is -1"),
        (_pack([1e300, 1.0, 0.0, 0.0]), "should hold integers of at most 2,147,483,647"),
        (_pack([0, 1 << 63, 0, 0]), "should hold integers of at most"),
        (b"", "is no array"),
        (b"PK\x05\x06" + bytes(18), "is no array"),
        (b"\x93NUMPY junk", "is no array"),
    ],
)
def test_metadata_that_contradict(tmp_path: Path, model: Embedder, content: bytes, message: str) -> None:
    _write_fmow(_folder(tmp_path, FMOW), [_pack([0, 1, 0, 0]), content])
    with pytest.raises(EvalError, match=message):
        _evaluate(FMOW, tmp_path, model)


def test_an_image_without_metadata_is_lost(tmp_path: Path, model: Embedder) -> None:
    _write_fmow(_folder(tmp_path, FMOW), [_pack([0, 1, 0, 0]), None, _pack([2.0, 1.0, 0.0, 1.0])])
    found = _evaluate(FMOW, tmp_path, model)
    assert [(row.name, row.reason) for row in found.lost] == [("0.tar:s0000001", "missing_metadata")]
    assert found.num_images == 2 and found.metrics["count_region:2"] == 1.0


def test_a_broken_image_takes_its_metadata_along(tmp_path: Path, model: Embedder) -> None:
    rows = [{"cls": b"%d" % n, "png": draw_picture(n), "npy": _pack([n, 14, n, 0])} for n in range(6)]
    folder = _folder(tmp_path, FMOW)
    make_labelled(folder, FMOW, [0])
    write_tars(folder, [*rows[:3], rows[5] | {"png": draw_picture(5)[:60]}, *rows[3:5]])
    damaged = _evaluate(FMOW, tmp_path, model)
    write_tars(folder, rows[:5])
    whole = _evaluate(FMOW, tmp_path, model)
    assert damaged.metrics == whole.metrics and [row.reason for row in damaged.lost] == ["unreadable_image"]


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("classnames.txt", "toxic:toxic 20\n", "", "classifier 'toxic' has 20 classes and 1 templates"),
        (
            "classnames.txt",
            "race:race 0",
            "mood:sad",
            "'mood:sad' should begin with one of race:, gender:, age:, toxic:",
        ),
        ("classnames.txt", "race:race 0", "race 0", "'race 0' should begin with"),
        ("zeroshot_classification_templates.txt", "age:", "race:", "classifier 'age' has 9 classes and 0 templates"),
    ],
)
def test_words_of_no_classifier(tmp_path: Path, file: str, old: str, new: str, message: str) -> None:
    folder = _folder(tmp_path, FACES)
    make_labelled(folder, FACES, [0] * NUM_PICTURES)
    (folder / file).write_text((folder / file).read_text().replace(old, new, 1))
    with pytest.raises(EvalError, match=message):
        fairness.read_faces(FACES, str(tmp_path))


def test_words_keep_what_follows_the_first_colon(tmp_path: Path) -> None:
    folder = _folder(tmp_path, FACES)
    make_labelled(folder, FACES, [0] * NUM_PICTURES)
    names = folder / "classnames.txt"
    names.write_text(names.read_text().replace("age:age 3", "age:3: old"))
    assert "a photo of a 3: old age" in fairness.list_prompts(fairness.read_faces(FACES, str(tmp_path)))


def test_faces_may_be_called_multilabel_as_exporters_do(tmp_path: Path) -> None:
    folder = _folder(tmp_path, FACES)
    make_labelled(folder, FACES, [0] * NUM_PICTURES)
    (folder / "dataset_type.txt").write_text("multilabel\n")
    assert fairness.read_faces(FACES, str(tmp_path)).files
    (folder / "dataset_type.txt").write_text("retrieval\n")
    with pytest.raises(EvalError, match="needs a 'classification' or 'multilabel' set"):
        fairness.read_faces(FACES, str(tmp_path))


def _read_captioned(tmp_path: Path) -> list[ImageRow[retrieve.Captions] | LostImage]:
    return list(retrieve.read_rows(retrieve.read_captioned(FLICKR, str(tmp_path))))


def _write_parquet(folder: Path, rows: list[dict[str, object]], name: str = "0000.parquet") -> None:
    (folder / "test").mkdir(exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), folder / "test" / name)


def _picture(n: int) -> dict[str, object]:
    return {"bytes": draw_picture(n), "path": f"{n}.jpg"}


def _make_captioned_parquet(folder: Path) -> None:
    rows: list[dict[str, object]] = [{"image": _picture(n), "caption": list_captions(n)} for n in range(NUM_PICTURES)]
    _write_parquet(folder, rows[:20])
    _write_parquet(folder, rows[20:], "0001.parquet")


@pytest.mark.parametrize(
    "make", [make_captioned_tars, lambda f: make_captioned_archive(f, "1k_flickr"), _make_captioned_parquet]
)
def test_retrieval_layouts_give_the_same_rows(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(_folder(tmp_path, FLICKR))
    rows = _read_captioned(tmp_path)
    assert [row.truth for row in rows if isinstance(row, ImageRow)] == [
        tuple(list_captions(n)) for n in range(NUM_PICTURES)
    ]
    assert [row.content for row in rows if isinstance(row, ImageRow)] == [draw_picture(n) for n in range(NUM_PICTURES)]


@pytest.mark.parametrize("text", [b"", b"a\n\nb", b" \n", b"\xff\xfe", None])
def test_an_image_without_a_whole_caption_is_lost(tmp_path: Path, text: bytes | None) -> None:
    folder = _folder(tmp_path, FLICKR)
    write_tars(
        folder,
        [
            {"png": draw_picture(0), "txt": b"a\nb"},
            {"png": draw_picture(1)} | ({"txt": text} if text is not None else {}),
        ],
    )
    first, second = _read_captioned(tmp_path)
    assert isinstance(first, ImageRow) and first.truth == ("a", "b")
    assert isinstance(second, LostImage) and second.reason == "null_caption"


def test_python_lists_and_lost_images_of_a_table(tmp_path: Path) -> None:
    folder = _folder(tmp_path, FLICKR)
    raws = ["['it\\'s one', \"two\"]", '["\\u732b"]', '["gone"]']
    write_table(folder / "t.csv", [{"filename": f"{n}.jpg", "raw": raw} for n, raw in enumerate(raws)])
    write_archive(folder / "i.zip", {"x/0.jpg": 0, "x/1.jpg": 1})
    rows = _read_captioned(tmp_path)
    assert [row.truth for row in rows if isinstance(row, ImageRow)] == [("it's one", "two"), ("猫",)]
    assert [(row.name, row.reason) for row in rows if isinstance(row, LostImage)] == [("2.jpg", "missing_image")]


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("filename,raw\n1.jpg\n", "t.csv line 2 has not as many cells"),
        ("filename,raw\n1.jpg,\"['a']\",b\n", "has not as many cells"),
        ("filename,text\n1.jpg,a\n", "has no column raw; it has filename, text"),
        ("", "has no column filename, raw; it has none"),
        ("filename,raw\n1.jpg,a caption\n", "should hold a list of strings, not 'a caption'"),
        ('filename,raw\n1.jpg,"[1, 2]"\n', "should hold a list of strings"),
        ('filename,raw\n1.jpg,"a\n', "is no csv"),
        ('filename,raw\n1.jpg,"[""\\ud800""]"\n', "should hold a list of strings"),
        (f'filename,raw\n1.jpg,"{"[" * 100_000}"\n', "should hold a list of strings"),
    ],
)
def test_a_broken_table(tmp_path: Path, table: str, message: str) -> None:
    folder = _folder(tmp_path, FLICKR)
    (folder / "t.csv").write_text(table)
    write_archive(folder / "i.zip", {"1.jpg": 1})
    with pytest.raises(EvalError, match=message):
        _read_captioned(tmp_path)


def test_a_folder_of_no_known_layout(tmp_path: Path) -> None:
    folder = _folder(tmp_path, FLICKR)
    with pytest.raises(EvalError, match=r"should hold one \.csv and one \.zip.*it holds nothing"):
        _read_captioned(tmp_path)
    make_captioned_tars(folder)
    (folder / "dataset_type.txt").write_text("classification")
    with pytest.raises(EvalError, match=r"is a 'classification' set .* needs a 'retrieval' set"):
        _read_captioned(tmp_path)


def test_a_zip_cut_short_and_a_damaged_member(tmp_path: Path) -> None:
    folder = _folder(tmp_path, FLICKR)
    write_table(folder / "t.csv", [{"filename": f"{n}.jpg", "raw": '["a"]'} for n in range(2)])
    write_archive(folder / "i.zip", {"0.jpg": 0, "1.jpg": 1})
    whole = (folder / "i.zip").read_bytes()
    at = whole.index(draw_picture(1)) + 100
    (folder / "i.zip").write_bytes(whole[:at] + b"?" + whole[at + 1 :])
    _, second = _read_captioned(tmp_path)
    assert isinstance(second, LostImage) and second.reason == "unreadable_image" and "CRC" in second.message
    entry = whole.index(b"PK\1\2")
    for damaged in (whole[:-30], whole[: entry + 6] + b"\xff" + whole[entry + 7 :]):  # cut; needs version 25.5
        (folder / "i.zip").write_bytes(damaged)
        with pytest.raises(EvalError, match="is no whole zip"):
            _read_captioned(tmp_path)


def test_a_parquet_file_cut_short(tmp_path: Path) -> None:
    folder = _folder(tmp_path, FLICKR)
    _make_captioned_parquet(folder)
    path = folder / "test" / "0001.parquet"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(EvalError, match=r"0001\.parquet is no whole parquet file"):
        _read_captioned(tmp_path)
    _write_parquet(folder, [{"image": _picture(0), "text": "a"}], "0001.parquet")
    with pytest.raises(EvalError, match="has no column caption; it has image, text"):
        _read_captioned(tmp_path)


def _not_utf8() -> pa.Array:
    """Return a column of one list of one string whose bytes are no text."""
    text = pa.Array.from_buffers(pa.string(), 1, pa.array([b"\xff"]).buffers())
    return pa.ListArray.from_arrays([0, 1], text)


@pytest.mark.parametrize(
    ("captions", "message"),
    [
        (["one caption"], "row 0 should hold a list of strings, not 'one caption'"),
        ([[1, 2]], "row 0 should hold a list of strings"),
        ([{"a": "b"}], "row 0 should hold a list of strings"),
        (_not_utf8(), "is no whole parquet file"),
    ],
)
def test_parquet_captions_of_another_type(tmp_path: Path, captions: object, message: str) -> None:
    folder = _folder(tmp_path, FLICKR)
    pq.write_table(pa.table({"image": [_picture(0)], "caption": captions}), folder / "0.parquet")
    with pytest.raises(EvalError, match=message):
        _read_captioned(tmp_path)


def test_a_null_caption_loses_its_image(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [{"image": _picture(0), "caption": found} for found in (["a"], None, ["a", None])]
    _write_parquet(_folder(tmp_path, FLICKR), rows)
    assert [isinstance(row, LostImage) for row in _read_captioned(tmp_path)] == [False, True, True]


def _make_games_parquet(folder: Path) -> None:
    rows = []
    for game in list_games():
        lists = {name: json.loads(game[name]) for name in ("candidates", "associations")}
        pictures = [_picture(int(name.split()[1])) for name in lists["candidates"]]
        rows.append({"cue": game["cue"], **lists, "candidate_images": pictures})
    _write_parquet(folder, rows)


@pytest.mark.parametrize("make", [make_games, _make_games_parquet])
def test_each_candidate_is_read_once(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(_folder(tmp_path, GAME))
    found = winogavil.read_game(GAME, str(tmp_path))
    names = [f"thing {n}" for n in range(NUM_PICTURES)]
    rows = list(winogavil.read_candidates(found))
    assert sorted(row.name for row in rows) == sorted(names)
    assert {row.truth: row.content for row in rows if isinstance(row, ImageRow)} == {
        name: draw_picture(n) for n, name in enumerate(names)
    }


def test_both_layouts_of_the_game_give_the_same_scores(tmp_path: Path, model: Embedder) -> None:
    make_games(_folder(tmp_path, GAME))
    first = _evaluate(GAME, tmp_path, model)
    shutil.rmtree(tmp_path / folder_of(GAME))
    _make_games_parquet(_folder(tmp_path, GAME))
    second = _evaluate(GAME, tmp_path, model)
    assert first.metrics == pytest.approx(second.metrics) and first.num_images == 40


@pytest.mark.parametrize(
    ("cue", "prompt"),
    [("apple", "An apple"), ("Owl", "An owl"), ("TREE", "A tree"), ("hour", "A hour"), ("猫", "A 猫")],
)
def test_cue(cue: str, prompt: str) -> None:
    assert winogavil.Instance("", cue, ("a",), frozenset("a")).prompt == prompt


def test_an_instance_that_misses_a_candidate_is_lost(tmp_path: Path, model: Embedder) -> None:
    folder = _folder(tmp_path, GAME)
    make_games(folder)
    names = {f"thing {n}.jpg": n for n in range(1, NUM_PICTURES)}
    write_archive(folder / "winogavil_images.zip", names)
    found = _evaluate(GAME, tmp_path, model)
    misses = [n for n, game in enumerate(list_games()) if "thing 0" in json.loads(game["candidates"])]
    assert [row.name for row in found.lost] == [f"winogavil_dataset.csv line {n + 2}" for n in misses]
    assert found.num_images == 40 - len(misses) and 0 < len(misses) < 40
    assert "thing 0: 0 files named 'thing 0'" in found.lost[0].message


@pytest.mark.parametrize("change", [{"cue": ""}, {"associations": "[]"}, {"associations": '["elsewhere"]'}])
def test_an_instance_that_cannot_be_played(tmp_path: Path, change: dict[str, str]) -> None:
    folder = _folder(tmp_path, GAME)
    make_games(folder)
    write_table(folder / "winogavil_dataset.csv", [list_games()[0], list_games()[1] | change])
    with pytest.raises(EvalError, match="line 3: an instance needs a cue and associations among its candidates"):
        winogavil.read_game(GAME, str(tmp_path))


def test_two_images_of_one_name(tmp_path: Path) -> None:
    folder = _folder(tmp_path, GAME)
    game = {"cue": "x", "candidates": ["a", "b"], "associations": ["a"]}
    _write_parquet(folder, [{**game, "candidate_images": [_picture(0), _picture(n)]} for n in (1, 2)])
    found = winogavil.read_game(GAME, str(tmp_path))
    with pytest.raises(EvalError, match="row 1: candidate 'b' has another image"):
        list(winogavil.read_candidates(found))
    _write_parquet(folder, [{**game, "candidate_images": [_picture(0)]}])
    with pytest.raises(EvalError, match="row 0: 2 candidates, but 1 images"):
        list(winogavil.read_candidates(found))
