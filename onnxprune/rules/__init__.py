"""Operator rules: one small function per operator family, collected in tables that add up."""

from onnxprune.rules import conv, elementwise, linear, movement, norm, reshape
from onnxprune.rules.base import (
    Consumer,
    Edit,
    Fact,
    Layer,
    MustEqual,
    Reads,
    Resize,
    Rule,
    RuleTable,
    SetAttr,
    SetConst,
    SetInput,
    View,
    table,
)

STANDARD: RuleTable = table(conv.RULES, linear.RULES, elementwise.RULES, norm.RULES, movement.RULES, reshape.RULES)

__all__ = [
    "STANDARD",
    "Consumer",
    "Edit",
    "Fact",
    "Layer",
    "MustEqual",
    "Reads",
    "Resize",
    "Rule",
    "RuleTable",
    "SetAttr",
    "SetConst",
    "SetInput",
    "View",
    "table",
]
