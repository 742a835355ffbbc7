"""winnow dfn calibrate: thresholds against a sorted list, intervals against the samples themselves, and the card."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from made_scores import shuffle, write_scores
from toy import COLORS, render, tar_row

from jobs.calibrate_dfn import main as calibrate_dfn
from jobs.recipes import Network
from jobs.stage_calibrate import calibrate
from jobs.stage_card import write_card
from jobs.stage_networks import run_network
from jobs.stage_select import run_select
from pipeline.clip_model import sha256_of_model
from pipeline.config import read_config
from pipeline.errors import ConfigError
from pipeline.intervals import rank_interval, share_interval
from pipeline.manifest import read_manifest, write_manifest
from pipeline.select import Step
from pipeline.tars import write_rows

NUM, POOL = 3000, 3200
BY = "dfn_similarity_score"


def uid(n: int) -> str:
    return f"{(n * 0x9E3779B97F4A7C15F39CC0605CEDC835 + 5) % (1 << 128):032x}"


def make_values() -> list[float | None]:
    rng = np.random.default_rng(4)
    values = rng.normal(0.2, 0.1, NUM).astype(np.float32).round(3).tolist()
    return [None if n % 31 == 0 else math.nan if n % 97 == 0 else value for n, value in enumerate(values)]


def make_scores(folder: Path, values: list[float | None] | None = None) -> str:
    """3,000 rows in two parts of a pool of 3,200; some without a score, many tied."""
    values = make_values() if values is None else values
    table = pa.table(
        {
            "uid": [uid(n) for n in range(len(values))],
            BY: pa.array(values, pa.float32()),
            "language": ["en"] * len(values),
        }
    )
    parts = {"00000000": table.slice(0, len(values) // 3), "00000001": table.slice(len(values) // 3)}
    return str(write_scores(folder, parts, {BY: "dfn", "language": "language"}, num_pool=len(values) + POOL - NUM))


def scored(values: list[float | None]) -> list[float]:
    return sorted((v for v in values if v is not None and not math.isnan(v)), reverse=True)


@pytest.fixture(scope="module")
def scores(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_scores(tmp_path_factory.mktemp("scores") / "scores")


@pytest.mark.parametrize(("wish", "wanted"), [({"fraction": 0.15}, 480), ({"count": 1}, 1), ({"fraction": 0.89}, 2848)])
def test_the_exact_threshold_is_that_of_the_sorted_scores(scores: str, wish: dict[str, Any], wanted: int) -> None:
    found, ordered = calibrate(scores, BY, **wish), scored(make_values())
    assert (found["wanted"], found["pool"], found["method"]) == (wanted, POOL, "exact")
    assert found["threshold"] == ordered[wanted - 1]
    assert found["kept_at_or_above"] == sum(v >= found["threshold"] for v in ordered)
    assert found["kept_fraction"] == found["kept_at_or_above"] / POOL


def test_a_sample_gives_the_order_statistics_of_the_drawn_rows(scores: str) -> None:
    found = calibrate(scores, BY, fraction=0.15, sample=0.1, seed=9)
    chosen = sorted(range(NUM), key=lambda n: shuffle(uid(n), 9))[:300]
    ordered = scored([make_values()[n] for n in chosen])
    upper, lower = rank_interval(300, 480 / NUM, 0.95)
    assert upper and lower and found["threshold"] == ordered[48 - 1]
    assert found["threshold_interval"] == [ordered[lower - 1], ordered[upper - 1]]
    kept = sum(v >= found["threshold"] for v in ordered)
    assert found["sample"] == {"rows": 300, "of": NUM, "seed": 9, "scored": len(ordered), "kept": kept}
    interval = share_interval(48, 300, 0.95, most_hits=kept)
    assert found["kept_fraction_interval"] == pytest.approx([end * NUM / POOL for end in interval])
    assert found["kept_fraction"] == pytest.approx(kept / 300 * NUM / POOL)
    assert found == calibrate(scores, BY, fraction=0.15, sample=300, seed=9)
    assert found["sample"] != calibrate(scores, BY, fraction=0.15, sample=300, seed=8)["sample"]


def test_intervals_hold_the_truth_as_often_as_they_say(scores: str) -> None:
    truth, ordered = calibrate(scores, BY, fraction=0.3)["threshold"], scored(make_values())
    hits = np.zeros(2, int)
    for seed in range(100):
        found = calibrate(scores, BY, fraction=0.3, sample=200, seed=seed, confidence=0.8)
        low, high = found["threshold_interval"]
        kept = sum(v >= found["threshold"] for v in ordered) / POOL
        within = found["kept_fraction_interval"]
        hits += low <= truth <= high, within[0] <= kept <= within[1]
    assert (hits >= 70).all() and (hits < 100).all()


def test_every_scored_row_as_a_sample_of_a_larger_pool(scores: str) -> None:
    exact, found = calibrate(scores, BY, fraction=0.15), calibrate(scores, BY, fraction=0.15, sample=1.0)
    assert found["threshold"] == exact["threshold"] and found["kept_at_or_above"] == exact["kept_at_or_above"]
    assert found["threshold_interval"][0] < found["threshold"] < found["threshold_interval"][1]


def test_a_bound_that_a_small_sample_cannot_give_is_none(scores: str) -> None:
    found = calibrate(scores, BY, fraction=0.15, sample=8)
    assert found["threshold_interval"][1] is None  # the largest of 8 may well lie below
    assert (
        calibrate(scores, BY, fraction=0.85, sample=40)["threshold_interval"][0] is None
    )  # among rows without a score


@pytest.mark.parametrize(
    ("wish", "word"),
    [
        ({"by": "dfn_similarity", "fraction": 0.1}, "did you mean"),
        ({"by": "language", "fraction": 0.1}, "holds text"),
        ({"fraction": 0.0}, "cannot keep 0 rows of a pool of 3,200"),
        ({"fraction": 0.97}, "cannot keep 3,104 rows"),
        ({"count": 2950}, "cannot keep 2,950 rows"),
        ({"fraction": 1.5}, "not in"),
        ({"fraction": 0.01, "sample": 20}, "a sample of 20 rows, .* Draw more rows"),
        ({"fraction": 0.897, "sample": 60, "seed": 1}, "a sample of 60 rows, 55 of them"),
        ({"fraction": 0.1, "sample": 3001}, "a sample of 3001 of 3,000"),
        ({"fraction": 0.1, "sample": 0.0}, "a sample of 0.0"),
        ({"fraction": 0.1, "sample": math.nan}, "a sample of nan"),
        ({"fraction": 0.1, "sample": math.inf}, "a sample of inf"),
        ({"count": 3100, "sample": 0.5}, "3,000 have a .* Ask for fewer"),
        ({"fraction": 0.1, "sample": 0.5, "confidence": 95.0}, "confidence 95.0"),
    ],
)
def test_a_wish_that_cannot_be_fulfilled_says_why(scores: str, wish: dict[str, Any], word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        calibrate(scores, **{"by": BY, **wish})


def test_an_infinite_threshold_is_no_threshold(tmp_path: Path) -> None:
    made = make_scores(tmp_path / "scores", [math.inf] * 30 + [0.5] * 30)
    with pytest.raises(ConfigError, match=r"is inf: too many .* Ask for more"):
        calibrate(made, BY, count=20)
    assert calibrate(made, BY, count=40)["threshold"] == 0.5


def test_the_step_keeps_what_the_calibration_says(scores: str, tmp_path: Path) -> None:
    found = calibrate(scores, BY, fraction=0.15)
    step = read_config(Step, json.loads(json.dumps(found["step"])), where="step")
    assert run_select(lambda: None, scores, "s", [step], str(tmp_path)).facts["rows"] == found["kept_at_or_above"]


def write_pairs(folder: Path, num: int, start: int) -> str:
    folder.mkdir(parents=True)
    with (folder / "00000000.tar").open("wb") as file:
        rows = [
            {"key": f"{n:05d}", "text": f"{color} paper number {n}"}
            for n in range(start, start + num)
            for color in [list(COLORS)[n % 4]]
        ]
        write_rows(file, [tar_row(row, render(str(row["text"]).split()[0], int(row["key"]))) for row in rows])
    return str(folder)


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """clean, other and tune pairs; networks `plain`, and `tuned` with a sweep and held-out rows; scores of `tuned`."""
    folder = tmp_path_factory.mktemp("places")
    clean, tune = write_pairs(folder / "clean", 60, 0), write_pairs(folder / "tune", 32, 500)
    write_pairs(folder / "other", 20, 900)
    train = {"model": "winnow-vit-tiny", "samples": 32, "batch_size": 16}
    plain = read_config(Network, {"data": "clean", "train": train}, where="")
    run_network(plain, data=clean, out=str(folder / "plain"), quiet=True)
    finetune = {"sets": [{"pairs": tune}], "train": {"samples": 16}, "sweep": [0.0, 1.0]}
    tuned = read_config(Network, {"data": "clean", "train": train | {"heldout": 12}, "finetune": finetune}, where="")
    run_network(tuned, data=clean, out=str(folder / "tuned"), quiet=True)
    for name in ("tuned", "plain"):
        name_network(make_scores(folder / f"scores-{name}"), str(folder / name))
    return folder


def name_network(scores: str, model: str) -> None:
    """Make the scores say that they are this network's, as `winnow score` does."""
    made = read_manifest(scores)
    assert made
    settings = {"version": 1, "makes": {BY: "float"}, "architecture": "winnow-vit-tiny"}
    settings |= {"sha256": sha256_of_model(model)}
    write_manifest(scores, replace(made, config={"filters": {"dfn": settings, "language": {"version": 2}}}))
    entries = [{"filter": "caption_language", "name": "language"}, {"filter": "clip_score", "name": "dfn"}]
    request = {"stage": "score", "pool": "pool", "entries": [entries[0], entries[1] | {"model": model}], "parts": []}
    (Path(scores) / "request.json").write_text(json.dumps(request))


def read_card(folder: Path) -> dict[str, Any]:
    def refuse(text: str) -> float:
        raise AssertionError(f"{text} is not strict JSON")

    card: dict[str, Any] = json.loads((folder / "filter_card.json").read_text(), parse_constant=refuse)
    return card


def test_the_card_of_a_network_of_winnows(places: Path, tmp_path: Path) -> None:
    scores = str(places / "scores-tuned")
    found = calibrate(scores, BY, fraction=0.15, sample=0.5)
    assert write_card(str(tmp_path / "a"), scores, found) == str(tmp_path / "a/filter_card.json")
    write_card(str(tmp_path / "b"), scores, found)
    for name in ("filter_card.json", "filter_card.md"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    card, made = read_card(tmp_path / "a"), read_manifest(str(places / "tuned"))
    assert made and card["calibration"] == found and card["filter"]["name"] == "dfn"
    assert card["network"]["identity"] == made.identity and card["network"]["trained_by"] == "winnow"
    assert card["network"]["manifest"]["facts"] == made.facts and card["network"]["manifest"]["config"] == made.config
    share = str(made.facts["finetuned_share"])
    assert card["heldout"]["recall"] == made.facts["heldout"][share] and card["heldout"]["recall"]["pairs"] == 12
    values = scored(make_values())
    shape = card["distribution"]
    assert sum(shape["counts"]) == len(values) and shape["num_null"] == NUM - len(values)
    assert card["scores"]["rows_of_pool"] == POOL and card["scores"]["pool"] == "hand-made"
    page = (tmp_path / "a/filter_card.md").read_text()
    assert repr(found["threshold"]) in page and "95 % interval of the threshold" in page and '"at_least"' in page
    assert str(places) not in page + json.dumps(card)  # a place is no part of what a filter is


def test_held_out_retrieval_can_be_measured_for_the_card(places: Path, tmp_path: Path) -> None:
    scores = str(places / "scores-plain")
    found = calibrate(scores, BY, fraction=0.15)
    write_card(str(tmp_path / "a"), scores, found)
    assert (
        read_card(tmp_path / "a")["heldout"] is None and "Not measured." in (tmp_path / "a/filter_card.md").read_text()
    )
    assert any("held-out retrieval" in line for line in read_card(tmp_path / "a")["unknown"])
    write_card(str(tmp_path / "b"), scores, found, heldout=str(places / "other"))
    heldout = read_card(tmp_path / "b")["heldout"]
    assert heldout["recall"]["pairs"] == 20 and heldout["on"] == "pairs given for it"
    with pytest.raises(ConfigError, match=r"was trained on .* all of it"):
        write_card(str(tmp_path / "c"), scores, found, heldout=str(places / "clean"))


def test_what_it_was_fine_tuned_on_is_no_held_out_set(places: Path, tmp_path: Path) -> None:
    scores = str(places / "scores-tuned")
    with pytest.raises(ConfigError, match=r"was trained on .* all of it"):
        write_card(str(tmp_path), scores, calibrate(scores, BY, fraction=0.15), heldout=str(places / "tune"))


def test_of_the_training_pairs_only_the_rows_held_out_are_measured(places: Path, tmp_path: Path) -> None:
    scores = str(places / "scores-tuned")
    found = calibrate(scores, BY, fraction=0.15)
    write_card(str(tmp_path), scores, found, heldout=str(places / "clean"))
    made, heldout = read_manifest(str(places / "tuned")), read_card(tmp_path)["heldout"]
    assert made and heldout["recall"] == made.facts["heldout"][str(made.facts["finetuned_share"])]


def test_a_card_says_what_it_does_not_know(places: Path, scores: str, tmp_path: Path) -> None:
    found = calibrate(scores, BY, fraction=0.15)  # scores whose manifest names no network at all
    write_card(str(tmp_path / "a"), scores, found)
    assert "a network" in read_card(tmp_path / "a")["unknown"][0] and read_card(tmp_path / "a")["network"] == {}
    with pytest.raises(ConfigError, match="leave --network"):
        write_card(str(tmp_path / "a"), scores, found, model=str(places / "plain"))
    with pytest.raises(ConfigError, match="no network to measure"):
        write_card(str(tmp_path / "a"), scores, found, heldout=str(places / "other"))
    gone = shutil.copytree(places / "scores-plain", tmp_path / "scores")
    name_network(str(gone), str(places / "plain"))
    moved = shutil.copytree(places / "plain", tmp_path / "moved")
    request = json.loads((gone / "request.json").read_text())
    request["entries"][1]["model"] = "/nowhere/network"
    (gone / "request.json").write_text(json.dumps(request))
    write_card(str(tmp_path / "b"), str(gone), found)
    assert "name it: --network" in read_card(tmp_path / "b")["unknown"][0]
    write_card(str(tmp_path / "c.json"), str(gone), found, model=str(moved))
    assert json.loads((tmp_path / "c.json").read_text())["network"]["trained_by"] == "winnow"
    assert (tmp_path / "c.md").read_text().startswith("# Filter card: dfn_similarity_score")
    with pytest.raises(ConfigError, match="did not make these scores"):
        write_card(str(tmp_path / "d"), str(gone), found, model=str(places / "tuned"))
    weights = f"winnow-vit-tiny@{moved / 'checkpoint.pt'}"
    write_card(str(tmp_path / "e"), str(gone), found, model=weights)
    assert read_card(tmp_path / "e")["unknown"][:2] == [
        "what it was trained on: winnow did not train it",
        "its licence",
    ]


def test_the_card_of_a_released_network_has_its_licence(places: Path, tmp_path: Path) -> None:
    import open_clip
    import torch

    hub = tmp_path / "DFN-public"
    hub.mkdir()
    (hub / "open_clip_config.json").write_text(json.dumps({"model_cfg": open_clip.get_model_config("winnow-vit-tiny")}))
    state = torch.load(places / "plain/checkpoint.pt", weights_only=True)["state_dict"]
    torch.save(state, hub / "open_clip_pytorch_model.bin")
    scores = make_scores(tmp_path / "scores")
    name_network(scores, str(hub))
    write_card(str(tmp_path / "card"), scores, calibrate(scores, BY, count=10))
    network = read_card(tmp_path / "card")["network"]
    assert network["hub"] == "apple/DFN-public" and network["licence"].startswith("apple-amlr")
    assert "apple-amlr" in (tmp_path / "card/filter_card.md").read_text()


def test_the_command(places: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--scores", str(places / "scores-plain"), "--by", BY, "--fraction", "0.15"]
    card = ["--card", str(tmp_path / "card"), "--heldout", str(places / "other"), "--device", "cpu"]
    assert calibrate_dfn([*words, "--sample", "0.5", "--seed", "2", "--confidence", "0.999", *card]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert found["sample"]["rows"] == 1500 and found["confidence"] == 0.999 and "filter_card.json" in err
    assert "99.9 % interval of the threshold" in (tmp_path / "card/filter_card.md").read_text()
    assert read_card(tmp_path / "card")["calibration"] == found
    assert calibrate_dfn([*words, "--heldout", str(places / "other")]) == 2 and "--card" in capsys.readouterr().err
    assert calibrate_dfn([*words, "--sample", "half"]) == 2 and "a share such as 0.1" in capsys.readouterr().err
    assert calibrate_dfn([*words, "--sample", "600"]) == 0
    assert json.loads(capsys.readouterr().out)["sample"]["rows"] == 600
