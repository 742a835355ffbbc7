import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pyarrow as pa
import pytest
import torch
from PIL import Image
from toy import render

from filters import TABLE, build_filter, caption_language, caption_length, clip_score, image_size
from pipeline.clip_model import open_model
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
    assert values(scored)[:2] == [[words], [chars]]
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


MODES = [("P", "PNG"), ("L", "JPEG"), ("1", "PNG"), ("CMYK", "JPEG"), ("RGBA", "PNG"), ("RGB", "WEBP"), ("I;16", "PNG")]


def noise(mode: str, kind: str, *, width: int = 90, height: int = 60) -> bytes:
    file = io.BytesIO()
    shape = (height, width) if mode == "I;16" else (height, width, 3)
    high, dtype = (600, np.uint16) if mode == "I;16" else (256, np.uint8)
    image = Image.fromarray(np.random.default_rng(0).integers(0, high, shape).astype(dtype))
    (image if mode == "I;16" else image.convert(mode)).save(file, kind)
    return file.getvalue()


@pytest.mark.parametrize(("mode", "kind"), MODES)
def test_clip_score_gives_the_model_what_open_clip_gives_it(run_folder: str, mode: str, kind: str) -> None:
    """open_clip makes RGB after resizing, which for a palette is not the same as before."""
    clip, captions = open_model(run_folder), ["a b", "été &amp; 🙂"]
    scorer = clip_score.Scorer(clip, torch.device("cpu"), 2)
    contents = [noise(mode, kind), noise(mode, kind, width=31, height=77)]
    pairs = scorer.prepare(image_batch(contents, captions))
    assert all(isinstance(pair, clip_score.Pair) for pair in pairs)
    assert {pair.pixel_HW3.nbytes + pair.token_L.nbytes for pair in pairs} == {scorer.measure_item()}
    found = scorer.scale(torch.from_numpy(np.stack([pair.pixel_HW3 for pair in pairs])))
    wanted = torch.stack([clip.eval_transform(Image.open(io.BytesIO(content))) for content in contents])
    assert found.is_contiguous() and torch.equal(found, wanted)
    tokens = open_clip.get_tokenizer("winnow-vit-tiny")(captions)
    assert torch.equal(torch.from_numpy(np.stack([pair.token_L for pair in pairs])), tokens)


class SmallGpu:
    """Stands for an open_clip model on a GPU that holds two pairs and no more."""

    def __init__(self, model: Any, *, holds: int = 2) -> None:
        self.encode_text, self.model, self.holds = model.encode_text, model, holds
        self.sizes: list[int] = []

    def encode_image(self, pixels: torch.Tensor, *, normalize: bool) -> Any:
        self.sizes.append(len(pixels))
        if len(pixels) > self.holds:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return self.model.encode_image(pixels, normalize=normalize)


def test_a_small_gpu_costs_speed_and_no_row(run_folder: str, caplog: pytest.LogCaptureFixture) -> None:
    clip = open_model(run_folder)
    gpu = SmallGpu(clip.model)
    whole, halved = (clip_score.Scorer(replace(clip, model=m), torch.device("cpu"), 8) for m in (clip.model, gpu))
    rows = image_batch([render("red", n) for n in range(7)] + [b"no image"], [f"{n} squares" for n in range(8)])
    for _ in range(2):
        found, wanted = (scorer.finish(rows, scorer.prepare(rows)) for scorer in (halved, whole))
        assert found.failures == wanted.failures and len(found.failures) == 1
        scores = [scored.columns[0].to_numpy(zero_copy_only=False) for scored in (found, wanted)]
        np.testing.assert_allclose(*scores, atol=1e-6)
    assert gpu.sizes == [7, 3, 1, 1, 1, 1, 1, 1, 1] + [1] * 7
    assert [r.getMessage() for r in caplog.records] == [
        "cpu has no memory for 7 pairs at once: going on with 3.",
        "cpu has no memory for 3 pairs at once: going on with 1.",
    ]


def test_a_gpu_that_holds_no_pair_is_an_error(run_folder: str) -> None:
    clip = open_model(run_folder)
    scorer = clip_score.Scorer(replace(clip, model=SmallGpu(clip.model, holds=0)), torch.device("cpu"), 8)
    with pytest.raises(torch.OutOfMemoryError):
        scorer.finish(image_batch([render("red")], ["a"]), scorer.prepare(image_batch([render("red")], ["a"])))


def test_a_machine_without_memory_is_no_bad_row(run_folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: bytes) -> None:
        raise MemoryError

    monkeypatch.setattr(clip_score, "open_image", refuse)
    with pytest.raises(MemoryError):
        clip_score.Scorer(open_model(run_folder), torch.device("cpu"), 8).prepare(image_batch([b"x"], ["a"]))


def test_a_bomb_has_a_name_of_its_own(run_folder: str) -> None:
    file = io.BytesIO()
    Image.new("1", (8193, 8192)).save(file, "PNG")
    filter = build_filter({"filter": "clip_score", "model": run_folder})
    scored = filter.load()(image_batch([file.getvalue()], ["a"]))
    assert [(f.reason, f.message) for f in scored.failures] == [
        ("oversized_image", "8193 x 8192 px is over the limit of 67,108,864 px")
    ]


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
        ({"filter": "clip_score", "model": "/no/such/run"}, ModelError, "neither a folder that exists"),
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
