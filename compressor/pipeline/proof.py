"""The proof that a finalist's artefact predicts what its sub-network does, and what it takes for that."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np

from compressor.engines.onnx_exact import TARGET_NATS, Exactness, choose_exactness
from compressor.engines.onnx_verify import check_divergence, mean_kl
from compressor.engines.onnxruntime import OnnxRuntimeEngine
from compressor.engines.streamed import streamed_logits
from compressor.ledger import Key, Row
from compressor.pipeline.candidates import Terms
from compressor.pipeline.context import Context
from compressor.space import SubNetwork

PROOF = "proof"
PROOF_TOKENS = 128
PROMPT_TOKENS = 32
"""Of those, read at once where the cache is proved; the others are generated, so to speak, one by one."""


def prove(
    context: Context, terms: Terms, engine: OnnxRuntimeEngine, subnet: SubNetwork, supernet: Path
) -> Exactness:
    """How exactly the sub-network must be computed, compared with PyTorch's on text of the unpruned model.

    Where keys and values are kept in INT8, the divergence is the larger of reading the text at once and of
    generating it token by token, for which attention has other kernels. Paid for once. Warns where an 8-bit
    artefact stays beyond ``TARGET_NATS``; raises ``PackageError`` where it is so far off that it must be
    wrong.
    """
    kept = terms.workload.cache_key
    key = Key(subnet.digest, terms.weights, PROOF, terms.numerics, engine=terms.engine, workload=kept)
    row = context.ledger.get(key)
    if row is None:
        exactness = _choose(context, terms, engine, subnet, supernet)
        row = context.ledger.put(
            Row(
                key,
                subnet,
                {"divergence_nats": exactness.divergence_nats},
                details={"fine_inputs": list(exactness.fine_inputs)},
            )
        )
    exactness = Exactness(tuple(cast(list[str], row.details["fine_inputs"])), row.metrics["divergence_nats"])
    check_divergence(exactness.divergence_nats, terms.numerics, subnet)
    if terms.numerics == "int8" and set(subnet.bits) == {8} and exactness.divergence_nats > TARGET_NATS:
        context.warn(
            f"INT8 predictions of {subnet.digest} differ by {exactness.divergence_nats:.3f} nats a token, "
            f"more than {TARGET_NATS}, however its inputs are rounded"
        )
    return exactness


def _choose(
    context: Context, terms: Terms, engine: OnnxRuntimeEngine, subnet: SubNetwork, supernet: Path
) -> Exactness:
    from compressor.evaluation.agreement import AgreementText

    ids = AgreementText.load(context.folder.text).ids[0, :PROOF_TOKENS].astype(np.int64)
    expected = streamed_logits(supernet, subnet, ids)

    def divergence(fine_inputs: Sequence[str]) -> float:
        candidate = engine.build(subnet, terms.numerics, fine_inputs)
        return mean_kl(expected, engine.logits(candidate, ids))

    if terms.numerics == "int8":
        exactness = choose_exactness(terms.shape, subnet, divergence, TARGET_NATS)
    else:
        exactness = Exactness((), divergence(()))
    if terms.workload.kv_cache == "fp32":
        return exactness
    candidate = engine.build(subnet, terms.numerics, exactness.fine_inputs)
    decoded = engine.decoded_logits(candidate, ids, PROMPT_TOKENS)
    kept = mean_kl(expected[PROMPT_TOKENS - 1 :], decoded)
    return replace(exactness, divergence_nats=max(exactness.divergence_nats, kept))
