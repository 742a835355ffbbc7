"""Items that go to every task and are opened one by one."""

import pickle
from typing import ClassVar

from pipeline.packed import Packed
from pipeline.pool import Part


def test_items_come_back_as_they_were() -> None:
    parts = [Part(f"{n:08d}", f"pool/{n:08d}.tar", None) for n in range(5)]
    packed: Packed[Part] = pickle.loads(pickle.dumps(Packed(parts)))
    assert len(packed) == 5
    assert list(packed) == parts == [packed[n] for n in range(5)]
    assert packed[1:3] == parts[1:3]
    assert packed[-1] == parts[-1]


class Loud:
    """What says when it is opened."""

    opened: ClassVar[list[int]] = []

    def __init__(self, number: int) -> None:
        self.number = number

    def __setstate__(self, state: dict[str, int]) -> None:
        self.opened.append(state["number"])


def test_only_what_is_asked_for_is_opened() -> None:
    packed = pickle.loads(pickle.dumps(Packed([Loud(n) for n in range(4)])))
    assert Loud.opened == []
    packed[2]
    assert Loud.opened == [2]
