"""What tests share: the real data beside the repository, a toy pool, one Spark session."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from toy import COLORS, render, toy_row, write_part

REAL = Path(__file__).parent.parent.parent / "shared" / "data"


@pytest.fixture
def real_data() -> Path:
    """The real pools and test sets beside the repository, or a skip."""
    if not (REAL / "pools").is_dir():
        pytest.skip("no real data beside the repository")
    return REAL


@pytest.fixture
def make_pool(tmp_path: Path) -> Callable[..., Path]:
    """make_pool(num_rows=32, parts=2): a healthy toy pool."""

    def make(num_rows: int = 32, parts: int = 2, name: str = "pool") -> Path:
        folder = tmp_path / name
        for part, numbers in enumerate(np.array_split(np.arange(num_rows), parts)):
            rows = [toy_row(int(n)) for n in numbers]
            images = {
                row["key"]: render(list(COLORS)[int(n) % 4], int(n)) for row, n in zip(rows, numbers, strict=True)
            }
            write_part(folder, f"{part:08d}", rows, images)
        return folder

    return make


@pytest.fixture(scope="session")
def spark() -> Iterator[Any]:
    """One local session for all tests."""
    from pipeline.spark_session import open_session

    with open_session("local[2]", name="winnow tests") as session:
        yield session
