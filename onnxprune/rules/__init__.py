"""Operator rules: one small function per operator family, collected in tables that add up."""

from onnxprune.rules import contrib, conv, einsum, elementwise, linear, movement, norm, quantized, recurrent, reshape
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
    **table(conv.RULES, linear.RULES, einsum.RULES, recurrent.RULES, quantized.RULES),
    **table(elementwise.RULES, norm.RULES, movement.RULES, reshape.RULES),
    **table(contrib.RULES, einsum.CONTRIB, domain="com.microsoft"),
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
