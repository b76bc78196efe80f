"""Markup that is escaped unless it was made here: elements as functions, so that no text of a file can become markup."""

from __future__ import annotations

import html
from importlib.resources import files
from typing import TypeAlias

from onnxprune.report.words import visible

# No script, no fetch: even if something were to slip through, a browser would neither run nor load it.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
VOID = {"meta", "link", "br", "rect", "line", "circle", "polyline", "path", "col"}
CLOSED = {"rect", "line", "circle", "polyline", "path"}  # of SVG: they may carry a title


class Html(str):
    """Markup, as opposed to text."""

    __slots__ = ()


Child: TypeAlias = "str | Html | None"


def text(value: str) -> Html:
    """Text as markup that shows just that; control characters become visible."""
    return value if isinstance(value, Html) else Html(html.escape(visible(value)))


def join(*children: Child) -> Html:
    """Children one after the other; None is nothing."""
    return Html("".join(text(c) for c in children if c is not None))


def tag(name: str, /, *children: Child, **attributes: str | float | None) -> Html:
    """An element. `class_` is written class, other underscores become hyphens; attributes that are None are left out."""
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(visible(_plain(value)))}"'
        for key, value in attributes.items()
        if value is not None
    )
    if name in VOID and not children:
        return Html(f"<{name}{given}/>" if name in CLOSED else f"<{name}{given}>")
    return Html(f"<{name}{given}>{join(*children)}</{name}>")


def _plain(value: str | float) -> str:
    return value if isinstance(value, str) else f"{value:.6g}"


def document(title: str, *body: Child) -> str:
    """A whole page."""
    style = files("onnxprune.report.web").joinpath("page.css").read_text(encoding="utf-8")
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", title),
        tag("link", rel="icon", href="data:,"),
        tag("style", Html(style)),
    )
    return "<!doctype html>\n" + tag("html", head, tag("body", tag("main", *body)), lang="en") + "\n"
