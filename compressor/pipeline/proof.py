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
from compressor.space import SubNetwork, in_numerics

PROOF = "proof"
PROOF_TOKENS = 128
PROMPT_TOKENS = 32
"""Of those, read at once where the cache is proved; the others are generated, so to speak, one by one."""


def prove(
    context: Context, terms: Terms, engine: OnnxRuntimeEngine, subnet: SubNetwork, supernet: Path
) -> Exactness:
    """How exactly the sub-network must be computed to predict what its rounded weights say in PyTorch's fp32,
    on text of the unpruned model; and what rounding them costs.

    Where keys and values are kept in INT8, the divergence is the larger of reading the text at once and of
    generating it token by token, for which attention has other kernels. Paid for once. Warns where an
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
                {
                    "divergence_nats": exactness.divergence_nats,
                    "rounding_nats": exactness.rounding_nats,
                },
                details={"fine_inputs": list(exactness.fine_inputs)},
            )
        )
    exactness = Exactness(
        tuple(cast(list[str], row.details["fine_inputs"])),
        row.metrics["divergence_nats"],
        row.metrics.get("rounding_nats", 0.0),
    )
    check_divergence(exactness.divergence_nats, terms.numerics)
    if exactness.divergence_nats > TARGET_NATS:
        context.warn(
            f"predictions of {subnet.digest} differ from its rounded weights' by "
            f"{exactness.divergence_nats:.3f} nats a token, more than {TARGET_NATS}, however its inputs are "
            "rounded"
        )
    return exactness


def _choose(
    context: Context, terms: Terms, engine: OnnxRuntimeEngine, subnet: SubNetwork, supernet: Path
) -> Exactness:
    from compressor.evaluation.agreement import AgreementText

    ids = AgreementText.load(context.folder.text).ids[0, :PROOF_TOKENS].astype(np.int64)
    served = in_numerics(subnet, terms.numerics)
    expected = streamed_logits(supernet, served, ids, rounded=True)
    rounding_nats = mean_kl(streamed_logits(supernet, served, ids), expected)

    def divergence(fine_inputs: Sequence[str]) -> float:
        candidate = engine.build(subnet, terms.numerics, fine_inputs)
        return mean_kl(expected, engine.logits(candidate, ids))

    exactness = choose_exactness(terms.shape, served, divergence, TARGET_NATS)
    exactness = replace(exactness, rounding_nats=rounding_nats)
    if terms.workload.kv_cache == "fp32":
        return exactness
    candidate = engine.build(subnet, terms.numerics, exactness.fine_inputs)
    decoded = engine.decoded_logits(candidate, ids, PROMPT_TOKENS)
    kept = mean_kl(expected[PROMPT_TOKENS - 1 :], decoded)
    return replace(exactness, divergence_nats=max(exactness.divergence_nats, kept))
