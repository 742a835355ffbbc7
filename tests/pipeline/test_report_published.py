from typing import Any

from pipeline.report.published import PUBLISHED, list_published


def make_facts(num_tasks: int, *, retrieval: float | None = 0.25) -> dict[str, Any]:
    """Return the means of an evaluation's manifest."""
    values = {"imagenet": 0.5, "imagenet_shift": 0.4, "vtab": 0.3, "retrieval": retrieval}
    groups = {group: {"name": group, "value": value} for group, value in values.items()}
    return {"groups": groups, "average": {"value": 0.345, "num_tasks": num_tasks}, "tasks": {}}


def test_models_with_all_tasks_stand_over_the_published_ones() -> None:
    (table,) = list_published({"ours": make_facts(38), "part": make_facts(37), "odd": make_facts(38, retrieval=None)})
    texts = [[cell if isinstance(cell, str) else cell.text for cell in row] for row in table.rows]
    assert texts[0] == ["this run", "ours", "50.0", "40.0", "30.0", "25.0", "34.5"]
    assert texts[1][1] == "odd" and texts[1][5] == "–"
    assert texts[2] == ["small, ViT-B/32", "no filter", "2.7", "3.7", "15.8", "11.7", "14.2"]
    assert ["", "image and CLIP score", "29.7", "23.9", "34.6", "23.1", "32.8"] in texts
    assert len(texts) == 2 + sum(len(filters) for filters in PUBLISHED.values())
    assert [texts[start][0] for start in table.starts] == list(PUBLISHED)
    assert {len(row) for row in texts} == {len(table.columns)}


def test_a_partial_average_is_not_compared() -> None:
    assert list_published({"part": make_facts(37)}) == []


def test_a_model_of_incomplete_sets_is_marked() -> None:
    facts = make_facts(38) | {"tasks": {"mnist": {"counted": True, "incomplete": True}}}
    (table,) = list_published({"ours": facts, "whole": make_facts(38)})
    assert [getattr(row[1], "note", "") for row in table.rows[:2]] == ["†", ""]
    assert table.notes[-1].startswith("† Not every image")
    assert len(list_published({"whole": make_facts(38)})[0].notes) == 1
