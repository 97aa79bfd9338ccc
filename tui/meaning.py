"""What budgets mean for the chosen model, in a sentence or two: computed sizes beside the limit."""

from __future__ import annotations

from compressor.engines.base import MemoryEstimate
from compressor.engines.memory import served_memory
from compressor.errors import CompressorError
from compressor.profile import Profile
from compressor.space import SearchSpace, SubNetwork
from tui import words
from tui.facts import ModelFacts


def budget_meaning(profile: Profile, model: ModelFacts) -> str:
    """Where the whole model and the smallest sub-network stand beside the memory budget."""
    try:
        space = SearchSpace.from_fractions(
            model.shape, profile.space.depth_fractions, profile.space.width_fractions
        )
    except CompressorError as error:
        return str(error)
    whole = _memory(model, profile, space.full)
    least = _memory(model, profile, space.smallest).total
    limit = profile.budgets.memory_bytes
    text = (
        f"{model.name} whole: {profile.numerics.upper()} weights {words.size(whole.weights)} "
        f"+ cache {words.size(whole.kv_cache)} + work {words.size(whole.activations)} "
        f"= {words.size(whole.total)} of {words.size(limit)}.\n"
    )
    if least > limit:
        return text + f"Too little: the smallest sub-network takes {words.size(least)}."
    if whole.total > limit:
        return (
            text
            + f"It must shrink to {limit / whole.total:.0%}; the search can go to {least / whole.total:.0%}."
        )
    return text + "It fits as it is: the search looks for a smaller and faster one."


def _memory(model: ModelFacts, profile: Profile, subnet: SubNetwork) -> MemoryEstimate:
    return served_memory(model.shape, subnet, profile)
