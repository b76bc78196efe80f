"""Plug-ins: criteria and operator rules of other packages, found by their entry points in the group `onnxprune.plugins`."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import entry_points

from onnxprune.criteria import Criterion
from onnxprune.criteria.plain import PLAIN
from onnxprune.rules import STANDARD, Rule

ENTRY_POINTS = "onnxprune.plugins"
RESERVED = {"auto", "obs", "pfp", "pfp-random", "pfp-deterministic"}


@dataclass(frozen=True)
class Plugin:
    """What an entry point names.

    criteria: makers of criteria by the names that `--method` gives them. rules: by (domain, operator), see `rules.base`.
    """

    criteria: Mapping[str, Callable[[], Criterion]] = field(default_factory=dict)
    rules: Mapping[tuple[str, str], Rule] = field(default_factory=dict)


def register(plugin: Plugin) -> None:
    """Adds criteria and rules to those there are; all of them or none. Raises ValueError for a name that is taken."""
    taken = [*(RESERVED | PLAIN.keys()) & plugin.criteria.keys(), *STANDARD.keys() & plugin.rules.keys()]
    if taken:
        raise ValueError(f"there is a {taken[0]} already")
    PLAIN.update(plugin.criteria)
    STANDARD.update(plugin.rules)


_loaded: list[bool] = []


def load_once() -> None:
    """`load_installed`, the first time; a plug-in may import from onnxprune while it is loaded."""
    if not _loaded:
        _loaded.append(True)
        load_installed()


def load_installed() -> None:
    """Registers the plug-ins of this environment in the order of their names; one that is unfit is left out with a warning."""
    for entry in sorted(entry_points(group=ENTRY_POINTS), key=lambda e: (e.name, e.value)):
        try:
            plugin = entry.load()
            if not isinstance(plugin, Plugin):
                raise TypeError(f"{entry.value} is not an onnxprune.plugins.Plugin")
            register(plugin)
        except Exception as error:  # whatever a stranger's module raises
            what = " ".join(f"{type(error).__name__}: {error}".split())
            warnings.warn(f"onnxprune leaves out the plug-in '{entry.name}': {what}", stacklevel=2)
