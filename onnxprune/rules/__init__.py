"""Operator rules: one small function per operator family, collected in tables that add up."""

from onnxprune.control import FLAT
from onnxprune.rules import contrib, control, conv, elementwise, linear, movement, norm, quantized, recurrent, reshape
from onnxprune.rules.base import (
    Approximate,
    Consumer,
    Contracts,
    Edit,
    Fact,
    Fresh,
    Layer,
    MustEqual,
    Reads,
    Resize,
    Rounds,
    Rule,
    RuleTable,
    SetAttr,
    SetConst,
    SetInput,
    View,
    Ways,
    table,
)

STANDARD: RuleTable = {
    **table(
        conv.RULES, linear.RULES, recurrent.RULES, quantized.RULES, elementwise.RULES, norm.RULES, movement.RULES, reshape.RULES
    ),
    **table(contrib.RULES, domain="com.microsoft"),
    **table(control.RULES, domain=FLAT),
}


__all__ = [
    "STANDARD",
    "Approximate",
    "Consumer",
    "Contracts",
    "Edit",
    "Fact",
    "Fresh",
    "Layer",
    "MustEqual",
    "Reads",
    "Resize",
    "Rounds",
    "Rule",
    "RuleTable",
    "SetAttr",
    "SetConst",
    "SetInput",
    "View",
    "Ways",
    "table",
]
