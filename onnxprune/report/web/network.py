"""The network as a picture, layer by layer in topological order; the spread of scores; what was left alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from onnxprune.report.web.facts import Facts, LayerFacts
from onnxprune.report.web.html import Html, tag
from onnxprune.report.web.pictures import bar, skyline, strip
from onnxprune.report.web.verdict import legend
from onnxprune.report.words import number, percent

OPEN = 40  # rows of a table that is shown at once; longer ones are folded
DECADES = 5  # that an axis of scores shows at most
MEANING = {
    "pfp": "the largest share that the channel has in any output of a layer that reads it, 0 to 1 (empirical sensitivity)",
    "obs": "what the layers that read the channel lose if it goes and their other weights adapt (optimal brain surgery)",
    "l1": "the sum of the absolute weights that make the channel",
    "l2": "the norm of the weights that make the channel",
    "fpgm": "how far the channel's filter lies from the geometric median of its layer's filters",
    "activation": "how strongly the channel is active on the calibration samples",
    "random": "nothing: the order was drawn",
}


def network(facts: Facts) -> Html:
    """Widths and work of every layer, before and after."""
    layers = facts.layers
    titles = [f"{x.name} ({x.op}): {_change(x.makes)} channels, {_work(x)} MACs" for x in layers]
    widest = max((x.makes[0] for x in layers), default=0)
    hardest = max((x.macs[0] for x in layers), default=0)
    figures = (
        _figure("Channels that each layer makes", [_pair(x.makes) for x in layers], titles, f"highest: {widest:,} channels"),
        _figure(
            "Multiply-accumulates of each layer", [_pair(x.macs) for x in layers], titles, f"highest: {number(hardest)} MACs"
        ),
    )
    return tag(
        "section",
        tag("h2", "The network"),
        tag(
            "p", f"{len(layers)} layers with weights, from the input on the left to the output on the right.", class_="caption"
        ),
        legend(),
        *figures,
        _folded(_layers(layers), len(layers), f"All {len(layers)} layers"),
    )


def _figure(title: str, pairs: Sequence[tuple[float, float]], titles: Sequence[str], scale: str) -> Html:
    caption = tag("figcaption", tag("span", title), tag("span", scale, class_="scale"))
    return tag("figure", caption, skyline(pairs, titles, title))


def _layers(layers: Sequence[LayerFacts]) -> Html:
    most = max((x.macs[0] for x in layers), default=0)
    heads = ("layer", None), ("reads", "n"), ("makes", "n"), ("MACs", "n"), ("kept", "n"), ("", "wide")
    head = tag("tr", *(tag("th", h, class_=c, scope="col") for h, c in heads))
    rows = [
        tag(
            "tr",
            tag("th", x.name, " ", tag("small", x.op), scope="row", class_="name"),
            tag("td", _change(x.reads), class_="n", data_label="reads"),
            tag("td", _change(x.makes), class_="n", data_label="makes"),
            tag("td", _work(x), class_="n", data_label="MACs"),
            tag("td", "-" if x.macs[1] is None else percent(x.macs[1], x.macs[0]), class_="n", data_label="kept"),
            tag("td", bar(_pair(x.macs), most, f"MACs: {_work(x)}"), class_="wide"),
        )
        for x in layers
    ]
    return tag("table", tag("thead", head), tag("tbody", *rows), class_="layers")


def _pair(pair: tuple[int, int | None]) -> tuple[float, float]:
    return float(pair[0]), float(pair[1] or 0)


def _change(pair: tuple[int, int | None]) -> str:
    before, after = pair
    if after is None:
        return f"{before} → gone"
    return str(before) if before == after else f"{before} → {after}"


def _work(layer: LayerFacts) -> str:
    before, after = layer.macs
    if after is None or before == after:
        return number(before)
    return f"{number(before)} → {number(after)}"


def scores(facts: Facts) -> Html | None:
    """How the scores of every group spread: of the channels that stay and of those that went."""
    found = {k: v for k, v in facts.scores.items() if v.get("removed") or v.get("kept")}
    if not found:
        return None
    low, high = _axis(found.values())
    rows = [
        tag(
            "tr",
            tag("th", name, scope="row", class_="name"),
            tag("td", f"{v['size']} → {v['left']}" if v["left"] != v["size"] else str(v["size"]), class_="n"),
            tag("td", strip((("after", v["kept"]), ("gone", v["removed"])), low, high, f"scores of {name}"), class_="wide"),
        )
        for name, v in found.items()
    ]
    axis = tag("th", tag("span", f"{low:.1g}"), tag("span", f"{high:.3g}"), class_="wide axis", scope="col")
    head = tag("tr", tag("th", "group", scope="col"), tag("th", "channels", class_="n", scope="col"), axis)
    table = tag("table", tag("thead", head), tag("tbody", *rows), class_="scores")
    meaning = MEANING.get(facts.criterion or "", "the higher, the more the channel matters")
    keys = [tag("span", tag("i", class_=f"key {c}"), n, class_="legend") for c, n in (("after", "kept"), ("gone", "removed"))]
    return tag(
        "section",
        tag("h2", "Sensitivity"),
        tag(
            "p",
            f"The score of a channel is {meaning}. For each group: the range of its channels' scores as a line, the middle "
            "half as a box, the median as a mark, on one logarithmic scale for all; what lies below its left end stands there.",
            class_="caption",
        ),
        tag("p", *keys, class_="caption"),
        _folded(table, len(rows), f"All {len(rows)} groups"),
    )


def _axis(found: Any) -> tuple[float, float]:
    values = [x for v in found for part in ("kept", "removed") for x in v[part] or () if x > 0]
    high = max(values, default=1.0)
    return max(min(values, default=high / 10), high / 10**DECADES), high


def frozen(facts: Facts) -> Html:
    """Which groups stay whole, and why, by reason."""
    reasons: dict[tuple[str, str], list[tuple[str, int]]] = {}
    for group, size, reason, remedy in facts.frozen:
        reasons.setdefault((reason, remedy), []).append((group, size))
    title = tag("h2", "What was left alone")
    if not reasons:
        return tag("section", title, tag("p", "Every group of channels could be pruned."))
    head = tag("tr", *(tag("th", h, class_=c, scope="col") for h, c in (("why", None), ("channels", "n"), ("groups", None))))
    rows = [
        tag(
            "tr",
            tag("td", reason, *((tag("small", f" To unfreeze: {remedy}"),) if remedy else ())),
            tag("td", f"{sum(n for _, n in members):,}", class_="n"),
            tag("td", _some([g for g, _ in members]), class_="name"),
        )
        for (reason, remedy), members in reasons.items()
    ]
    text = "Groups of channels that must stay as they are. What the analysis does not understand it leaves alone."
    table = tag("table", tag("thead", head), tag("tbody", *rows), class_="frozen")
    return tag("section", title, tag("p", text, class_="caption"), _folded(table, len(rows), f"All {len(rows)} reasons"))


def _some(names: Sequence[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _folded(table: Html, rows: int, title: str) -> Html:
    if rows <= OPEN:
        return table
    return tag("details", tag("summary", title), table)


def spread(report: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """For every group with scores their quantiles, as the report has them."""
    return {
        g["id"]: {**g["scores"], "size": g["size"], "left": len(g["kept"])} for g in report.get("groups", ()) if g.get("scores")
    }
