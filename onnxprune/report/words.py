"""How numbers and names are written for people, in the terminal and on the page."""

from __future__ import annotations

import re

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


HARMFUL = re.compile("[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: str) -> str:
    r"""The text without the characters that a terminal or a line-wise reader acts on; they show as \xNN or \uNNNN.

    Names in model files can hold any of them: control codes, line separators, what reorders text, halves of characters.
    """
    return HARMFUL.sub(lambda found: repr(found[0])[1:-1], text)
