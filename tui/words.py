"""Figures as the screens say them, with their units."""

from __future__ import annotations

MISSING = "–"
SCALES = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))


def size(count: float | None) -> str:
    """Bytes in binary units, as budgets are given: ``144 MiB``, ``4.00 GiB``."""
    if count is None:
        return MISSING
    for scale, unit in SCALES:
        if count >= scale:
            return f"{significant(count / scale)} {unit}"
    return f"{count:.0f} B"


def count(number: float) -> str:
    """``134 million``, ``6.74 billion``; a huge one as a power of ten."""
    for scale, unit in ((1e9, "billion"), (1e6, "million")):
        if scale <= number < 1000 * scale:
            return f"{significant(number / scale)} {unit}"
    return f"{number:,.0f}" if number < 1e6 else power(number)


def power(number: float) -> str:
    """A huge count: ``1.3·10¹⁰``."""
    mantissa, exponent = f"{number:.1e}".split("e")
    return f"{mantissa}·10{str(int(exponent)).translate(str.maketrans('0123456789-', '⁰¹²³⁴⁵⁶⁷⁸⁹⁻'))}"


def significant(value: float) -> str:
    """Three significant figures without an exponent."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    if abs(value) >= 10:
        return f"{value:.1f}"
    return f"{value:.2f}" if abs(value) >= 1 or not value else f"{value:.3g}"


def percent(share: float | None) -> str:
    return MISSING if share is None else f"{100 * share:.1f}%"


def interval(low: float | None, high: float | None) -> str:
    """``58.1–64.3%``; empty where none is known."""
    return "" if low is None or high is None else f"{100 * low:.1f}–{100 * high:.1f}%"


def milliseconds(value: float | None) -> str:
    return MISSING if value is None else f"{significant(value)} ms"


def rate(value: float | None) -> str:
    return MISSING if value is None else f"{significant(value)} tok/s"


def duration(seconds: float | None) -> str:
    """``42 s``, ``7 min``, ``3 h 10 min``, ``2 d 4 h``."""
    if seconds is None:
        return MISSING
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min" if minutes else f"{hours} h"
    days, hours = divmod(hours, 24)
    return f"{days} d {hours} h" if hours else f"{days} d"
