"""Engines: what builds, measures, packages and verifies sub-networks. One file a runtime.

Importing this package imports no runtime.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path


def verify_package(folder: Path) -> Iterator[str]:
    """Prove a package whole, one line a proof: its hashes, that it loads, all that serving opens, that it
    speaks.

    Raises ``PackageError`` naming what is wrong.
    """
    from compressor.manifest import check_files, read_manifest

    manifest = read_manifest(folder)
    check_files(folder, manifest)
    yield f"{len(manifest.files)} files are as they were packaged"
    if manifest.engine == "onnxruntime":
        from compressor.engines.onnx_verify import speak

        yield from speak(folder, manifest)
    else:
        from compressor.engines.vllm_verify import speak as speak_vllm

        yield from speak_vllm(folder, manifest)
