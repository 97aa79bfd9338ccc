"""What a fine-tuning trains: the layers, all weights, or adapters; the rest is frozen meanwhile."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch.nn import Parameter

from compressor.supernet import lora
from compressor.supernet.config import FinetuneConfig
from compressor.supernet.elastic import Elastic


@contextmanager
def trained_parameters(elastic: Elastic, config: FinetuneConfig) -> Iterator[list[Parameter]]:
    """The parameters to train; those of the model that are not among them are frozen in the block.

    After it the model is whole, plain and unfrozen, with adapters merged into its weights. Raises
    ``InputError`` for adapters that do not fit the model.
    """
    elastic.reset()
    adapted = config.lora_rank > 0
    if adapted:
        trained = lora.attach(elastic, config.lora_rank, config.adapter_alpha, config.seed)
    elif config.train_embeddings:
        trained = list(elastic.model.parameters())
    else:
        trained = [p for layer in elastic.model.model.layers for p in layer.parameters()]
    chosen = {id(parameter) for parameter in trained}
    for parameter in elastic.model.parameters():
        parameter.requires_grad_(id(parameter) in chosen)
    try:
        yield trained
    finally:
        elastic.reset()
        if adapted:
            lora.merge(elastic)
        for parameter in elastic.model.parameters():
            parameter.grad = None
            parameter.requires_grad_(True)
