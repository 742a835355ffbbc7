"""The linear probe against scikit-learn; its sample of negatives, held-out numbers and wrong inputs."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_embeddings import draw, draw_uids
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.preprocessing import StandardScaler

from pipeline.errors import ConfigError, PoolError
from pipeline.manifest import Counts
from pipeline.probe import Probe, ProbeConfig, draw_negatives, fit_probe, measure_auroc, read_positives
from pipeline.select_draw import shuffle_uids


def make_config(**options: Any) -> ProbeConfig:
    return ProbeConfig(**{"embedding": "x", "positives": "p.npy", "held_out": 0} | options)


def make_classes(positives: int = 60, negatives: int = 240) -> tuple[np.ndarray, np.ndarray]:
    return draw(positives, seed=1, dtype=np.float32) + np.float32(0.15), draw(negatives, seed=2)


@pytest.mark.parametrize("l2", [1e-3, 0.1])
def test_as_scikit_learn(l2: float) -> None:
    positive, negative = make_classes()
    probe, facts = fit_probe(positive, negative, make_config(l2=l2))
    rows = np.concatenate([positive, negative]).astype(np.float64)
    labels = np.repeat([1, 0], [60, 240])
    scaler = StandardScaler().fit(rows)
    peer = LogisticRegression(C=1 / (l2 * 300), class_weight="balanced", tol=1e-10, max_iter=10_000)
    peer.fit(scaler.transform(rows), labels)
    np.testing.assert_allclose(probe.weights, peer.coef_[0], atol=2e-5)
    logits = peer.decision_function(scaler.transform(rows))
    np.testing.assert_allclose(probe.score(rows), logits, atol=1e-4)
    assert facts["steps"] < 200 and "auroc" not in facts


def test_the_minimum_is_one() -> None:
    """Small steps in any direction raise the loss, computed by hand."""
    positive, negative = make_classes(10, 30)
    probe, facts = fit_probe(positive, negative, make_config(l2=0.01))

    def loss(weights: np.ndarray, bias: float) -> float:
        def part(rows: np.ndarray, sign: int) -> float:
            return float(np.mean([np.log1p(np.exp(-sign * (weights @ row + bias))) for row in rows]))

        scaled = [(rows - probe.mean) / probe.scale for rows in (positive, negative)]
        return (part(scaled[0], 1) + part(scaled[1], -1)) / 2 + 0.01 / 2 * float(weights @ weights)

    least = loss(probe.weights, float(probe.bias))
    assert facts["loss"] == pytest.approx(least, rel=1e-4)
    rng = np.random.default_rng(0)
    for _ in range(20):
        step = rng.normal(size=17) * 1e-3
        assert loss(probe.weights + step[:16], float(probe.bias + step[16])) > least


def test_the_same_again() -> None:
    first, again = (fit_probe(*make_classes(), make_config())[0] for _ in range(2))
    assert all(a.tobytes() == b.tobytes() for a, b in zip(first, again, strict=True))


def test_rows_held_out() -> None:
    positive, negative = make_classes()
    probe, facts = fit_probe(positive, negative, make_config(held_out=0.25))
    alone, _ = fit_probe(positive[15:], negative[60:], make_config())
    assert alone.weights.tobytes() == probe.weights.tobytes()
    scores = [probe.score(positive[:15]), probe.score(negative[:60])]
    peer = roc_auc_score(np.repeat([1, 0], [15, 60]), np.concatenate(scores))
    assert facts["auroc"] == pytest.approx(peer, abs=1e-6) and 0.5 < facts["auroc"] < 1
    assert facts["accuracy"] == pytest.approx(((scores[0] > 0).mean() + (scores[1] <= 0).mean()) / 2, abs=1e-6)


def test_ties_are_half_a_pair() -> None:
    assert measure_auroc(np.array([1.0, 1.0]), np.array([1.0, 1.0, 1.0])) == 0.5
    assert measure_auroc(np.array([2.0, 1.0]), np.array([1.0, 0.0])) == 0.875


def test_columns_that_say_nothing() -> None:
    """Constant and equal inputs: weight 0, and finite logits."""
    positive, negative = make_classes()
    positive[:, 3] = negative[:, 3] = 2
    probe, _ = fit_probe(positive, negative, make_config())
    assert probe.weights[3] == 0 and np.isfinite(probe.score(negative)).all()
    equal = np.ones((5, 4), np.float32)
    assert np.abs(fit_probe(equal, equal, make_config())[0].score(equal)).max() < 1e-6


def test_classes_that_can_be_told_apart_wholly() -> None:
    probe, facts = fit_probe(np.full((9, 2), 5.0), np.full((9, 2), -5.0), make_config(held_out=0.3))
    assert facts["auroc"] == facts["accuracy"] == 1 and np.isfinite(probe.weights).all()


def test_negatives_depend_on_uids_and_seed_alone() -> None:
    uids, vector_ND = draw_uids(1000), draw(1000)
    uids[5], vector_ND[[7, 8]] = uids[4], np.nan
    keys = shuffle_uids(uids, 3)
    places = sorted(set(range(1000)) - {5, 7, 8}, key=lambda n: tuple(keys[n]))[:40]
    made = []
    for order in (np.arange(1000), np.r_[500:1000, :500]):
        batches = [(uids[some], vector_ND[some]) for some in np.array_split(order, 23)]
        row_ND, counts = draw_negatives(batches, make_config(negatives=40, seed=3))
        assert counts == Counts(read=1000, kept=40, dropped={"sample": 958}, failed={"missing_embedding": 2})
        made.append(row_ND)
        np.testing.assert_array_equal(row_ND, vector_ND[places])
    all_ND, counts = draw_negatives([(uids, vector_ND)], make_config(negatives=5000))
    assert len(all_ND) == counts.kept == 997
    assert len(draw_negatives([], make_config())[0]) == 0
    with pytest.raises(PoolError, match="cannot stand in one matrix"):
        draw_negatives([(uids[:9], draw(9)), (uids[:9], draw(9, 8))], make_config())


def test_positives_of_two_columns(tmp_path: Path) -> None:
    image, text = draw(30), draw(30, 8)
    image[3], text[4] = np.nan, np.inf
    np.savez(tmp_path / "clean.npz", clip_img=image, clip_txt=text)
    columns = {"embedding": ["a", "b"], "positive_columns": ["clip_img", "clip_txt"]}
    config = make_config(positives=str(tmp_path / "clean.npz"), **columns)
    row_ND, counts = read_positives(config)
    assert counts == Counts(read=30, kept=28, failed={"missing_embedding": 2})
    wanted = np.delete(np.concatenate([image, text], axis=1), [3, 4], axis=0)
    assert sorted(map(tuple, row_ND.tolist())) == sorted(map(tuple, wanted.tolist()))
    assert row_ND.tolist() != wanted.tolist()
    np.savez(tmp_path / "clean.npz", clip_img=image, clip_txt=text[:5])
    with pytest.raises(PoolError, match=r"the columns have \[30, 5\] rows"):
        read_positives(config)


@pytest.mark.parametrize(
    ("positive", "negative", "message"),
    [
        (draw(0), draw(3), "0 positives and 3 negatives"),
        (draw(3), draw(0), "3 positives and 0 negatives"),
        (draw(3, 4), draw(3), "positives of 4 numbers and pool rows of 16"),
    ],
)
def test_what_cannot_be_trained_on(positive: np.ndarray, negative: np.ndarray, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        fit_probe(positive, negative, make_config())


@pytest.mark.parametrize(
    "wrong",
    [
        {"negatives": 0},
        {"held_out": 1},
        {"l2": -1},
        {"l2": float("nan")},
        {"seed": -1},
        {"iterations": 0},
        {"embedding": []},
        {"positive_columns": ["a", "b"]},
    ],
)
def test_configs_that_cannot_be(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="fit: "):
        make_config(**wrong)


def test_the_logit_by_hand() -> None:
    probe = Probe(np.array([2.0, -1.0]), np.array(0.5), np.array([1.0, 0.0]), np.array([2.0, 4.0]))
    assert probe.score(np.array([[3, 8], [1, 0]], np.float16)).tolist() == [0.5, 0.5]
