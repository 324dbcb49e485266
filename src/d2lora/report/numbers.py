"""Numbers of a report as text."""

CI = "95 % CI over items and seeds"


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
