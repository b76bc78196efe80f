"""What an axis was merged of: which positions of it fall together by the way that its channels have come."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np

from onnxprune.channels import Dim, Index, Tie, joined
from onnxprune.graph import Network

STEPS = 64  # how far back; a Reshape that takes heads apart again stands close to the one that folded them into the batch


class Merged:
    """Walks back from an axis along one path. ties: what the rules said, by node. live: the axes that channels lie on."""

    def __init__(self, net: Network, ties: Mapping[int, Sequence[Tie]], live: Collection[Dim]) -> None:
        self.net, self.ties, self.live = net, ties, live

    def classes(self, dim: Dim) -> Index | None:
        """The class number of every position of an axis, one for those that fall together; None where no two are known to."""
        moves: list[tuple[Index, Index, int]] = []
        for _ in range(STEPS):
            tie = self._source(dim)
            if tie is None:
                break
            if tie.ia is not None or tie.ib is not None:
                ia = np.arange(self._size(tie.a)) if tie.ia is None else tie.ia
                ib = np.arange(self._size(dim)) if tie.ib is None else tie.ib
                moves.append((ia, ib, self._size(dim)))
            dim = tie.a
        labels: Index = np.arange(self._size(dim))
        for ia, ib, size in reversed(moves):
            labels = joined(labels, ia, ib, size)
        return labels if labels.max(initial=0) + 1 < len(labels) else None

    def _source(self, dim: Dim) -> Tie | None:
        """A tie that a live axis of an operand has to this one, the former first."""
        maker = self.net.producer.get(dim.tensor)
        for t in self.ties.get(maker, ()) if maker is not None else ():
            for tie in (t, Tie(t.b, t.a, t.ib, t.ia)):
                if tie.b == dim and tie.a.tensor != dim.tensor and tie.a.tensor not in self.net.fixed and tie.a in self.live:
                    return tie
        return None

    def _size(self, dim: Dim) -> int:
        return self.net.shapes[dim.tensor][dim.axis]
