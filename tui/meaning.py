"""What budgets mean for the chosen model, in a sentence or two: computed sizes beside the limit."""

from __future__ import annotations

from compressor.errors import CompressorError
from compressor.profile import Profile
from compressor.space import SearchSpace, SubNetwork, kv_cache_bytes, weight_bytes
from tui import words
from tui.facts import ModelFacts


def budget_meaning(profile: Profile, model: ModelFacts | None) -> str:
    """Where the whole model and the smallest sub-network stand beside the memory budget."""
    if model is None:
        return "What this means for a model is said here once the model is known."
    try:
        space = SearchSpace.from_fractions(
            model.shape, profile.space.depth_fractions, profile.space.width_fractions
        )
    except CompressorError as error:
        return str(error)
    whole = _parts(model, profile, space.full)
    least = sum(_parts(model, profile, space.smallest))
    limit = profile.budgets.memory_bytes
    numerics = profile.numerics.upper()
    text = (
        f"{model.name} whole: {numerics} weights {words.size(whole[0])} + cache {words.size(whole[1])} "
        f"of {words.size(limit)}.\n"
    )
    if least > limit:
        return text + f"Too little: the smallest sub-network takes {words.size(least)}."
    if sum(whole) > limit:
        return (
            text
            + f"It must shrink to {limit / sum(whole):.0%}; the search can go to {least / sum(whole):.0%}."
        )
    return text + "It fits as it is: the search looks for a smaller and faster one."


def _parts(model: ModelFacts, profile: Profile, subnet: SubNetwork) -> tuple[int, int]:
    """Bytes of weights and key-value cache at the profile's workload."""
    load = profile.workload
    tokens = load.prompt_tokens + load.output_tokens
    return (
        weight_bytes(model.shape, subnet, profile.numerics),
        kv_cache_bytes(model.shape, subnet, tokens, load.concurrency),
    )
