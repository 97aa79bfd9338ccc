"""A Hugging Face folder as a plain ONNX graph through optimum, which ``ORTModelForCausalLM`` runs.

Runs in an environment of its own (``make setup-optimum``: optimum-onnx 0.1 wants transformers 4.57):

    .venv-optimum/bin/python -m compressor.engines.optimum_export FOLDER OUT

Nothing here imports more of this project than its errors, so that it needs nothing else installed.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

from compressor.errors import CompressorError, InputError, UnfitMachineError

ELASTIC = "elastic_"
_FOREIGN = ("auto_map", "per_layer_config", "intermediate_sizes")


def export(folder: Path, out: Path) -> None:
    """Write the model in ``folder`` (as ``compress export --format hf`` writes it) to ``out`` as ONNX, fp32.

    ``out`` is whole or absent. Raises ``InputError`` for a folder that holds no model or a target that
    exists, ``UnfitMachineError`` without optimum-onnx.
    """
    if out.exists():
        raise InputError(f"{out} exists: delete it or choose another folder")
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder} holds no model (no config.json): name a Hugging Face folder")
    scratch = out.with_name(out.name + ".tmp")
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        _write(folder, scratch)
        _name_family(scratch / "config.json")
        (scratch / "modeling_elastic.py").unlink(missing_ok=True)
        scratch.rename(out)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _write(folder: Path, out: Path) -> None:
    try:
        from optimum.exporters.onnx import onnx_export_from_model
        from optimum.exporters.tasks import TasksManager
    except ImportError:
        raise UnfitMachineError("optimum's ONNX exporter is not installed here: make setup-optimum") from None
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
    family = str(model.config.model_type).removeprefix(ELASTIC)
    constructor = TasksManager.get_exporter_config_constructor(
        exporter="onnx", task="text-generation-with-past", model_type=family, library_name="transformers"
    )
    graph_config = constructor(model.config, use_past=True, use_past_in_inputs=True)
    onnx_export_from_model(
        model,
        output=out,
        task="text-generation-with-past",
        custom_onnx_configs={"model": graph_config},
        do_validation=False,
    )
    AutoTokenizer.from_pretrained(folder, trust_remote_code=True).save_pretrained(out)


def _name_family(path: Path) -> None:
    """The graph holds the widths, so its configuration is the family's own and needs no code."""
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    config["model_type"] = str(config["model_type"]).removeprefix(ELASTIC)
    config["architectures"] = [name.removeprefix("Elastic") for name in config.get("architectures", [])]
    for name in _FOREIGN:
        config.pop(name, None)
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def main() -> int:
    try:
        export(Path(sys.argv[1]), Path(sys.argv[2]))
    except CompressorError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
