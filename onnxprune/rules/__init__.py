"""Operator rules: one small function per operator family, collected in tables that add up."""

from collections.abc import Mapping

from onnxprune.control import FLAT
from onnxprune.rules import (
    attention,
    classical,
    contrib,
    contrib_attention,
    contrib_quantized,
    control,
    conv,
    deform,
    einsum,
    elementwise,
    indexing,
    interpolate,
    linear,
    movement,
    norm,
    quantized,
    recurrent,
    reshape,
    sequences,
    spatial,
)
from onnxprune.rules.base import (
    OFFSET,
    Approximate,
    Consumer,
    Contracts,
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
    Steps,
    View,
    Way,
    Ways,
    table,
)
from onnxprune.rules.edits import Become, Edit, SetAttr, SetConst, SetEntries, SetInput

MICROSOFT = "com.microsoft"
CLASSICAL = "ai.onnx.ml"
FAMILIES: Mapping[str, RuleTable] = {
    "linear layer": {
        **table(
            conv.RULES,
            deform.RULES,
            linear.RULES,
            einsum.RULES,
            recurrent.RULES,
            quantized.LINEAR,
            {"CausalConvWithState": contrib.CAUSAL_CONV},
        ),
        **table(contrib.LINEAR, contrib_quantized.LINEAR, einsum.CONTRIB, domain=MICROSOFT),
    },
    "attention": {
        **table(attention.RULES, {"LinearAttention": contrib_attention.LINEAR}),
        **table(contrib_attention.RULES, domain=MICROSOFT),
    },
    "element by element": {
        **table(elementwise.RULES, quantized.ELEMENTWISE),
        **table(contrib.ELEMENTWISE, contrib_quantized.ELEMENTWISE, domain=MICROSOFT),
        **table(classical.ELEMENTWISE, domain=CLASSICAL),
    },
    "normalisation, pooling or reduction": {
        **table(norm.RULES, contrib.UNOFFICIAL),
        **table(contrib.NORM, contrib_quantized.NORM, domain=MICROSOFT),
        **table(classical.NORM, domain=CLASSICAL),
    },
    "sampling or transform of space": {**table(spatial.RULES, interpolate.RULES), **table(spatial.CONTRIB, domain=MICROSOFT)},
    "data movement": {
        **table(movement.RULES, indexing.RULES, reshape.RULES, sequences.RULES),
        **table(contrib.MOVEMENT, contrib_quantized.MOVEMENT, indexing.CONTRIB, domain=MICROSOFT),
        **table(classical.MOVEMENT, domain=CLASSICAL),
    },
    "control flow": table(control.RULES, domain=FLAT),
}
"""All rules, by what their operators do."""

STANDARD: dict[tuple[str, str], Rule] = {key: rule for family in FAMILIES.values() for key, rule in family.items()}


__all__ = [
    "FAMILIES",
    "OFFSET",
    "STANDARD",
    "Approximate",
    "Become",
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
    "SetEntries",
    "SetInput",
    "Steps",
    "View",
    "Way",
    "Ways",
    "table",
]
