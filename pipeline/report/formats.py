"""Numbers -> text, in one way on the whole page: 31,519 rows, 40.0 %, +1.2 points, a dash for nothing."""

from collections.abc import Mapping

NOTHING = "–"
MINUS = "\N{MINUS SIGN}"
NARROW_SPACE = "\N{NARROW NO-BREAK SPACE}"
HASH_DIGITS = 12


def format_count(number: int | None) -> str:
    """Return a whole number with thousands separators."""
    return NOTHING if number is None else f"{number:,}".replace("-", MINUS)


def format_percent(fraction: float | None, *, unit: bool = True) -> str:
    """Return a share in [0, 1] as per cent with one digit; a share that is small but not zero says so."""
    if fraction is None:
        return NOTHING
    percent = 100 * fraction
    text = "<0.1" if 0 < percent < 0.05 else f"{percent:.1f}".replace("-", MINUS)
    return f"{text}{NARROW_SPACE}%" if unit else text


def format_points(difference: float) -> str:
    """Return a difference of two shares in percentage points, with its sign."""
    return f"{100 * difference:+.1f}".replace("-", MINUS)


def format_score(value: float | None) -> str:
    """Return a score with four significant digits."""
    if value is None:
        return NOTHING
    text = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return text.replace("-", MINUS)


def format_decimal(value: float | None, digits: int) -> str:
    """Return a number with thousands separators and so many digits after the point."""
    return NOTHING if value is None else f"{value:,.{digits}f}".replace("-", MINUS)


def format_hash(identity: str | None) -> str:
    """Return the first twelve digits of a hash."""
    return identity[:HASH_DIGITS] if identity else NOTHING


def format_tally(tally: Mapping[str, int]) -> str:
    """Return counts by reason as `reason 12, other 3`; a dash when there are none."""
    return ", ".join(f"{reason} {format_count(number)}" for reason, number in tally.items() if number) or NOTHING


def format_duration(seconds: float) -> str:
    """Return a time as seconds below two minutes, else as hours, minutes and seconds."""
    if seconds < 120:
        return f"{seconds:.1f}{NARROW_SPACE}s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    pieces = ([f"{hours:,}{NARROW_SPACE}h"] if hours else []) + [f"{minutes}{NARROW_SPACE}min"]
    return " ".join(pieces + ([f"{rest}{NARROW_SPACE}s"] if not hours else []))


def count_nouns(number: int, noun: str) -> str:
    """Return `1 row`, `2 rows`."""
    return f"{format_count(number)} {noun}{'' if number == 1 else 's'}"
