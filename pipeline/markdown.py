"""Tables in Markdown that read well as plain text too, and numbers in them."""

from collections.abc import Sequence

NOTHING = "-"


def write_table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 1) -> str:
    """Return a table with padded cells: the first `left` columns flush left, the others flush right."""
    escaped = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in (columns, *rows)]
    widths = [max(3, *map(len, column)) for column in zip(*escaped, strict=True)]

    def join_cells(cells: Sequence[str]) -> str:
        padded = [c.ljust(w) if n < left else c.rjust(w) for n, (c, w) in enumerate(zip(cells, widths, strict=True))]
        return f"| {' | '.join(padded)} |"

    rule = ["-" * width if n < left else "-" * (width - 1) + ":" for n, width in enumerate(widths)]
    return "\n".join(map(join_cells, [escaped[0], rule, *escaped[1:]]))


def percent(share: float | None, digits: int = 1) -> str:
    """Return a share in per cent without the sign, or a dash."""
    return NOTHING if share is None else f"{100 * share:.{digits}f}"


def short_percent(share: float) -> str:
    """Return a chosen share in per cent without the sign, with no more digits than it has: 15, 0.5, 99.9."""
    return f"{100 * share:.10g}"


def decimal(value: float | None, digits: int = 3) -> str:
    """Return a number with so many digits after the point, or a dash."""
    return NOTHING if value is None else f"{value:.{digits}f}"


def exact(value: float | None) -> str:
    """Return the shortest text that reads back as the same number, or a dash."""
    return NOTHING if value is None else repr(value)
