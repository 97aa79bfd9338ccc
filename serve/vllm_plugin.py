"""Tells vLLM about models whose layers have MLPs of different widths.

Entry point of the group ``vllm.general_plugins``: vLLM calls ``register`` in each of its processes.
"""

ARCHITECTURES = (
    "ElasticLlamaForCausalLM",
    "ElasticMistralForCausalLM",
    "ElasticQwen2ForCausalLM",
    "ElasticQwen3ForCausalLM",
)


def register() -> None:
    """Register the architectures by name; their module is imported when a model asks for it."""
    from vllm import ModelRegistry

    known = ModelRegistry.get_supported_archs()
    for name in ARCHITECTURES:
        if name not in known:
            ModelRegistry.register_model(name, f"serve.vllm_models:{name}")
