import json
from pathlib import Path

import pytest
import torch

from eval38.classify import Outcome
from eval38.results import (
    ModelIdentity,
    build_provenance,
    build_row,
    count_images,
    hash_weights,
    identify_model,
    read_results,
    select_current,
    value_of,
    write_results,
)
from eval38.rows import LostImage
from eval38.tasks import find_task, own_task
from pipeline.clip_model import open_model
from pipeline.errors import EvalError

MODEL = ModelIdentity("winnow-vit-tiny", "ab" * 32)
PROVENANCE = build_provenance("mnist", MODEL, data_hash="cd", precision="fp32")
METRICS = {"acc1": 0.5, "acc5": None, "mean_per_class_recall": 0.25}


@pytest.mark.parametrize(
    ("images", "lost", "incomplete", "failed"),
    [
        (10_000, (), False, {}),
        (9_999, (), True, {}),
        (
            9_998,
            (
                LostImage("0.tar:a", "unreadable_image", "why"),
                LostImage("1.tar", "truncated_tar", "cut"),
            ),
            True,
            {"truncated_tar": 1, "unreadable_image": 1},
        ),
    ],
)
def test_row(images: int, lost: tuple[LostImage, ...], incomplete: bool, failed: dict[str, int]) -> None:
    row = build_row(find_task("cifar10"), Outcome(METRICS, images, lost), PROVENANCE)
    assert list(row)[:3] == ["key", "dataset", "metrics"]
    assert row["metrics"] == {**METRICS, "main_metric": 0.5} and row["dataset"] == "CIFAR-10"
    assert (row["images"], row["images_expected"], row["incomplete"]) == (images, 10_000, incomplete)
    assert row["failed"] == failed and len(row["lost"]) == len(lost)
    count_images(row).check("cifar10")


def test_lost_images_are_named_up_to_a_limit_and_all_counted() -> None:
    lost = tuple(LostImage(f"0.tar:{n}", "unreadable_image", "why") for n in range(1000))
    row = build_row(own_task("mine"), Outcome(METRICS, 1, lost), PROVENANCE)
    assert len(row["lost"]) == 100 and row["failed"] == {"unreadable_image": 1000}
    assert row["lost"][0] == "0.tar:0: unreadable_image: why" and row["images_expected"] is None


def test_main_metric_is_the_tasks() -> None:
    row = build_row(find_task("vtab/pets"), Outcome(METRICS, 1, ()), PROVENANCE)
    assert row["metrics"]["main_metric"] == 0.25


def test_a_corrected_column_stands_beside_datacomps() -> None:
    task = find_task("vtab/clevr_closest_object_distance")
    row = build_row(task, Outcome(METRICS, 1, (), corrected={"acc1": 0.75}), PROVENANCE)
    assert row["metrics"]["main_metric"] == 0.5 and row["corrected"] == {"acc1": 0.75, "main_metric": 0.75}
    assert (value_of(row, "compat"), value_of(row, "corrected")) == (0.5, 0.75)
    plain = build_row(find_task("mnist"), Outcome(METRICS, 1, ()), PROVENANCE)
    assert "corrected" not in plain and value_of(plain, "corrected") == 0.5


def test_a_corrected_secondary_metric_leaves_the_main_one() -> None:
    row = build_row(find_task("fairness/fairface"), Outcome({"acc_race_avg": 0.5}, 1, (), {"x_wg": 0.1}), PROVENANCE)
    assert row["metrics"]["main_metric"] is None and row["corrected"] == {"x_wg": 0.1, "main_metric": None}


def test_only_a_task_whose_numbers_changed_has_a_revision(caplog: pytest.LogCaptureFixture) -> None:
    key = "vtab/clevr_closest_object_distance"
    new = build_provenance(key, MODEL, data_hash="cd", precision="fp32")
    assert new == PROVENANCE | {"revision": 2}
    old = build_row(find_task(key), Outcome(METRICS, 1, ()), PROVENANCE)
    assert not select_current({key: old}, {key: new}) and "revision changed from absent to 2" in caplog.text
    other = build_row(find_task("mnist"), Outcome(METRICS, 1, ()), PROVENANCE)
    assert select_current({"mnist": other}, {key: new})


def test_file_is_strict_json_in_the_lists_order(tmp_path: Path) -> None:
    tasks = [own_task("мой"), find_task("mnist"), find_task("cifar10")]
    write_results(str(tmp_path), [build_row(task, Outcome(METRICS, 1, ()), PROVENANCE) for task in tasks])

    def refuse(text: str) -> None:
        raise AssertionError(text)

    lines = (tmp_path / "eval_results.jsonl").read_text().splitlines()
    rows = [json.loads(line, parse_constant=refuse) for line in lines]
    assert [row["key"] for row in rows] == ["cifar10", "mnist", "мой"]
    assert rows[0]["metrics"]["acc5"] is None
    assert read_results(str(tmp_path)) == {row["key"]: row for row in rows}


def test_a_line_ends_where_json_lines_end(tmp_path: Path) -> None:
    """Unicode has more line ends than a file: next line, line separator."""
    lost = (LostImage("0.tar:a\u2028b\x85c", "unreadable_image", "why"),)
    rows = [build_row(find_task(key), Outcome(METRICS, 1, lost), PROVENANCE) for key in ("cifar10", "mnist")]
    write_results(str(tmp_path), rows)
    assert list(read_results(str(tmp_path)).values()) == rows


def test_a_number_that_is_not_finite_is_never_written(tmp_path: Path) -> None:
    metrics: dict[str, float | None] = {**METRICS, "acc1": float("nan")}
    with pytest.raises(ValueError, match="JSON compliant"):
        write_results(str(tmp_path), [build_row(find_task("mnist"), Outcome(metrics, 1, ()), PROVENANCE)])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        ({"metrics": {"acc1": 0.5}}, "main_metric"),
        ({"metrics": {"main_metric": "0.5"}}, "main_metric"),
        ({"key": 5}, "key"),
        ({"key": ["mnist"], "dataset": None}, "key and dataset"),
        ({"metrics": 1}, "metrics"),
        ({"corrected": {"acc1": 1}}, "main_metric"),
        ({"corrected": 1}, "corrected"),
        ({"provenance": {"model": "x"}}, "data_hash"),
        ({"provenance": "x"}, "provenance"),
        ({"outcomes": "x"}, "outcomes"),
        ({"outcomes": {"compat": 1}}, "outcomes"),
    ],
)
def test_a_line_of_another_form_is_told(tmp_path: Path, change: dict[str, object], wrong: str) -> None:
    row = {"key": "mnist", "dataset": "MNIST", "metrics": {"main_metric": None}, "outcomes": None, "provenance": None}
    write_results(str(tmp_path), [row])
    assert read_results(str(tmp_path)) == {"mnist": row}
    (tmp_path / "eval_results.jsonl").write_text(json.dumps(row | change) + "\n")
    with pytest.raises(EvalError, match=rf"line 1 is no result \({wrong} missing or of another kind\)\. Move"):
        read_results(str(tmp_path))


@pytest.mark.parametrize("text", ["{", "3", '{"dataset": "x"}', "\n", "\udcff"])
def test_foreign_file_is_not_overwritten(tmp_path: Path, text: str) -> None:
    (tmp_path / "eval_results.jsonl").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(EvalError, match="line 1 is no result"):
        read_results(str(tmp_path))


@pytest.mark.parametrize(
    ("change", "kept", "said"),
    [
        ({}, True, "is kept"),
        ({"model_sha256": "ef"}, False, f"model_sha256 changed from ef to {'ab' * 32}"),
        ({"data_hash": "00"}, False, "data_hash changed from 00 to cd"),
        ({"precision": "bf16"}, False, "precision changed from bf16 to fp32"),
        ({"torch": "2.0"}, False, "torch changed from 2.0"),
    ],
)
def test_what_is_kept(change: dict[str, str], kept: bool, said: str, caplog: pytest.LogCaptureFixture) -> None:
    row = build_row(find_task("mnist"), Outcome(METRICS, 1, ()), {**PROVENANCE, **change})
    with caplog.at_level("INFO", "winnow"):
        assert bool(select_current({"mnist": row}, {"mnist": PROVENANCE})) == kept
    assert said in caplog.text


@pytest.mark.parametrize(("change", "kept"), [({}, True), ({"data_hash": "00"}, True), ({"precision": "bf16"}, False)])
def test_results_of_tasks_not_asked_for_stay_when_the_model_is_the_same(change: dict[str, str], kept: bool) -> None:
    row = build_row(find_task("mnist"), Outcome(METRICS, 1, ()), {**PROVENANCE, **change})
    assert bool(select_current({"mnist": row}, {"cifar10": PROVENANCE})) == kept


def test_a_result_that_datacomp_wrote_is_made_again(caplog: pytest.LogCaptureFixture) -> None:
    row = {"key": "mnist", "dataset": "MNIST", "metrics": {"acc1": 0.1, "main_metric": 0.1}}
    assert not select_current({"mnist": row}, {"mnist": PROVENANCE})
    assert "model_sha256 changed from absent" in caplog.text


def test_identity_of_a_model(checkpoint: str) -> None:
    identity, opened = identify_model(checkpoint, device="cpu")
    assert identity.name == "winnow-vit-tiny" and len(identity.sha256) == 64 and opened is None
    fresh, opened = identify_model("winnow-vit-tiny", device="cpu")
    other, _ = identify_model("winnow-vit-tiny", device="cpu")
    assert opened is not None and len({identity.sha256, fresh.sha256, other.sha256}) == 3


def test_the_hash_of_weights_follows_every_bit(checkpoint: str) -> None:
    opened = open_model(checkpoint)
    opened.model.to(torch.bfloat16)
    before = hash_weights(opened)
    with torch.no_grad():
        opened.model.logit_scale.add_(1)
    assert hash_weights(opened) != before != hash_weights(opened, code=b"x")
