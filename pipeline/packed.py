"""A long sequence for every Spark task, of which each reads a few items: these alone are unpickled, when asked for."""

import pickle
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar, overload

Item = TypeVar("Item")


class Packed(Sequence[Item]):
    """Items, each pickled by itself: a task that gets 100,000 parts with its code opens only its own."""

    def __init__(self, items: Iterable[Item]) -> None:
        self._octets = [pickle.dumps(item) for item in items]

    def __len__(self) -> int:
        return len(self._octets)

    @overload
    def __getitem__(self, place: int) -> Item: ...
    @overload
    def __getitem__(self, place: slice) -> Sequence[Item]: ...
    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            return [pickle.loads(octets) for octets in self._octets[place]]
        return pickle.loads(self._octets[place])
