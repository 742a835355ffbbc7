"""Filters over stored embeddings through the score stage: whole parts beside batches, of an npz and of an encoder."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from made_embeddings import draw, draw_uids
from toy import COLORS, render, toy_row, write_part

from filters.neg_clip_loss import Options, compute_scores
from jobs.stage_score import run_retry, run_score
from pipeline.clip_model import open_model
from pipeline.uid import format_uids, parse_uids

pytestmark = pytest.mark.spark
NCL = {"filter": "neg_clip_loss", "name": "ncl", "batch": 16, "repeats": 2}
SIZES = (40, 5, 1)
UIDS, IMAGES, TEXTS = draw_uids(46), draw(46), draw(46, seed=1)


def make_pool(folder: Path) -> str:
    """Three parts; row 3 of the first has no image vector, the last has no npz."""
    folder.mkdir()
    image_ND = IMAGES.copy()
    image_ND[3] = np.nan
    for number, rows in enumerate(np.split(np.arange(46), np.cumsum(SIZES)[:-1])):
        captions = [f"caption {n}" for n in rows]
        pq.write_table(pa.table({"uid": format_uids(UIDS[rows]), "text": captions}), folder / f"{number}.parquet")
        if number < 2:
            np.savez(folder / f"{number}.npz", l14_img=image_ND[rows], l14_txt=TEXTS[rows])
    return str(folder)


def values_of(out: Path, name: str, part: int) -> np.ndarray:
    table = pq.read_table(out / name / f"{part}.parquet")
    return table.column(1).to_numpy()


def test_whole_parts_beside_batches(spark: Any, tmp_path: Path) -> None:
    pool, out = make_pool(tmp_path / "pool"), tmp_path / "out"
    np.save(tmp_path / "t.npy", draw(9, seed=2))
    here = os.path.relpath(tmp_path / "t.npy")
    sim = {"filter": "norm_sim", "name": "sim", "embedding": "l14_img", "targets": f"{here}::{here}"}
    entries = [NCL | {"image": "l14_img", "text": "l14_txt"}, sim, {"filter": "caption_length"}]
    made = run_score(lambda: spark, pool, entries, str(out), quiet=True)
    counts = {name: (c.read, c.kept, dict(c.failed)) for name, c in made.counts.items() if name in ("ncl", "sim")}
    assert counts["ncl"] == (46, 44, {"missing_embedding": 1, "missing_column": 1}) and counts["sim"] == counts["ncl"]
    assert made.counts["caption_length"].kept == 46
    options = Options(image="l14_img", text="l14_txt", batch=16, repeats=2)
    for part, rows in enumerate((np.delete(np.arange(40), 3), np.arange(40, 45))):
        wanted = compute_scores(IMAGES[rows], TEXTS[rows], UIDS[rows], options)
        found = values_of(out, "ncl", part)
        np.testing.assert_array_equal(found[~np.isnan(found)], wanted.astype(np.float32))
        sims = np.abs(IMAGES[rows].astype(float) @ draw(9, seed=2).T.astype(float)).max(axis=1)
        found = values_of(out, "sim", part)
        np.testing.assert_allclose(found[~np.isnan(found)], sims, rtol=1e-5)
    assert np.isnan(values_of(out, "ncl", 2)).all() and np.isnan(values_of(out, "ncl", 0)[3])
    before = {file: file.read_bytes() for file in out.rglob("*.parquet")}
    targets = json.loads((out / "request.json").read_text())["entries"][1]["targets"].split("::")
    assert [(Path(t).is_absolute(), Path(t).samefile(here)) for t in targets] == [(True, True)] * 2
    _, done = run_retry(lambda: spark, str(out), "missing_embedding")
    assert done["mended"] == 0  # a row cannot be scored without the others of its part
    assert {file: file.read_bytes() for file in out.rglob("*.parquet")} == before


def test_after_the_encoder_of_the_same_recipe(spark: Any, tmp_path: Path) -> None:
    rows = [toy_row(n) for n in range(12)]
    images: dict[str, bytes | None] = {row["key"]: render(list(COLORS)[n % 4], n) for n, row in enumerate(rows)}
    images[rows[7]["key"]] = b"no image"
    write_part(tmp_path / "pool", "0", rows, images)
    torch.save({"state_dict": open_model("winnow-vit-tiny").model.state_dict()}, tmp_path / "w.pt")
    clip = {"filter": "clip_score", "name": "dfn", "model": f"winnow-vit-tiny@{tmp_path}/w.pt"}
    entries = [clip, NCL | {"image": "dfn_img", "text": "dfn_txt"}]
    run_score(lambda: spark, str(tmp_path / "pool"), entries, str(tmp_path / "out"), quiet=True)
    clip_scores = pq.read_table(tmp_path / "out" / "dfn" / "0.parquet")
    kept = clip_scores.filter(clip_scores["dfn_img"].is_valid())
    assert kept.num_rows == 11
    image_ND, text_ND = (np.array(kept[name].to_pylist(), np.float32) for name in ("dfn_img", "dfn_txt"))
    options = Options(image="dfn_img", text="dfn_txt", batch=16, repeats=2)
    wanted = compute_scores(image_ND, text_ND, parse_uids(kept["uid"]), options)
    found = values_of(tmp_path / "out", "ncl", 0)
    np.testing.assert_array_equal(found[~np.isnan(found)], wanted.astype(np.float32))
