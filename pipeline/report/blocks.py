"""What a page is made of: sections of tables, figures, picture strips and notes.  The template draws these and no more.

Text is plain text; the template escapes it.  Only `Panel.drawing` is markup, made by charts.py alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from markupsafe import Markup


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One cell of a table that is more than plain text."""

    text: str
    strong: bool = False
    code: bool = False
    """Set in the fixed-width face."""
    note: str = ""
    """Small print behind the text."""
    fraction: float | None = None
    """Drawn as a bar behind the text, in [0, 1]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Rows under a caption; the columns in `left` are flush left, the others flush right."""

    kind: ClassVar[str] = "table"
    caption: str
    source: str
    """Files of the run folder that the numbers come from."""
    columns: Sequence[str]
    rows: Sequence[Sequence[str | Cell]]
    left: Sequence[int] = (0,)
    starts: Sequence[int] = ()
    """Rows above which a line is drawn, because a group begins."""
    notes: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Panel:
    """One drawing of a figure, with an optional title."""

    title: str
    drawing: Markup


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """Drawings side by side over one caption."""

    kind: ClassVar[str] = "figure"
    caption: str
    source: str
    panels: Sequence[Panel]
    num_columns: int = 1
    legend: Sequence[tuple[str, str]] = ()
    """(colour, label) pairs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """One row of the pool, to look at."""

    uid: str
    caption: str | None
    uri: str | None
    """The thumbnail as a data: URI; None when there is none, and `problem` says why."""
    problem: str = ""
    score: str = ""
    truth: str = ""
    """Its kind in the truth file."""


@dataclass(frozen=True, slots=True)
class Strip:
    """Pictures in a row, with what they have in common."""

    label: str
    pictures: Sequence[Picture]


@dataclass(frozen=True, slots=True, kw_only=True)
class Gallery:
    """Strips of pictures over one caption, numbered as a figure."""

    kind: ClassVar[str] = "gallery"
    caption: str
    source: str
    strips: Sequence[Strip]


@dataclass(frozen=True, slots=True)
class Note:
    """A paragraph."""

    kind: ClassVar[str] = "note"
    text: str


@dataclass(frozen=True, slots=True)
class Absent:
    """Says that a piece of the run folder is not there."""

    kind: ClassVar[str] = "absent"
    text: str


@dataclass(frozen=True, slots=True)
class Fold:
    """Text that is folded away on a screen and printed in full."""

    kind: ClassVar[str] = "fold"
    summary: str
    text: str


Block = Table | Figure | Gallery | Note | Absent | Fold


@dataclass(frozen=True, slots=True)
class Section:
    """A numbered part of the page."""

    title: str
    blocks: Sequence[Block]
