"""Operator rules: one small function per operator family, collected in tables that add up."""

from onnxprune.rules import (
    contrib,
    contrib_quantized,
    conv,
    elementwise,
    linear,
    movement,
    norm,
    quantized,
    recurrent,
    reshape,
)
from onnxprune.rules.base import (
    OFFSET,
    Approximate,
    Consumer,
    Contracts,
    Edit,
    Fact,
    Fresh,
    Layer,
    MustEqual,
    Offset,
    Packed,
    Reads,
    Resize,
    Rounds,
    Rule,
    RuleTable,
    SetAttr,
    SetConst,
    SetInput,
    Steps,
    View,
    Ways,
    table,
)

STANDARD: RuleTable = {
    **table(
        conv.RULES, linear.RULES, recurrent.RULES, quantized.RULES, elementwise.RULES, norm.RULES, movement.RULES, reshape.RULES
    ),
    **table(contrib.RULES, contrib_quantized.RULES, domain="com.microsoft"),
}


__all__ = [
    "OFFSET",
    "STANDARD",
    "Approximate",
    "Consumer",
    "Contracts",
    "Edit",
    "Fact",
    "Fresh",
    "Layer",
    "MustEqual",
    "Offset",
    "Packed",
    "Reads",
    "Resize",
    "Rounds",
    "Rule",
    "RuleTable",
    "SetAttr",
    "SetConst",
    "SetInput",
    "Steps",
    "View",
    "Ways",
    "table",
]
