"""negCLIPLoss against a slow reference, and what its whole-part batches must not depend on."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from made_embeddings import draw, draw_uids

from filters import build_filter, neg_clip_loss
from filters.neg_clip_loss import Options, compute_scores
from pipeline.contract import Filter, check_scored
from pipeline.errors import ConfigError
from pipeline.ledger import Unit
from pipeline.pool import list_parts
from pipeline.schemas import UID
from pipeline.score import score_part
from pipeline.select_draw import shuffle_uids
from pipeline.uid import format_uids

ENTRY = {"filter": "neg_clip_loss", "name": "ncl", "image": "l14_img", "text": "l14_txt"}


def reference(image_ND: np.ndarray, text_ND: np.ndarray, uids: np.ndarray, options: Options) -> list[float]:
    """The definition, number by number in float64."""
    pairs = [([float(x) for x in u], [float(x) for x in v]) for u, v in zip(image_ND, text_ND, strict=True)]
    totals = [0.0] * len(pairs)
    for repeat in range(options.repeats):
        shuffled = shuffle_uids(uids, options.seed * (1 << 16) + repeat).tolist()
        order = sorted(range(len(pairs)), key=lambda row: shuffled[row])
        for start in range(0, len(order), options.batch):
            batch = order[start : start + options.batch]
            for i in batch:
                of_image = sum(math.exp(dot(pairs[i][0], pairs[j][1]) / options.tau) for j in batch)
                of_text = sum(math.exp(dot(pairs[j][0], pairs[i][1]) / options.tau) for j in batch)
                totals[i] += options.tau / 2 * (math.log(of_image) + math.log(of_text))
                if options.correct_short:
                    totals[i] += options.tau * math.log(options.batch / len(batch))
    return [dot(u, v) - total / options.repeats for (u, v), total in zip(pairs, totals, strict=True)]


def dot(u: list[float], v: list[float]) -> float:
    return sum(x * y for x, y in zip(u, v, strict=True))


def make_batch(image_ND: np.ndarray, text_ND: np.ndarray, uids: np.ndarray) -> pa.RecordBatch:
    columns = {"l14_img": image_ND, "l14_txt": text_ND}
    lists = {name: pa.FixedSizeListArray.from_arrays(m.reshape(-1), m.shape[1]) for name, m in columns.items()}
    return pa.RecordBatch.from_pydict({UID: format_uids(uids), **lists})


def run(filter: Filter, batch: pa.RecordBatch) -> tuple[list[Any], list[int]]:
    scored = filter.load()(batch)
    check_scored(filter, batch, scored)
    assert {f.reason for f in scored.failures} <= {"missing_embedding"}
    return scored.columns[0].to_pylist(), [f.position for f in scored.failures]


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("more", [{}, {"correct_short": False}, {"tau": 0.07, "batch": 5, "seed": 3}, {"batch": 100}])
def test_every_score_is_the_definitions(dtype: Any, more: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neg_clip_loss, "CPU_BLOCK", 7)  # several blocks a batch, the last narrower
    image_ND, text_ND, uids = draw(41, dtype=dtype), draw(41, seed=1, dtype=dtype), draw_uids(41)
    options = {"batch": 17, "repeats": 3} | more
    found, failed = run(build_filter(ENTRY | options), make_batch(image_ND, text_ND, uids))
    wanted = reference(image_ND, text_ND, uids, Options(image="l14_img", text="l14_txt", **options))
    np.testing.assert_allclose(found, wanted, atol=2e-7)
    assert failed == []


def test_defaults_are_the_papers() -> None:
    options = Options(image="a", text="b")
    assert (options.tau, options.batch, options.repeats) == (0.01, 32768, 10)


def test_a_generic_caption_loses_what_the_cosine_gives_it() -> None:
    """Row 0's caption is almost as near to every image as to its own; the others' are near their own only."""
    text_ND = np.eye(64, dtype=np.float32)
    image_ND = 0.5 * text_ND
    image_ND[:, 0] = [0.505] + [0.5] * 63
    scores = compute_scores(image_ND, text_ND, draw_uids(64), Options(image="i", text="t", batch=64))
    cosines = (image_ND * text_ND).sum(axis=1)
    assert cosines.argmax() == 0 and scores.argmin() == 0


def test_a_short_batch_is_scored_as_in_a_full_one_when_corrected() -> None:
    image_ND, text_ND, uids = draw(600), draw(600, seed=1), draw_uids(600)
    means = {}
    for batch in (100, 600):
        for correct in (True, False):  # a part of 600 rows cut into 6, and the same rows as one full batch
            options = Options(image="i", text="t", tau=0.2, batch=batch, repeats=5, correct_short=correct)
            means[batch, correct] = compute_scores(image_ND, text_ND, uids, options).mean()
    assert means[600, True] == means[600, False]
    few = [
        compute_scores(
            image_ND[:100],
            text_ND[:100],
            uids[:100],
            Options(image="i", text="t", tau=0.2, batch=600, correct_short=correct),
        ).mean()
        for correct in (True, False)
    ]
    assert abs(few[0] - means[600, True]) < 0.02 < abs(few[1] - means[600, True])


def test_neither_row_order_nor_failed_rows_nor_blocks_change_a_score(monkeypatch: pytest.MonkeyPatch) -> None:
    image_ND, text_ND, uids = draw(90), draw(90, seed=1), draw_uids(90)
    filter = build_filter(ENTRY | {"batch": 32, "repeats": 2})
    found, _ = run(filter, make_batch(image_ND, text_ND, uids))
    order = np.random.default_rng(0).permutation(90)
    shuffled, _ = run(filter, make_batch(image_ND[order], text_ND[order], uids[order]))
    assert shuffled == [found[row] for row in order]  # to the bit
    image_ND, text_ND = (
        np.concatenate([m[:40], np.full((2, 16), np.nan, m.dtype), m[40:]]) for m in (image_ND, text_ND)
    )
    text_ND[40], image_ND[41] = 0, 0  # one lacks the image, one the caption
    more = np.concatenate([uids[:40], draw_uids(2, seed=5), uids[40:]])
    with_holes, failed = run(filter, make_batch(image_ND, text_ND, more))
    assert failed == [40, 41] and with_holes == [*found[:40], None, None, *found[40:]]


def test_another_seed_is_another_partition() -> None:
    image_ND, text_ND, uids = draw(60), draw(60, seed=1), draw_uids(60)
    seeds = [Options(image="i", text="t", batch=20, repeats=1, seed=seed) for seed in (0, 1)]
    first, second = (compute_scores(image_ND, text_ND, uids, options) for options in seeds)
    assert not np.allclose(first, second, atol=1e-4)
    assert build_filter(ENTRY).identity != build_filter(ENTRY | {"seed": 1}).identity


def test_small_parts() -> None:
    filter = build_filter(ENTRY | {"batch": 4})
    (alone,), failed = run(filter, make_batch(draw(1), draw(1, seed=1), draw_uids(1)))
    assert alone == pytest.approx(-0.01 * math.log(4)) and failed == []  # s_ii is all there is to divide by
    none = np.full((3, 16), np.nan, np.float16)
    assert run(filter, make_batch(none, draw(3), draw_uids(3))) == ([None] * 3, [0, 1, 2])
    assert run(filter, make_batch(none[:0], none[:0], draw_uids(0))) == ([], [])
    free = pa.array([None, []], pa.list_(pa.float32()))
    empty = pa.RecordBatch.from_pydict({UID: format_uids(draw_uids(2)), "l14_img": free, "l14_txt": free})
    assert run(filter, empty) == ([None, None], [0, 1])


def test_rows_alike_and_uids_alike_are_ordinary() -> None:
    image_ND, text_ND = draw(12)[[0] * 12], draw(12, seed=1)[[0] * 12]
    found, _ = run(build_filter(ENTRY | {"batch": 12}), make_batch(image_ND, text_ND, draw_uids(1)[[0] * 12]))
    np.testing.assert_allclose(found, -0.01 * math.log(12), atol=1e-7)


def test_one_huge_vector_does_not_spoil_the_others() -> None:
    image_ND, text_ND, uids = draw(8, dtype=np.float32), draw(8, seed=1, dtype=np.float32), draw_uids(8)
    filter = build_filter(ENTRY | {"batch": 8})
    scaled, failed = run(filter, make_batch(image_ND * 1e4, text_ND * 1e4, uids))
    assert np.isfinite(scaled).all() and failed == []
    without, _ = run(filter, make_batch(np.delete(image_ND, 3, 0), np.delete(text_ND, 3, 0), np.delete(uids, 3)))
    image_ND[3] *= 1e30
    found, failed = run(filter, make_batch(image_ND, text_ND, uids))
    assert failed == [3] and found[3] is None and [*found[:3], *found[4:]] == without


@pytest.mark.parametrize("similarity", [0.95, 1.0])
def test_exponents_do_not_overflow(similarity: float) -> None:
    """exp(s / 0.01) of float32 is infinite from s = 0.88."""
    image_ND = np.eye(4, dtype=np.float32)
    found, _ = run(build_filter(ENTRY | {"batch": 4}), make_batch(image_ND, image_ND * similarity, draw_uids(4)))
    np.testing.assert_allclose(found, 0, atol=1e-6)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"tau": 0}, "tau 0.0 is below 1e-06"),
        ({"tau": 1e-40}, "tau 1e-40 is below"),
        ({"batch": 0}, "batch 0"),
        ({"repeats": 0}, "repeats 0"),
        ({"txt": 1}, "text"),
    ],
)
def test_wrong_options_are_explained(more: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_filter(ENTRY | more)


def test_columns_of_two_encoders_are_no_pair() -> None:
    with pytest.raises(ConfigError, match="l14_img has 16 numbers and l14_txt 8"):
        build_filter(ENTRY).load()(make_batch(draw(3), draw(3, 8), draw_uids(3)))


def write_pool(folder: Path, uids: np.ndarray, image_ND: np.ndarray, text_ND: np.ndarray, sizes: list[int]) -> None:
    folder.mkdir()
    for number, rows in enumerate(np.split(np.arange(len(uids)), np.cumsum(sizes)[:-1])):
        texts = [f"caption {n}" for n in rows]
        table = pa.table({"uid": format_uids(uids[rows]), "url": texts, "text": texts})
        pq.write_table(table, folder / f"{number:08d}.parquet")
        np.savez(folder / f"{number:08d}.npz", l14_img=image_ND[rows], l14_txt=text_ND[rows])


def test_the_engine_gives_it_whole_parts_and_other_filters_their_batches(tmp_path: Path) -> None:
    rows = 5000  # more than a batch of the engine
    image_ND, text_ND, uids = draw(rows, 4), draw(rows, 4, seed=1), draw_uids(rows)
    write_pool(tmp_path / "pool", uids, image_ND, text_ND, [rows - 10, 10])
    options = {"batch": 1500, "repeats": 2}
    filters = [build_filter(ENTRY | options), build_filter({"filter": "caption_length"})]
    out, parts = str(tmp_path / "out"), list_parts(str(tmp_path / "pool"))
    for part, rows_of in zip(parts, (slice(0, rows - 10), slice(rows - 10, rows)), strict=True):
        done = score_part(Unit(part), filters=filters, out=out)
        assert done["counts"]["ncl"]["kept"] == done["counts"]["caption_length"]["kept"] == rows_of.stop - rows_of.start
        stored = pq.read_table(f"{out}/ncl/{part.name}.parquet")["ncl_score"].to_numpy()
        settings = Options(image="l14_img", text="l14_txt", **options)
        wanted = compute_scores(image_ND[rows_of], text_ND[rows_of], uids[rows_of], settings)
        np.testing.assert_array_equal(stored, wanted.astype(np.float32))
