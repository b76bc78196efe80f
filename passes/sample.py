"""Pass `sample`: writes the choice of channels down as a plan and states, layer by layer, what the theory says of it."""

from __future__ import annotations

from collections.abc import Mapping

from onnxprune.channels import ChannelGroup
from onnxprune.plan import Kept, Plan
from onnxprune.selection import Choice, Selector, Share


def sample(
    groups: tuple[ChannelGroup, ...],
    choices: Mapping[str, Choice],
    selector: Selector,
    model_digest: str,
    searched: bool = False,
) -> tuple[Plan, dict[str, Share]]:
    """The plan for the model with this digest, and every group's share of the certificate.

    searched: whether the numbers of draws were found by looking at what was drawn (a budget other than --eps).
    Groups that keep all channels are not in the plan. Pure: same choices, same plan.
    """
    kept, shares = {}, {}
    for group in groups:
        choice = choices[group.id]
        if len(choice.indices) < group.size:
            kept[group.id] = Kept(group.size, choice.indices, choice.scale)
        shares[group.id] = Share(
            choice.draws,
            selector.epsilon(group, choice, searched),
            selector.delta,
            float(selector.scores[group.id].sum()),
            choice.dropped_sum,
            selector.events[group.id],
            choice.sampled_sum,
            tuple(choice.certain.tolist()),
            choice.added_sum,
            searched,
        )
    return Plan(kept, model_digest), shares
