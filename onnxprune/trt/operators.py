"""What TensorRT's ONNX parser takes, as a table with its sources. What is not in it is unknown, never guessed.

Facts from public text, read on 2026-11-23, none of them tried here:

- github.com/onnx/onnx-tensorrt, docs/operators.md, the text that says TensorRT 10.15: operators, types, restrictions.
- Release notes of github.com/NVIDIA/TensorRT up to 11.5 ("Parsers"): what came after; see `SINCE`.
- docs.nvidia.com, "ONNX Opset Guide" of 11.x: operator sets 9 to 25 (10.15: to 24).
- docs.nvidia.com, "Migrating from TensorRT 10.x to 11.x": since 11.0 every network is strongly typed.
"""

from __future__ import annotations

from dataclasses import dataclass

SOURCE = "onnx-tensorrt docs/operators.md for TensorRT 10.15, and release notes up to 11.5"
OLDEST_OPSET = 9
NEWEST_OPSET = {10: 24, 11: 25}
DOMAINS = ("", "ai.onnx")

HALF = ("float32", "float16")
FLOATS = (*HALF, "bfloat16")
NUMBERS = (*FLOATS, "int32", "int64")
ALL = (*NUMBERS, "bool")
# Of tensors that nodes compute on; int8, int4, float8 and float4 only between QuantizeLinear and DequantizeLinear.
TYPES = (*ALL, "double", "int8", "uint8", "int4", "float8e4m3fn", "float4e2m1")
QUANTISED = ("int8", "int4", "float8e4m3fn", "float4e2m1")

_ROWS: tuple[tuple[tuple[str, ...], str], ...] = (
    (HALF, "BlackmanWindow DeformConv GridSample HammingWindow HannWindow Mish NonMaxSuppression NonZero RoiAlign"),
    (("float32",), "STFT"),
    (("bool",), "And Not Or Xor"),
    (FLOATS, "Acos Acosh Asin Asinh Atan Atanh AveragePool BatchNormalization Ceil Celu Clip Conv ConvTranspose Cos Cosh"),
    (FLOATS, "CumSum Dropout Einsum Elu Erf Exp Floor Gemm GlobalAveragePool GlobalLpPool GlobalMaxPool GroupNormalization"),
    (FLOATS, "GRU HardSigmoid HardSwish Hardmax ImageScaler InstanceNormalization IsInf LayerNormalization LeakyRelu Log"),
    (FLOATS, "LogSoftmax LRN LSTM LpNormalization LpPool MatMul MaxPool MeanVarianceNormalization ParametricSoftplus PRelu"),
    (FLOATS, "QuantizeLinear RMSNormalization RNN RandomNormal RandomNormalLike RandomUniform RandomUniformLike Reciprocal"),
    (FLOATS, "Resize RotaryEmbedding Round ScaledTanh Scan Selu Sigmoid Sin Sinh Softmax Softplus Softsign Sqrt Swish"),
    (FLOATS, "Tan Tanh ThresholdedRelu Upsample DFT"),
    ((*FLOATS, "int32"), "TensorScatter"),
    ((*FLOATS, "int8", "float8e4m3fn"), "Attention"),
    ((*FLOATS, "int8", "int32", "int64"), "Gelu"),
    ((*FLOATS, "float8e4m3fn", "int32", "int64"), "Mean"),
    (NUMBERS, "Abs Add ArgMax ArgMin DepthToSpace Div Equal Greater GreaterOrEqual IsNaN Less LessOrEqual Max Min Mod Mul"),
    (NUMBERS, "Neg Pad Pow Range ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd"),
    (NUMBERS, "ReduceSum ReduceSumSquare Relu Scatter ScatterElements ScatterND Shrink Sign SpaceToDepth Sub Sum TopK"),
    (ALL, "Concat Expand EyeLike Flatten Gather GatherElements GatherND Identity If Loop OneHot Reshape ReverseSequence"),
    (ALL, "Shape Size Slice Split Squeeze Tile Transpose Trilu Unsqueeze Where"),
    ((*ALL, "uint8"), "Cast CastLike"),
    ((*ALL, "float8e4m3fn", "float4e2m1", "int4"), "Constant ConstantOfShape"),
    (QUANTISED, "DequantizeLinear"),
)
TAKEN = {name: types for types, names in _ROWS for name in names.split()}
SINCE = {"Swish": (11, 0), "DFT": (11, 2)}

_NOT_TAKEN = (
    "AffineGrid Bernoulli BitShift BitwiseAnd BitwiseNot BitwiseOr BitwiseXor Col2Im CenterCropPad Compress",
    "ConcatFromSequence ConvInteger Det DynamicQuantizeLinear ImageDecoder MatMulInteger MaxRoiPool MaxUnpool",
    "MelWeightMatrix Multinomial NegativeLogLikelihoodLoss Optional OptionalGetElement OptionalHasElement QLinearConv",
    "QLinearMatMul RegexFullMatch SequenceAt SequenceConstruct SequenceEmpty SequenceErase SequenceInsert",
    "SequenceLength SequenceMap SoftmaxCrossEntropyLoss SplitToSequence StringConcat StringNormalizer StringSplit",
    "TfIdfVectorizer Unique",
)
REFUSED = frozenset(name for names in _NOT_TAKEN for name in names.split())

SYMMETRIC = "quantise to QDQ pairs of int8, symmetric and with float biases; see docs/tensorrt.md"
_INTEGER = ("QLinearConv", "QLinearMatMul", "ConvInteger", "MatMulInteger", "DynamicQuantizeLinear")
HINTS = dict.fromkeys(_INTEGER, SYMMETRIC)


@dataclass(frozen=True)
class Verdict:
    """On one operator: "taken", "refused" or "unknown", why if not taken, and what helps."""

    status: str
    why: str = ""
    hint: str = ""


def verdict(domain: str, op_type: str, version: tuple[int, int]) -> Verdict:
    """What the table says of an operator for TensorRT `version` (major, minor)."""
    if domain == "com.microsoft":
        why = "is ONNX Runtime's own, and TensorRT has no such operator without a plugin"
        return Verdict(
            "refused", why, HINTS.get(op_type, "export without ONNX Runtime's optimiser, or name a plugin with --plugin")
        )
    if domain not in DOMAINS:
        return Verdict("unknown", f"is of the domain '{domain}', which the table does not cover", "it takes a plugin: --plugin")
    if op_type in REFUSED:
        return Verdict("refused", "is listed as not supported", HINTS.get(op_type, ""))
    if op_type not in TAKEN:
        return Verdict("unknown", "is not in the table")
    first = SINCE.get(op_type, (0, 0))
    if version < first:
        return Verdict("refused", f"came with TensorRT {first[0]}.{first[1]}")
    return Verdict("taken")
