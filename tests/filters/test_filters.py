from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from toy import render

from filters import TABLE, build_filter, caption_language, caption_length, image_size
from pipeline.contract import Filter, Scored, check_needs, check_scored
from pipeline.errors import ConfigError, ModelError, PoolError, StageError
from pipeline.schemas import IMAGE, IMAGE_ERROR, TEXT


def batch(**columns: Any) -> pa.RecordBatch:
    return pa.RecordBatch.from_pydict(columns)


def texts(*captions: str | None) -> pa.RecordBatch:
    return batch(**{TEXT: pa.array(captions, pa.string())})


def values(scored: Scored) -> list[list[Any]]:
    return [column.to_pylist() for column in scored.columns]


@pytest.mark.parametrize(
    ("caption", "words", "chars"),
    [
        ("a red dog", 3, 9),
        ("", 0, 0),
        ("  \n\t ", 0, 5),
        ("one,two three", 2, 13),
        ("кот на столе", 3, 12),
        ("猫が座っている", 1, 7),
        ("a\u00a0b", 2, 3),
        ("🙂 ok", 2, 4),
        (None, None, None),
    ],
)
def test_caption_length_counts_as_python_does(caption: str | None, words: int | None, chars: int | None) -> None:
    scored = caption_length.score(texts(caption))
    assert values(scored) == [[words], [chars]]
    assert [f.reason for f in scored.failures] == (["null_caption"] if caption is None else [])


def test_caption_language_knows_languages() -> None:
    score = caption_language.load(None)
    scored = score(
        texts(
            "a dog is sitting on the grass", "ein Hund sitzt auf dem Gras", "un chien est assis\nsur l'herbe", None, ""
        )
    )
    languages, confidences = values(scored)
    assert languages[:4] == ["en", "de", "fr", None]
    assert all(0 < c <= 1.0001 for c in confidences[:3])
    assert [f.position for f in scored.failures] == [3]


def test_caption_language_needs_a_model_that_exists() -> None:
    with pytest.raises(ConfigError, match=r"no language model at 'lid\.bin'"):
        build_filter({"filter": "caption_language", "model": "lid.bin"})


@pytest.mark.parametrize(
    ("width", "height", "expected"),
    [
        (200, 300, [200, 1.5]),
        (300, 200, [200, 1.5]),
        (7, 7, [7, 1.0]),
        (None, 5, [None, None]),
        (0, 5, [None, None]),
        (5, -1, [None, None]),
    ],
)
def test_image_size(width: int | None, height: int | None, expected: list[Any]) -> None:
    columns = {"original_width": pa.array([width], pa.int64()), "original_height": pa.array([height], pa.int64())}
    scored = image_size.score(batch(**columns))
    assert [v[0] for v in values(scored)] == expected
    assert len(scored.failures) == (expected[0] is None)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (pa.array([250.5, float("nan"), float("inf"), None]), [250, None, None, None]),
        (pa.array([2**31, 2**31 - 1, -(2**40), 7]), [None, 2**31 - 1, None, 7]),
        (pa.array(["250", "x", None, ""]), [None] * 4),
        (pa.nulls(4), [None] * 4),
        (pa.array([[1], [], None, [2]]), [None] * 4),
    ],
)
def test_image_size_of_columns_of_other_types(values: pa.Array, expected: list[int | None]) -> None:
    scored = image_size.score(batch(original_width=values, original_height=values))
    assert scored.columns[0].to_pylist() == expected
    assert len(scored.failures) == expected.count(None)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A run directory with fixed random weights."""
    import torch

    from pipeline.clip_model import open_model

    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    torch.save({"state_dict": open_model("winnow-vit-tiny").model.state_dict()}, folder / "checkpoint.pt")
    (folder / "model.json").write_text('{"architecture": "winnow-vit-tiny"}')
    return str(folder)


def image_batch(images: list[bytes | None], captions: list[str | None]) -> pa.RecordBatch:
    errors = ["missing_image" if i is None else None for i in images]
    return batch(
        **{
            IMAGE: pa.array(images, pa.binary()),
            IMAGE_ERROR: pa.array(errors, pa.string()),
            TEXT: pa.array(captions, pa.string()),
        }
    )


def test_clip_score_is_the_models_own_cosine(run_folder: str) -> None:
    import io

    import torch
    from PIL import Image

    from pipeline.clip_model import open_model

    filter = build_filter({"filter": "clip_score", "name": "dfn", "model": run_folder, "batch_size": 2})
    images = [render("red"), render("blue", side=70), render("green", kind="PNG")]
    captions = ["a red square", "привет 🙂", ""]
    scored = filter.load()(image_batch(images, captions))
    check_scored(filter, image_batch(images, captions), scored)
    clip = open_model(run_folder)
    with torch.inference_mode():
        pixels = torch.stack([clip.eval_transform(Image.open(io.BytesIO(i))) for i in images])
        image_ND = clip.model.encode_image(pixels, normalize=True)
        text_ND = clip.model.encode_text(clip.tokenize(captions), normalize=True)
    np.testing.assert_allclose(scored.columns[0].to_numpy(), (image_ND * text_ND).sum(1).numpy(), atol=1e-5)
    stored = np.array(scored.columns[1].to_pylist(), np.float32)
    np.testing.assert_allclose(stored, image_ND.numpy(), atol=1e-3)
    assert [name for name, _ in filter.makes] == ["dfn_similarity_score", "dfn_img", "dfn_txt"]


@pytest.mark.parametrize(
    ("mode", "kind"), [("P", "PNG"), ("L", "JPEG"), ("1", "PNG"), ("CMYK", "JPEG"), ("RGBA", "PNG"), ("RGB", "WEBP")]
)
def test_clip_score_gives_the_model_what_open_clip_gives_it(run_folder: str, mode: str, kind: str) -> None:
    """open_clip makes RGB after resizing, which for a palette is not the same as before."""
    import io

    import torch
    from PIL import Image

    from filters.clip_score import _decode
    from pipeline.clip_model import open_model

    file, transform = io.BytesIO(), open_model(run_folder).eval_transform
    pixels = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(file, kind)
    found = _decode(transform, (file.getvalue(), None, "a"))
    assert isinstance(found, torch.Tensor) and torch.equal(found, transform(Image.open(file)))


def test_clip_score_names_every_bad_row_and_scores_the_rest(run_folder: str) -> None:
    filter = build_filter({"filter": "clip_score", "model": run_folder})
    good, bomb = render("red"), render("red", kind="PNG")
    bomb = bomb[:16] + (60000).to_bytes(4, "big") * 2 + bomb[24:]
    rows = image_batch([good, b"no image", None, good[:300], good, bomb], ["a", "b", "c", "d", None, "f"])
    scored = filter.load()(rows)
    check_scored(filter, rows, scored)
    reasons = {f.position: f.reason for f in scored.failures}
    assert reasons == {
        1: "unreadable_image",
        2: "missing_image",
        3: "unreadable_image",
        4: "null_caption",
        5: "unreadable_image",
    }
    for column in scored.columns:
        assert [value is None for value in column.to_pylist()] == [False, True, True, True, True, True]


def test_clip_score_of_nothing(run_folder: str) -> None:
    filter = build_filter({"filter": "clip_score", "model": run_folder})
    for rows in (image_batch([], []), image_batch([None], ["a"])):
        check_scored(filter, rows, filter.load()(rows))


def test_identity_follows_the_weights_not_the_path(run_folder: str, tmp_path: Path) -> None:
    import shutil

    copy = str(shutil.copytree(run_folder, tmp_path / "copy"))
    first, second = (build_filter({"filter": "clip_score", "model": m}).identity for m in (run_folder, copy))
    assert first == second
    with (tmp_path / "copy" / "checkpoint.pt").open("ab") as file:
        file.write(b"\0")
    assert build_filter({"filter": "clip_score", "model": copy}).identity != first


@pytest.mark.parametrize(
    ("entry", "error", "message"),
    [
        ({"filter": "clip_scores"}, ConfigError, "did you mean 'clip_score'"),
        ({"filter": "caption_length", "min": 3}, ConfigError, "field of filter caption_length"),
        ({"name": "x"}, ConfigError, "does not say which filter"),
        ({"filter": "image_size", "name": "../x"}, ConfigError, "columns are named after it"),
        ({"filter": "image_size", "name": "pool"}, ConfigError, "give another"),
        ({"filter": "clip_score", "model": "winnow-vit-tiny"}, ConfigError, "names no weights"),
        ({"filter": "clip_score", "model": "winnow-vit-tny"}, ConfigError, "did you mean 'winnow-vit-tiny'"),
        ({"filter": "clip_score", "model": "/no/such/run"}, ModelError, "neither a run directory"),
        ({"filter": "clip_score", "model": "winnow-vit-tiny@/no.pt"}, ModelError, "no checkpoint at"),
    ],
)
def test_wrong_entries_are_explained(entry: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        build_filter(entry)


def test_checkpoint_of_another_architecture(run_folder: str) -> None:
    model = f"winnow-vit-small@{run_folder}/checkpoint.pt"
    filter = build_filter({"filter": "clip_score", "model": model})
    with pytest.raises(ModelError, match="is not a winnow-vit-small"):
        filter.load()


def test_pickle_is_not_opened(tmp_path: Path) -> None:
    import pickle

    (tmp_path / "x.pt").write_bytes(pickle.dumps({"state_dict": Path("/")}))
    filter = build_filter({"filter": "clip_score", "model": f"winnow-vit-tiny@{tmp_path}/x.pt"})
    with pytest.raises(ModelError):
        filter.load()


def make_filter(score: Callable[[pa.RecordBatch], Scored]) -> Filter:
    return Filter(name="f", needs=(TEXT,), makes=(("x", pa.int32()),), version=1, settings={}, load=lambda: score)


def test_contract_is_checked() -> None:
    filter = make_filter(caption_length.score)
    with pytest.raises(PoolError, match=r"needs columns \['text'\], which the pool lacks \(it has \['uid'\]\)"):
        check_needs(filter, ["uid"])
    rows = texts("a", "b")
    for bad in (Scored(()), Scored((pa.array([1], pa.int32()),)), Scored((pa.array([1, 2], pa.int64()),))):
        with pytest.raises(StageError, match="promised"):
            check_scored(filter, rows, bad)


def test_table_is_complete() -> None:
    assert len({row.kind for row in TABLE}) == len(TABLE)
    assert all(row.source.startswith("https://") and row.summary for row in TABLE)
