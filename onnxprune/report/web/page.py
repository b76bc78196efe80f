"""The page, from top to bottom: the verdict first, then what stands behind it, last how it was made."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import onnxprune
from onnxprune.report.web.bench import bench
from onnxprune.report.web.certificate import certificate
from onnxprune.report.web.facts import Facts
from onnxprune.report.web.html import Html, document, tag
from onnxprune.report.web.making import making, recovery, typed
from onnxprune.report.web.network import frozen, network, scores
from onnxprune.report.web.sweep import sweep
from onnxprune.report.web.verdict import headline, numbers, top


def page(facts: Facts) -> str:
    """The page of one pruning. The same facts give the same page, to the byte."""
    return document(
        f"{facts.pruned.name}: {headline(facts)}",
        top(facts),
        numbers(facts),
        network(facts),
        scores(facts),
        None if facts.sweep is None else sweep(facts.sweep, facts.digest),
        None if facts.bench is None else bench(facts.bench),
        certificate(facts),
        frozen(facts),
        recovery(facts),
        making(facts),
        _footer(),
    )


def sweep_page(told: Mapping[str, Any]) -> str:
    """The page of a sweep."""
    many = len(told["points"])
    head = tag("header", tag("p", told["model"], class_="files"), tag("h1", f"{many} networks from one calibration"))
    how = tag("section", tag("h2", "How they were made"), tag("pre", typed(told["command"])))
    return document(f"{told['model']}: {many} networks", head, sweep(told), how, _footer())


def _footer() -> Html:
    return tag("footer", f"Made by onnxprune {onnxprune.__version__}. This page fetches nothing and runs no script.")
