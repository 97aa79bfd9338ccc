"""The README.md of a package: what it is, how good and fast, and how to serve it."""

from __future__ import annotations

from pathlib import Path

from compressor.manifest import Manifest


def write_model_card(folder: Path, manifest: Manifest) -> None:
    """Write ``README.md`` with the front matter that model hubs read."""
    (folder / "README.md").write_text(model_card(manifest), encoding="utf-8")


def model_card(manifest: Manifest) -> str:
    """A short model card in Markdown."""
    architecture = manifest.architecture
    widths = architecture.widths
    size = manifest.weight_bytes / 1e6
    parts = [
        _front_matter(manifest),
        f"# {manifest.name}\n",
        f"A sub-network of {manifest.base_model}: {len(architecture.layers)} layers, MLP widths "
        f"{min(widths)} to {max(widths)}, {manifest.parameters / 1e6:.1f}M parameters, {size:.1f} MB of "
        f"weights in {manifest.numerics.upper()}, for {manifest.engine}. Made by edge-compressor "
        f"(method: LLaMA-NAS, arXiv 2405.18377).\n",
    ]
    if manifest.divergence_nats is not None:
        parts.append(
            f"Its predictions are {manifest.divergence_nats:.3f} nats a token from those of the sub-network "
            "before quantization (Kullback-Leibler divergence).\n"
        )
    if manifest.accuracy:
        parts.append("| task | score | 95% interval | items |\n|---|---|---|---|")
        parts += [
            f"| {a.task} | {a.value:.3f} | {a.low:.3f} to {a.high:.3f} | {a.items} |"
            for a in manifest.accuracy
        ]
        parts.append("")
    if manifest.speed:
        parts.append("| workload | device | TTFT ms | TPOT ms | tokens/s |\n|---|---|---|---|---|")
        parts += [
            f"| {s.workload} | {s.device} | {s.ttft_ms:.1f} | {s.tpot_ms:.2f} | {s.throughput_tok_s:.1f} |"
            for s in manifest.speed
        ]
        parts.append("")
    parts.append("Serve it behind an OpenAI-compatible endpoint:\n\n```\ncompress serve .\n```\n")
    return "\n".join(parts)


def _front_matter(manifest: Manifest) -> str:
    lines = ["---", f"base_model: {manifest.base_model}"]
    if manifest.license:
        lines.append(f"license: {manifest.license}")
    return "\n".join([*lines, "pipeline_tag: text-generation", "---", ""])
