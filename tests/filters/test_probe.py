"""The probe filter: logits of one column or two, rows without a vector, files that are no probe."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from made_embeddings import draw

from filters import build_filter
from pipeline.contract import check_scored
from pipeline.errors import ConfigError
from pipeline.probe import Probe

PROBE = Probe(*(np.random.default_rng(n).uniform(0.5, 2, size) for n, size in enumerate((6, (), 6, 6))))


def save(folder: Path, probe: Probe = PROBE) -> dict[str, str]:
    np.savez(folder / "probe.npz", **probe._asdict())
    return {"filter": "probe", "name": "clean", "weights": str(folder / "probe.npz")}


def column(rows: np.ndarray, *, lost: int) -> pa.Array:
    return pa.array([None if n == lost else row for n, row in enumerate(rows)], pa.list_(pa.float16()))


def test_logits_of_two_columns(tmp_path: Path) -> None:
    image, text = draw(9, 4), draw(9, 2)
    filter = build_filter(save(tmp_path) | {"embedding": ["img", "txt"]})
    batch = pa.RecordBatch.from_pydict({"img": column(image, lost=2), "txt": column(text, lost=5)})
    scored = filter.load()(batch)
    check_scored(filter, batch, scored)
    assert filter.needs == filter.vectors == ("img", "txt") and filter.makes[0][0] == "clean_score"
    assert [(f.position, f.reason) for f in scored.failures] == [(n, "missing_embedding") for n in (2, 5)]
    for n, logit in enumerate(scored.columns[0].to_pylist()):
        row = [float(x) for x in (*image[n], *text[n])]
        terms = zip(PROBE.weights, row, PROBE.mean, PROBE.scale, strict=True)
        wanted = PROBE.bias + sum(w * (x - mean) / scale for w, x, mean, scale in terms)
        assert logit == (None if n in (2, 5) else pytest.approx(wanted, rel=1e-6))
    for some in (batch[:0], batch[2:3]):
        check_scored(filter, some, filter.load()(some))


def test_identity_follows_weights_and_columns(tmp_path: Path) -> None:
    first = build_filter(save(tmp_path) | {"embedding": "img"}).identity
    assert build_filter(save(tmp_path) | {"embedding": ["img"]}).identity == first
    assert build_filter(save(tmp_path) | {"embedding": "txt"}).identity != first
    other = save(tmp_path, PROBE._replace(bias=np.array(7.0)))
    assert build_filter(other | {"embedding": "img"}).identity != first


def test_files_that_are_no_probe(tmp_path: Path) -> None:
    entry = save(tmp_path) | {"embedding": "img"}
    with pytest.raises(ConfigError, match="there is no probe at '/no'"):
        build_filter(entry | {"weights": "/no"})
    filter = build_filter(entry)
    wrong = pa.RecordBatch.from_pydict({"img": column(draw(3, 4), lost=9)})
    with pytest.raises(ConfigError, match="a probe of 6 numbers cannot read embeddings of 4"):
        filter.load()(wrong)
    save(tmp_path, PROBE._replace(bias=np.array(7.0)))
    with pytest.raises(ConfigError, match="changed since this run began"):
        filter.load()
    for content in ({"weights": PROBE.weights}, {"weights": np.array([object()])}):
        np.savez(tmp_path / "probe.npz", **content)
        with pytest.raises(ConfigError, match="holds no probe"):
            build_filter(entry).load()
    save(tmp_path)
    for cut in (b"no zip", (tmp_path / "probe.npz").read_bytes()[:300]):
        (tmp_path / "probe.npz").write_bytes(cut)
        with pytest.raises(ConfigError, match="holds no probe"):
            build_filter(entry).load()


def test_damaged_numbers_have_no_logit(tmp_path: Path) -> None:
    filter = build_filter(save(tmp_path) | {"embedding": "img"})
    row_ND = np.ones((4, 6), np.float32)
    row_ND[1, 0], row_ND[2, 5], row_ND[3, 0] = 3e38, -2e6, 1e6
    batch = pa.RecordBatch.from_pydict({"img": pa.FixedSizeListArray.from_arrays(pa.array(row_ND.ravel()), 6)})
    scored = filter.load()(batch)
    check_scored(filter, batch, scored)
    assert scored.columns[0].is_null().to_pylist() == [False, True, True, False]
