"""NormSim and VAS against a slow reference; targets of every kind, and those that are none."""

import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from made_embeddings import draw

from filters import build_filter, norm_sim
from filters.norm_sim import find_second_moment
from pipeline.contract import Filter, check_scored
from pipeline.errors import ConfigError

DIM = 16


def reference(image_ND: np.ndarray, target_TD: np.ndarray, norm: Any) -> list[float]:
    """The definition, number by number in float64."""
    scores = []
    for u in image_ND.astype(float).tolist():
        products = [sum(x * y for x, y in zip(u, t, strict=True)) for t in target_TD.astype(float).tolist()]
        squares = sum(product**2 for product in products)
        scores.append(
            {"inf": max(map(abs, products)), 2: math.sqrt(squares), "vas": squares / len(products)}[norm],
        )
    return scores


def build(folder: Path, target_TD: np.ndarray, **more: Any) -> Filter:
    np.save(folder / "targets.npy", target_TD)
    return build_filter({"filter": "norm_sim", "embedding": "l14_img", "targets": str(folder / "targets.npy")} | more)


def make_batch(matrix_ND: np.ndarray) -> pa.RecordBatch:
    lists = pa.FixedSizeListArray.from_arrays(pa.array(matrix_ND.reshape(-1)), matrix_ND.shape[1])
    return pa.RecordBatch.from_pydict({"l14_img": lists})


def run(filter: Filter, batch: pa.RecordBatch) -> tuple[list[Any], list[int]]:
    scored = filter.load()(batch)
    check_scored(filter, batch, scored)
    assert {f.reason for f in scored.failures} <= {"missing_embedding"}
    return scored.columns[0].to_pylist(), [f.position for f in scored.failures]


@pytest.mark.parametrize("norm", ["inf", 2, "vas"])
@pytest.mark.parametrize("dtypes", [(np.float16, np.float32), (np.float32, np.float16)])
def test_every_score_is_the_definitions(
    tmp_path: Path, norm: Any, dtypes: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(norm_sim, "BLOCK_TARGETS", 7)
    image_ND, target_TD = draw(30, dtype=dtypes[0]), draw(45, seed=1, dtype=dtypes[1])
    image_ND[3] = -target_TD[7]  # as near as can be, the other way: its absolute value counts
    filter = build(tmp_path, target_TD, norm=norm)
    found, failed = run(filter, make_batch(image_ND))
    np.testing.assert_allclose(found, reference(image_ND, target_TD, norm), rtol=2e-6)
    assert failed == [] and filter.target_aware
    order = np.random.default_rng(0).permutation(30)
    shuffled, _ = run(filter, make_batch(image_ND[order]))
    np.testing.assert_array_equal(shuffled, np.array(found)[order])


def test_norm_2_ranks_as_vas_and_the_default_is_inf(tmp_path: Path) -> None:
    target_TD, batch = draw(45, seed=1), make_batch(draw(30))
    scores = {norm: np.array(run(build(tmp_path, target_TD, norm=norm), batch)[0]) for norm in ("inf", 2, "vas")}
    np.testing.assert_allclose(scores[2] ** 2, 45 * scores["vas"], rtol=1e-5)
    np.testing.assert_array_equal(scores[2].argsort(), scores["vas"].argsort())
    assert run(build(tmp_path, target_TD), batch)[0] == scores["inf"].tolist()


def test_the_second_moment_of_blocks_is_that_of_all() -> None:
    target_TD = draw(50)
    moment_DD, num_targets = find_second_moment([target_TD[:3], target_TD[3:]])
    wide = target_TD.astype(float)
    np.testing.assert_allclose(moment_DD, np.mean([np.outer(t, t) for t in wide], axis=0), atol=1e-14)
    assert num_targets == 50 and moment_DD.dtype == np.float64


@pytest.mark.parametrize("norm", ["inf", 2, "vas"])
def test_rows_without_a_vector_and_rows_of_any_length(tmp_path: Path, norm: Any) -> None:
    image_ND = draw(6, dtype=np.float32)
    image_ND[1], image_ND[2], image_ND[3], image_ND[4] = 0, np.nan, np.inf, image_ND[4] * 1e30
    image_ND[5] *= 1e5
    filter = build(tmp_path, draw(9, seed=1), norm=norm)
    found, failed = run(filter, make_batch(image_ND))
    assert found[1] == 0 and found[2:5] == [None] * 3 and failed == [2, 3, 4] and math.isfinite(found[5])
    assert run(filter, make_batch(image_ND[2:3])) == ([None], [0])
    assert run(filter, make_batch(image_ND[:0])) == ([], [])
    free = pa.RecordBatch.from_pydict({"l14_img": pa.array([None, []], pa.list_(pa.float32()))})
    assert run(filter, free) == ([None, None], [0, 1])


@pytest.mark.parametrize("norm", ["inf", 2])
def test_broken_targets_are_left_out_and_told(tmp_path: Path, norm: Any, caplog: pytest.LogCaptureFixture) -> None:
    image_ND, target_TD = draw(8), draw(9, seed=1)
    target_TD[4], target_TD[5, 0] = np.nan, np.inf
    with caplog.at_level(logging.WARNING, "winnow"):
        found, _ = run(build(tmp_path, target_TD, norm=norm), make_batch(image_ND))
    np.testing.assert_allclose(found, reference(image_ND, np.delete(target_TD, [4, 5], 0), norm), rtol=2e-6)
    assert "2 rows are null or not finite" in caplog.text


def test_targets_of_several_files_and_kinds(tmp_path: Path) -> None:
    image_ND, target_TD = draw(8), draw(9, seed=1)
    whole = build(tmp_path, target_TD)
    for number, rows in enumerate((slice(0, 4), slice(4, 9))):
        np.save(tmp_path / f"task{number}.npy", target_TD[rows])
        torch.save({"image_features": torch.from_numpy(target_TD[rows])}, tmp_path / f"task{number}.pt")
    wanted = run(whole, make_batch(image_ND))
    for suffix in ("npy", "pt"):
        places = "::".join(str(tmp_path / f"task{number}.{suffix}") for number in (0, 1))
        filter = build_filter({"filter": "norm_sim", "embedding": "l14_img", "targets": places})
        assert run(filter, make_batch(image_ND)) == wanted


def test_identity_follows_the_bytes_of_the_targets(tmp_path: Path) -> None:
    first = build(tmp_path, draw(9)).identity
    (tmp_path / "copy").mkdir()
    assert build(tmp_path / "copy", draw(9)).identity == first
    assert len({first, build(tmp_path, draw(9), norm=2).identity, build(tmp_path, draw(8)).identity}) == 3


def test_targets_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="hold no embedding"):
        build(tmp_path, np.full((3, DIM), np.nan, np.float32)).load()
    with pytest.raises(ConfigError, match="l14_img has 8 numbers and the targets have 16"):
        build(tmp_path, draw(3)).load()(make_batch(draw(2, 8)))
    with pytest.raises(ConfigError, match=r"norm_sim\.norm"):
        build(tmp_path, draw(3), norm=3)
    np.save(tmp_path / "narrow.npy", draw(3, 8))
    both = f"{tmp_path}/targets.npy::{tmp_path}/narrow.npy"
    with pytest.raises(ConfigError, match="embeddings of 8 and 16 numbers"):
        build_filter({"filter": "norm_sim", "embedding": "l14_img", "targets": both, "norm": "vas"}).load()


def test_targets_that_change_under_a_run_are_not_used(tmp_path: Path) -> None:
    filter = build(tmp_path, draw(9))
    build(tmp_path, draw(8))
    with pytest.raises(ConfigError, match="changed since this run began"):
        filter.load()


def test_targets_that_are_not_there_are_asked_for(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"filter 'norm_sim' has no targets: .* Give embeddings as its `targets`"):
        build_filter({"filter": "norm_sim", "embedding": "l14_img", "targets": str(tmp_path / "none_*.pt")})
