"""Which tensors of student and teacher are compared."""

from __future__ import annotations

from collections.abc import Mapping

from onnxprune.errors import ModelError
from onnxprune.graph import Network
from onnxprune.training.losses import Targets

SOFTMAX = {"Softmax", "LogSoftmax"}
FEATURES = 8  # at most, spread over the depth of the graph
LEARNT = {"Conv", "ConvTranspose", "Gemm", "MatMul", "Add", "Relu", "Clip"}


def targets(
    student: Network,
    teacher: Network,
    shapes: tuple[Mapping[str, tuple[int, ...]], Mapping[str, tuple[int, ...]]],
    features: bool,
) -> Targets:
    """Every floating-point output; of class probabilities the scores before the softmax, where both graphs name them alike.

    shapes: of all tensors in a run of student and teacher. features: whether to add intermediate tensors that both have
    with the same name and shape. Raises ModelError where the outputs cannot be compared.
    """
    scores: list[str] = []
    others: list[str] = []
    if set(student.outputs) != set(teacher.outputs):
        raise ModelError("the two models have different outputs", hint="--teacher is the model that was pruned")
    for name in student.outputs:
        if shapes[0].get(name) != shapes[1].get(name):
            raise ModelError(f"output '{name}' has another shape in the teacher", hint="--teacher is the model that was pruned")
        before = _before_softmax(student, name)
        same = before == _before_softmax(teacher, name)
        (scores if same and _classes(shapes[0].get(before, ())) else others).append(before if same else name)
    used = {*scores, *others}
    common = [] if not features else [x for x in _inner(student, teacher, shapes) if x not in used]
    chosen = [common[i * len(common) // FEATURES] for i in range(FEATURES)] if len(common) > FEATURES else common
    return Targets(tuple(dict.fromkeys(scores)), tuple(dict.fromkeys(others)), tuple(chosen))


def _before_softmax(net: Network, name: str) -> str:
    node = net.model.graph.node[net.producer[name]] if name in net.producer else None
    if node is not None and node.op_type in SOFTMAX:
        return str(node.input[0])
    if node is not None and node.op_type == "Identity":
        inner = _before_softmax(net, node.input[0])
        return inner if inner != node.input[0] else name
    return name


def _classes(shape: tuple[int, ...]) -> bool:
    """One vector of at least two entries a sample."""
    return len(shape) == 2 and shape[1] >= 2


def _inner(
    student: Network, teacher: Network, shapes: tuple[Mapping[str, tuple[int, ...]], Mapping[str, tuple[int, ...]]]
) -> list[str]:
    names = (o for i in student.order for o in student.model.graph.node[i].output)
    return [
        x
        for x in names
        if x in teacher.producer
        and student.model.graph.node[student.producer[x]].op_type in LEARNT
        and x not in student.fixed
        and len(shapes[0].get(x, ())) > 1
        and shapes[0].get(x) == shapes[1].get(x)
    ]
