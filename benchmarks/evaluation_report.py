"""What benchmarks/evaluation.py prints: its tables, then one line of JSON with figures and bounds."""

from __future__ import annotations

from typing import Any

from verdict import Bound, conclude

Units = dict[str, dict[str, Any]]

SPEED_BOUNDS = {"arc_easy": 6.0, "winogrande": 6.0, "mmlu": 8.0}


def report(done: Units, part: str) -> int:
    """Print everything; 1 if a figure falls short of its bound."""
    checks = _accuracy(done) if part == "accuracy" else _main(done)
    shown = ("peak", "breakdown/", "race")
    extra = {name: unit for name, unit in done.items() if name.startswith(shown) and part == "main"}
    return conclude(checks, extra)


def _main(done: Units) -> list[Bound]:
    return [*_speed(done), *_exactness(done), *_costs(done), *_race(done)]


def _speed(done: Units) -> list[Bound]:
    """The checked figure is the smaller of the ratios of wall times and of processor times."""
    checks: list[Bound] = []
    columns = ("HFLM bf16 s", "batch", "ours s", "in", "by wall", "by CPU", "bound", "HFLM fp32 s", "by wall")
    print(f"\n{'':11}" + "".join(f"{name:>12}" for name in columns) + "   tokens; others' load")
    for task, bound in SPEED_BOUNDS.items():
        theirs, ours = _units(done, f"speed/{task}/hflm/"), _units(done, f"speed/{task}/ours/")
        if not theirs or not ours:
            continue
        walls = [_median([unit["seconds"] for unit in units]) for units in (theirs, ours)]
        cpus = [_median([unit["cpu_seconds"] for unit in units]) for units in (theirs, ours)]
        fp32 = done.get(f"exact/hflm/{task}", {}).get("seconds", float("nan"))
        load = _median([unit["others"] for unit in (*theirs, *ours)])
        cells = (
            f"{walls[0]:.2f}", f"{theirs[0]['batch']}", f"{walls[1]:.2f}", ours[0]["dtype"],
            f"{walls[0] / walls[1]:.2f}×", f"{cpus[0] / cpus[1]:.2f}×", f"{bound:.0f}×",
            f"{fp32:.2f}", f"{fp32 / walls[1]:.2f}×",
        )  # fmt: skip
        tokens = f"{ours[0]['tokens']:,} of {ours[0]['raw_tokens']:,}; {load:.0%}"
        print(f"{task:11}" + "".join(f"{cell:>12}" for cell in cells) + f"   {tokens}")
        checks.append(
            Bound(f"speedup_{task}", min(walls[0] / walls[1], cpus[0] / cpus[1]), bound, at_most=False)
        )
    return checks


def _exactness(done: Units) -> list[Bound]:
    checks: list[Bound] = []
    for task in SPEED_BOUNDS:
        if unit := done.get(f"exact/compared/{task}"):
            checks.append(Bound(f"fp32_max_difference_{task}", unit["max_difference"], 1e-3))
            checks.append(Bound(f"fp32_other_answers_{task}", unit["other_answers"], 0))
    return checks


def _costs(done: Units) -> list[Bound]:
    checks: list[Bound] = []
    if "memory/hflm" in done and "memory/ours" in done:
        peaks = [done[f"memory/{who}"]["peak_bytes"] / 2**30 for who in ("ours", "hflm")]
        print(f"\npeak memory: ours {peaks[0]:.2f} GiB, HFLM {peaks[1]:.2f} GiB")
        checks.append(Bound("memory_of_hflm", peaks[0] / peaks[1], 1.0))
    whole, half_items, quarter = (_wall(done, f"linear/{share}/") for share in (1.0, 0.5, 0.25))
    if whole and quarter:
        print(f"arc_easy items 125, 250, 500: {quarter:.2f}, {half_items:.2f}, {whole:.2f} s")
        checks.append(Bound("time_4x_items", whole / quarter, 4.4))
    if whole and (half := _wall(done, "half/")):
        unit = _units(done, "half/")[0]
        print(f"{unit['layers']} layers, {unit['flops_share']:.1%} of the FLOPs: {half:.2f} s")
        checks.append(Bound("time_half_flops", half / whole, 0.65))
    if peak := done.get("peak"):
        print(f"matrix peak: {peak['bf16_gflop_s']:.0f} GFLOP/s in bf16, {peak['fp32_gflop_s']:.0f} in fp32")
    for unit_name, unit in done.items():
        if not unit_name.startswith("breakdown/"):
            continue
        shares = ", ".join(f"{name} {share:.1%}" for name, share in unit["shares"].items())
        print(f"{unit_name.partition('/')[2]}, {unit['seconds']:.2f} s in {unit['dtype']}: {shares}")
        print(
            f"its matrix products at the measured peak would take {unit['share_at_fp32_peak']:.1%} of that "
            f"time in fp32, {unit['share_at_bf16_peak']:.1%} in bf16"
        )
    return checks


def _race(done: Units) -> list[Bound]:
    unit = done.get("race")
    if unit is None:
        return []
    print(
        f"racing on {unit['task']}: {unit['stopped']} of {unit['sub_networks']} sub-networks stopped early, "
        f"{unit['items_raced']:,} of {unit['items_full']:,} items scored ({unit['saved']:.0%} saved), "
        f"{unit['seconds_raced']:.0f} s against {unit['seconds_full']:.0f} s, front of "
        f"{len(unit['front'])}: {'the same' if unit['same_front'] else 'ANOTHER'}"
    )
    return [Bound("race_same_front", float(unit["same_front"]), 1.0, at_most=False)]


def _accuracy(done: Units) -> list[Bound]:
    checks: list[Bound] = []
    print(
        f"\n{'unpruned starter, fp32':28}{'items':>7}{'HFLM':>9}{'ours':>9}{'95% interval':>20}{'differ':>8}"
    )
    for name in sorted({key.split("/")[2] for key in done if key.startswith("accuracy/")}):
        theirs, ours = (done.get(f"accuracy/{who}/{name}") for who in ("hflm", "ours"))
        if theirs is None or ours is None:
            continue
        differ = sum(a != b for a, b in zip(theirs["right"], ours["right"], strict=True))
        span = f"{ours['low']:.4f} to {ours['high']:.4f}"
        print(
            f"{name:28}{len(ours['right']):7d}{theirs['value']:9.4f}{ours['value']:9.4f}{span:>20}{differ:8d}"
        )
        checks.append(Bound(f"accuracy_items_that_differ_{name}", float(differ), 0))
    return checks


def _wall(done: Units, prefix: str) -> float:
    """Median wall time of a unit's repeats, s; 0 before the first."""
    return _median([unit["seconds"] for unit in _units(done, prefix)])


def _units(done: Units, prefix: str) -> list[dict[str, Any]]:
    return [unit for name, unit in done.items() if name.startswith(prefix)]


def _median(values: list[float]) -> float:
    ordered = sorted(values) or [0.0]
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2
