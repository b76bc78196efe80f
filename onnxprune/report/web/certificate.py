"""The certificate in words: what each part bounds, for whom, how surely, and what it does not say."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from onnxprune.report import sentences
from onnxprune.report.web.facts import Facts
from onnxprune.report.web.html import Html, tag

TITLES = {
    "population": "Population: what to expect of new inputs",
    "calibration": "Calibration: the layers, on the samples that were used",
    "network": "Network: the outputs, on a few samples",
    "sampling": "Sampling: the theorem behind the random choice",
}
SILENCE = {
    "population": "It does not speak of another source: new cameras, seasons or attacks; nor, if the samples are those that "
    "the network was trained on, of those that it will meet; nor of which inputs change. Who makes several networks and keeps "
    "the best by these numbers has used the samples up, unless the numbers were made for all of them at once (`sweep`).",
    "calibration": "It does not speak of other inputs, nor of the network's outputs. A bound of 1 or more "
    "allows a sum to vanish.",
    "network": "It does not speak of other inputs. Errors never cancel in it, so that on deep networks the bound is far larger "
    "than what is measured; then it says nothing.",
    "sampling": "It does not speak of the network's output, as later layers read what earlier ones changed; nor of weights "
    "that were changed after the cut; nor of channels that were selected without a draw; and nothing at all where epsilon is 1 "
    "or more.",
}


def certificate(facts: Facts) -> Html:
    """All four parts, the one for whoever deploys the file first."""
    told, title = facts.certificate, tag("h2", "What is guaranteed")
    if told is None:
        return tag("section", title, tag("p", "There is no certificate, so nothing is guaranteed."))
    if not told["plan"]:
        return tag("section", title, tag("p", "Nothing was cut: the outputs are the original's."))
    intro = tag(
        "p",
        "The certificate has four parts, each with its own reach. Who deploys the file reads the first; the others explain "
        "where the error comes from. ",
        tag("code", "onnxprune verify"),
        " checks all of them again, from the two files and the data.",
        class_="caption",
    )
    return tag("section", title, intro, *(_part(name, told[name]) for name in TITLES))


def _part(name: str, part: Mapping[str, Any]) -> Html:
    state = "says nothing here" if not part["applies"] else "true, but says nothing" if part["vacuous"] else "holds"
    title = tag("h3", TITLES[name], tag("span", f", {state}", class_="state"))
    said = list(sentences.PARTS[name](part)) if part["applies"] else []
    several = part.get("candidates", 1)
    if said and name == "population" and several > 1:
        said.append(f"these statements hold for {several} networks at once, so that any of them may be kept")
    above = [_sentence(line) for line in said if line.endswith(":")] if said else [f"Because {part['reason']}."]
    lines = [tag("li", _sentence(line)) for line in said if not line.endswith(":")]
    rows = (("bounds", part["bounds"]), ("for", part["for"]), ("assumes", part["assumes"]), ("does not say", SILENCE[name]))
    words = [cell for term, meaning in rows for cell in (tag("dt", term), tag("dd", meaning))]
    shown = (*(tag("p", line) for line in above), tag("ul", *lines) if lines else None)
    return tag("div", title, *shown, tag("details", tag("summary", "What this means"), tag("dl", *words)))


def _sentence(line: str) -> str:
    return line[0].upper() + line[1:]
