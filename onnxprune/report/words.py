"""How numbers and names are written for people, in the terminal and on the page."""

from __future__ import annotations

UNITS = (("G", 1e9), ("M", 1e6), ("k", 1e3))


def number(n: float) -> str:
    """1234567 -> 1.23 M."""
    for unit, size in UNITS:
        if abs(n) >= size:
            return f"{n / size:.3g} {unit}"
    return f"{n:g}"


def percent(part: float, whole: float) -> str:
    """Part of a whole; "-" of nothing."""
    return f"{100 * part / whole:.1f} %" if whole else "-"


HARMFUL = (range(32), range(127, 160), range(0x200E, 0x2010), range(0x2028, 0x202F), range(0x2066, 0x206A))


def visible(text: str) -> str:
    r"""The text without the characters that a terminal or a line-wise reader acts on; they show as \xNN or \uNNNN.

    These are control codes, line separators and what reorders text; names in model files can hold any of them.
    """
    return "".join(repr(c)[1:-1] if any(ord(c) in r for r in HARMFUL) else c for c in text)
