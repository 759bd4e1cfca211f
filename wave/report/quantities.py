"""Numbers as people read them: times with their unit, rates in thousands, shares in percent; a dash for what is not known."""

from __future__ import annotations

import math
from typing import Any

NONE = "–"


def number(value: Any) -> float | None:
    """The value as a finite float, or None for anything that is not one (absent, null, not a number)."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def show_time(us: float | None) -> str:
    """Microseconds as "850 ns", "12.3 µs", "1.04 ms", "2.50 s": three digits and the unit that suits."""
    if us is None:
        return NONE
    for limit, unit, scale in ((0.9995, "ns", 1e3), (999.5, "µs", 1.0), (999_500.0, "ms", 1e-3)):
        if abs(us) < limit:
            return f"{_digits(us * scale)} {unit}"
    return f"{_digits(us * 1e-6)} s"


def show_rate(per_s: float | None) -> str:
    """Requests per second in thousands: "412 k/s"; small ones as they are."""
    if per_s is None:
        return NONE
    return f"{_digits(per_s)} /s" if abs(per_s) < 1_000 else f"{_thousands(per_s)} k/s"


def show_rate_interval(low: float | None, high: float | None) -> str:
    """An interval of rates in thousands per second, "405–418", or nothing."""
    if low is None or high is None:
        return ""
    return f"{_thousands(low)}–{_thousands(high)}" if high >= 1_000 else f"{_digits(low)}–{_digits(high)}"


def show_share(share: float | None, *, sign: bool = False) -> str:
    """A share of 1 in percent: "3.2 %"; with `sign`, "+3.2 %"."""
    if share is None:
        return NONE
    percent = 100 * share
    places = 1 if abs(percent) >= 0.95 or percent == 0 else 2
    return f"{percent:{'+' if sign and round(percent, places) else ''}.{places}f} %".replace("-", "−")


def show_share_interval(ends: tuple[float, float]) -> str:
    """An interval of shares in percent: "1.1 to 5.8"."""
    return f"{100 * ends[0]:+.1f} to {100 * ends[1]:+.1f}".replace("-", "−")


def show_count(value: float | None, places: int = 2) -> str:
    """A plain number with so many places."""
    return NONE if value is None else f"{value:.{places}f}"


def _digits(value: float) -> str:
    """Three significant digits, never in exponential form."""
    if value == 0:
        return "0"
    places = max(0, 2 - math.floor(math.log10(abs(float(f"{value:.3g}")))))
    return f"{value:.{places}f}"


def _thousands(per_s: float) -> str:
    """Thousands with enough digits to see one percent of difference."""
    thousands = per_s / 1_000
    return f"{thousands:,.0f}" if abs(thousands) >= 1_000 else f"{thousands:.1f}" if abs(thousands) >= 10 else f"{thousands:.2f}"
