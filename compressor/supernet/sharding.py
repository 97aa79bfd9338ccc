"""Layers shared out over the processes (FSDP2), so that each holds a part of weights, gradients and moments.

Source: Zhao et al., arXiv 2304.11277; torch's ``fully_shard``. A layer is whole only while it runs, so a
sub-network's slices are views of what was just gathered, and a layer that a sub-network drops is not
gathered at all. That every process draws the same sub-networks keeps their collectives in step.
Embeddings, the last norm and the head, which stay frozen, are whole in every process.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn import Parameter

from compressor.errors import CompressorError
from compressor.supernet.elastic import Elastic
from compressor.supernet.processes import Processes


@contextmanager
def sharded(
    elastic: Elastic, trained: list[Parameter], processes: Processes
) -> Iterator[tuple[Elastic, list[Parameter]]]:
    """What to tune in place of ``elastic`` and ``trained``, sharded if the processes were started so.

    Within the block the model's layers are shards; gradients are summed over the processes. After it the
    model is plain again, with what was tuned, also after a ``CompressorError``, which all processes raise
    alike. After any other exception its layers have no weights: the processes can't meet to gather them.
    """
    if not processes.sharded:
        yield elastic, trained
        return
    model: Any = elastic.reset()
    whole = model.model
    places = {
        id(p): (i, name) for i, layer in enumerate(whole.layers) for name, p in layer.named_parameters()
    }
    tuned = [places[id(parameter)] for parameter in trained]
    shards = _shards(whole, processes)
    model.model = _body(whole, shards)
    try:
        try:
            yield Elastic(model), [shards[i].get_parameter(name) for i, name in tuned]
        except CompressorError:
            _gather(whole.layers, shards)
            raise
        _gather(whole.layers, shards)
    finally:
        model.model = whole


def gathered(tensor: Tensor) -> Tensor:
    """The whole of a tensor whose parts lie with the processes, all of which must ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shared_out(tensor: Tensor, example: Tensor) -> Tensor:
    """This process's part of a whole tensor, if ``example`` is shared out."""
    if not isinstance(example, DTensor):
        return tensor
    return distribute_tensor(tensor.to(example.device), example.device_mesh, example.placements)


def _shards(whole: Any, processes: Processes) -> nn.ModuleList:
    """A sharded copy of every layer, each made in turn and its original's memory given back."""
    device = next(whole.parameters()).device
    options: dict[str, Any] = {
        "mesh": init_device_mesh(device.type, (processes.count,)),
        "mp_policy": MixedPrecisionPolicy(reduce_dtype=torch.float32),
    }
    shards = nn.ModuleList()
    for layer in whole.layers:
        shard = copy.deepcopy(layer, {id(whole.config): whole.config})
        shards.append(_summing(fully_shard(shard, reshard_after_forward=True, **options)))
        layer.to("meta")
    return shards


def _summing(shard: Any) -> nn.Module:
    """Let gradients be summed over the processes: losses are weighted as parts of the whole already."""
    shard.set_gradient_divide_factor(1.0)
    shard.set_force_sum_reduction_for_comms(True)
    module: nn.Module = shard
    return module


@torch.no_grad()
def _body(whole: Any, shards: nn.ModuleList) -> nn.Module:
    """The model around the layers, with shards for layers and all else shared with ``whole``.

    It runs once here: at its first forward it notes its layers, and a sub-network would not show all.
    """
    body: Any = copy.deepcopy(whole, {id(kept): kept for kept in (*whole.children(), whole.config)})
    body.layers = shards
    others = set(body.parameters()) - set(shards.parameters())
    mesh = next(p for p in shards.parameters() if isinstance(p, DTensor)).device_mesh
    fully_shard(body, mesh=mesh, ignored_params=others)
    body(torch.zeros(1, 1, dtype=torch.long, device=next(iter(others)).device), use_cache=False)
    module: nn.Module = body
    return module


@torch.no_grad()
def _gather(layers: nn.ModuleList, shards: nn.ModuleList) -> None:
    for layer, shard in zip(layers, shards, strict=True):
        layer.load_state_dict({n: gathered(p).detach() for n, p in shard.named_parameters()}, assign=True)
