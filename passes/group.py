"""Pass `group`: which channels live and die together, and along which axes they are followed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Literal

from onnxprune.analysis import UNSTEADY, Analysis, Setting
from onnxprune.channels import Frozen
from onnxprune.graph import Network
from onnxprune.groups import Groups
from onnxprune.rules import STANDARD, RuleTable, Way
from onnxprune.symbolic import Symbols

FALL_TOGETHER = "its channels fall together otherwise when the open sizes of the inputs change"
Attention = Literal["heads", "dims"]
FIRST: dict[Attention | None, Way] = {None: "most", "heads": "heads", "dims": "places"}
SECOND: dict[Way, Way] = {"most": "next", "heads": "places", "places": "heads"}
THIRD: tuple[Way, ...] = ("heads", "outer", "places")


def group(
    net: Network, rules: RuleTable = STANDARD, *, approximate: bool = False, attention: Attention | None = None
) -> Groups:
    """Channel groups of a network; whatever no rule explains is frozen, with the reason.

    Linear in the size of the graph. The rules run in topological order, so that each knows which axes channels reach. Where
    a node could follow the channels along one of several axes, and the first choice ends frozen, others are tried.
    Where the model leaves sizes open, only what a run on other sizes bears out can be pruned.
    approximate: cut also where what remains then comes out differently (layer normalisation); such groups have a flaw.
    attention: whether whole heads or the same places of every head go, where both can; None for what leaves more channels,
    of those that can be cut exactly.
    """
    symbols = Symbols(net)
    chosen = approximate and attention is not None
    best, groups = _best(net, rules, symbols, Setting(chosen, FIRST[attention]))
    if approximate and not chosen:  # along the axes that are right for exact cuts
        best = Analysis(net, rules, symbols, replace(best.setting, approximate=True))
        groups = best.run()
    if net.again is None:
        return groups
    second = replace(net.again, again=net)
    elsewhere = Analysis(second, rules, Symbols(second), best.setting)
    elsewhere.run()
    constants = [d for d in best.components.dims if d.tensor in net.initializers]
    fewer = best.components.freeze_like(elsewhere.components, constants, Frozen(FALL_TOGETHER, UNSTEADY))
    return best.finish(best.components) if fewer else groups


def _best(net: Network, rules: RuleTable, symbols: Symbols, setting: Setting) -> tuple[Analysis, Groups]:
    """The analysis that leaves most to prune."""
    best = Analysis(net, rules, symbols, setting)
    groups = best.run()
    for other, found in _others(best):
        if _reach(found) > _reach(groups):
            best, groups = other, found
        if not best.stuck():
            break
    return best, groups


def _others(first: Analysis) -> Iterator[tuple[Analysis, Groups]]:
    """Where the first choice ends frozen: the second one there; then whole heads, or places in them, everywhere or all around
    there alone.
    """
    setting, stuck = first.setting, set(first.stuck())
    if stuck:
        yield _analysed(first, replace(setting, ways=dict.fromkeys(sorted(stuck), SECOND[setting.way])))
    for way in THIRD if stuck else ():
        if way == setting.way or (way == "outer" and first.widest < 3):
            continue
        every, found = _analysed(first, replace(setting, way=way))
        yield every, found
        around = every.beside(stuck)
        if stuck - set(every.stuck()) and set(every.forks) - around:
            yield _analysed(first, replace(setting, ways=dict.fromkeys(sorted(around), way)))


def _analysed(like: Analysis, setting: Setting) -> tuple[Analysis, Groups]:
    analysis = Analysis(like.net, like.rules, like.symbols, setting)
    return analysis, analysis.run()


def _reach(groups: Groups) -> int:
    """How many layer axes, weighted by their channels, lie in groups that can be pruned."""
    axes = [d for layer in groups.layers for d in (layer.x, layer.out)]
    return sum(len(slot.positions) for d in axes for g, slot in groups.at.get(d, []) if not g.frozen)
