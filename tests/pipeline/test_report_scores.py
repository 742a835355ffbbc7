import re

import pytest

from pipeline.report.charts import Score, draw_scores

COLOURS = {"a": "c1", "b": "c2"}


@pytest.mark.parametrize("num_tasks", [1, 40])
def test_an_interval_is_a_line_around_the_end_of_its_bar_or_its_dot(num_tasks: int) -> None:
    row = Score("task", {"a": 0.5, "b": 0.25}, 0.1, {"a": (0.4, 0.7)})
    svg = str(draw_scores([row] * num_tasks, COLOURS))
    lines = re.findall(r'<line class="whisker" x1="([\d.]+)" y1="([\d.]+)" x2="([\d.]+)"', svg)
    assert len(lines) == num_tasks
    low, y, high = map(float, lines[0])
    if num_tasks == 1:
        (x, top, width, height), _ = (map(float, found) for found in _find_bars(svg))
        end, middle = x + width, top + height / 2
        assert (end - low) / (high - end) == pytest.approx(0.1 / 0.2, abs=0.01)
    else:
        end, middle = map(float, re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)"', svg)[0])
        assert low < end < high
        _, ys = zip(*re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)"', svg), strict=True)
        assert len(set(ys)) == 2 * num_tasks  # each on a line of its own
    assert y == pytest.approx(middle, abs=0.1)


def _find_bars(svg: str) -> list[tuple[str, ...]]:
    return re.findall(r'<rect x="([\d.]+)" y="([\d.]+)" width="([\d.]+)" height="([\d.]+)"', svg)


def test_the_axis_reaches_the_highest_interval() -> None:
    svg = str(draw_scores([Score("task", {"a": 0.1}, None, {"a": (0.05, 0.75)})], COLOURS))
    assert "80" in svg and "100" not in re.findall(r">(\d+)", svg)
