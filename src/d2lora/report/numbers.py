"""Numbers of a report as text."""

import math

CI = "95 % CI over items and seeds"
NOT_KNOWN = "not known"


def signed(value: float, digits: int = 1) -> str:
    """Return a number with its sign, with a true minus, and never -0."""
    text = f"{value:+.{digits}f}"
    if float(text) == 0:
        return text[1:]
    return text.replace("-", "−")


def range_text(low: float, high: float) -> str:
    """Return an interval in points."""
    return f"{signed(100 * low)} to {signed(100 * high)}"


def p_text(p: float) -> str:
    """Return a p-value, a tiny one as a bound."""
    return "p < 0.0001" if p < 0.0001 else f"p = {p:.2g}"


def tflop(operations: float) -> str:
    """Return operations in TFLOP; NaN as not known."""
    return NOT_KNOWN if math.isnan(operations) else f"{operations / 1e12:.3g}"
