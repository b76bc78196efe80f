"""Operators at which channels stop, each with the reason: nothing that reaches one of them can be removed.

The reasons read after the node: "NonZero 'n' finds as many positions as the data have".
"""

from __future__ import annotations

from collections.abc import Mapping

MICROSOFT = "com.microsoft"

_REASONS: dict[str, dict[str, str]] = {
    "": {
        "finds as many positions as the data have": "NonMaxSuppression NonZero Unique",
        "draws numbers at random, and other ones for another shape": (
            "Bernoulli Multinomial RandomNormal RandomNormalLike RandomUniform RandomUniformLike"
        ),
        "makes values out of the numbers of positions": (
            "BlackmanWindow EyeLike HammingWindow HannWindow MelWeightMatrix Range"
        ),
        "picks a class by its number": "NegativeLogLikelihoodLoss SoftmaxCrossEntropyLoss",
        "works on a sequence of tensors that is not followed": "SequenceEmpty SequenceErase SequenceInsert SequenceLength",
        "makes a value optional, and what may be missing is not followed": "Optional OptionalGetElement OptionalHasElement",
        "works on text, which has no channels": "RegexFullMatch StringConcat StringNormalizer StringSplit TfIdfVectorizer",
        "reads a picture's file": "ImageDecoder",
        "runs a subgraph that is not followed": "If Loop Scan SequenceMap",
    },
    "ai.onnx.ml": {
        "keeps its weights in attributes": "LinearClassifier LinearRegressor SVMClassifier SVMRegressor",
        "asks for features by their numbers": "TreeEnsemble TreeEnsembleClassifier TreeEnsembleRegressor",
        "maps values to categories": "CategoryMapper LabelEncoder OneHotEncoder",
        "makes or reads a map": "CastMap DictVectorizer ZipMap",
    },
    "ai.onnx.preview": {"runs a subgraph that is not followed": "FlexAttention"},
    "ai.onnx.preview.training": {"trains: the weights are its data": "Adagrad Adam Gradient Momentum"},
    MICROSOFT: {
        "hashes its input, and the least rounding changes all of it": "MurmurHash3",
        "finds as many positions as the data have": "DynamicTimeWarping Unique",
        "makes values out of the numbers of positions": "Range RelativePositionBias GatedRelativePositionBias",
        "runs a subgraph that is not followed": "BeamSearch GreedySearch Sampling WhisperBeamSearch",
        "works on text or on its tokens, which have no channels": (
            "BifurcationDetector NGramHashMapping NGramRepeatBlock Tokenizer VarlenNGramHashMapping WordConvEmbedding"
        ),
        "attends inside a recurrence": "AttnLSTM",
        "decodes from a cache that is the model's own input": "DecoderMaskedMultiHeadAttention",
        "sends every token to experts of its own": "MoE QMoE",
        "packs its weights in blocks of bits": (
            "GatherBlockQuantized MatMulBnb4 MatMulBlockQuantizedFp4Weight MatMulBlockQuantizedFp8Weight MatMulFpQ4 "
            "MatMulNBitsMlp MatMulNBitsQkv"
        ),
        "takes the place of a whole graph": "EPContext Snpe",
        "mixes the streams of hyper-connections": "BranchwiseRMSNorm EngramGate HyperConnectionPostMix HyperConnectionPreMix",
        "attends along a pattern that goes by the numbers of heads": "SparseAttention",
        "attends to what an indexer picks by its values": (
            "DynamicSparseAttention PackedSparseAttentionIndexer SparseAttentionIndexer SparsePagedAttention"
        ),
        "takes a sparse matrix, which has no axes to cut": "SparseToDenseMatMul",
        "is internal to ONNX Runtime's optimiser": "ConvTransposeWithDynamicPads MaxpoolWithMask",
        "computes with integers that stand for fractions": (
            "DequantizeBFP DequantizeWithOrder MatMulInteger16 MulInteger QEmbedLayerNormalization QLinearReduceMean "
            "QOrderedAttention QOrderedGelu QOrderedLayerNormalization QOrderedLongformerAttention QOrderedMatMul "
            "QuantizeBFP QuantizeWithOrder ReduceSumInteger"
        ),
        "has no kernel for the CPU, on which cuts are checked": (
            "BiasAdd BiasDropout BiasSoftmax BiasSplitGelu BitmaskBiasDropout BitmaskDropout ComplexMul ComplexMulConj "
            "DecoderAttention DecoderMaskedSelfAttention FusedMatMulActivation GatedDeltaNet "
            "GemmFastGelu GemmFloat8 GemmaRotaryEmbedding GroupNorm Irfft IsAllFinite LongformerAttention NhwcConv "
            "NhwcFusedConv PackedAttention PackedMultiHeadAttention PagedAttention RemovePadding RestorePadding Rfft "
            "SkipGroupNorm TorchEmbedding VarlenCausalConvWithState"
        ),
    },
    f"{MICROSOFT}.nchwc": {
        "keeps channels in blocks as wide as the processor's vectors": (
            "AveragePool Conv GlobalAveragePool GlobalMaxPool MaxPool ReorderInput ReorderOutput Upsample"
        ),
    },
}

REASONS: Mapping[tuple[str, str], str] = {
    (domain, op): reason for domain, reasons in _REASONS.items() for reason, ops in reasons.items() for op in ops.split()
}
"""Why channels stop at an operator, keyed (domain, operator)."""
