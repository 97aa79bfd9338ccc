"""The command line: one short function a verb. It parses and prints; what is decided, is decided elsewhere.

Exit codes: 0 done; 1 the program is at fault; 2 something the user can correct; 130 interrupted.
"""

from __future__ import annotations

import errno
import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.table import Table

from compressor import __version__
from compressor.errors import CompressorError, InputError

app = typer.Typer(
    name="compress",
    no_args_is_help=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
profiles_app = typer.Typer(help="List the hardware profiles, or show one.", invoke_without_command=True)
app.add_typer(profiles_app, name="profiles")

RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="Run folder, as `compress --run` wrote it.")]
PackageArgument = Annotated[Path, typer.Argument(metavar="PACKAGE", help="Package folder, e.g. RUN/package.")]


def main() -> None:
    """Entry point: run a verb; turn errors into one line and an exit code."""
    # Threads that spin long while they wait starve each other on a machine that has anything else to do.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    debug = "--debug" in sys.argv
    try:
        code = app(standalone_mode=False, args=[a for a in sys.argv[1:] if a != "--debug"])
    except KeyboardInterrupt:
        fail("interrupted; what was finished is kept, and --resume goes on from there", 130)
    except Exception as error:
        if debug:
            raise
        fail(*explained(error))
    sys.exit(code if isinstance(code, int) else 0)


def explained(error: Exception) -> tuple[str, int]:
    """What to tell the user, and the exit code."""
    if isinstance(error, CompressorError):
        return str(error), error.exit_code
    usage = getattr(error, "format_message", None)
    if usage is not None:
        return f"{usage()} (see `compress --help`)", getattr(error, "exit_code", 2)
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return f"the disk is full ({error.filename}): free some, then go on with --resume", 2
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}: check that it exists and may be read and written", 2
    report = "run again with --debug and report what it prints"
    return f"this is a bug: {type(error).__name__}: {error}; {report}", 1


def fail(message: str, code: int) -> NoReturn:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)


@app.callback(invoke_without_command=True)
def compress(
    context: typer.Context,
    profile: Annotated[str, typer.Option(help="Profile name, TOML file, or `auto` for this machine.")] = "",
    model: Annotated[str, typer.Option(help="Hub id, Hugging Face folder, GGUF file, or `starter`.")] = "",
    run: Annotated[Path | None, typer.Option(help="Run folder [default: runs/MODEL-PROFILE].")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in that folder.")] = False,
    preset: Annotated[str, typer.Option(help="Effort: quick, standard or paper.")] = "",
    memory_budget: Annotated[float | None, typer.Option(help="Override the memory budget, GiB.")] = None,
    ttft_budget: Annotated[float | None, typer.Option(help="Override the time to first token, ms.")] = None,
    tpot_budget: Annotated[float | None, typer.Option(help="Override the time per output token, ms.")] = None,
    prompt_tokens: Annotated[int | None, typer.Option(help="Override the workload's prompt, tokens.")] = None,
    output_tokens: Annotated[int | None, typer.Option(help="Override the workload's answer, tokens.")] = None,
    concurrency: Annotated[int | None, typer.Option(help="Override the workload's requests at once.")] = None,
    tasks: Annotated[str, typer.Option(help="`agreement`, `paper`, or lm-eval tasks, comma-separated.")] = "",
    task_data: Annotated[
        Path | None, typer.Option(help="Folder with the tasks' data, used before the hub.")
    ] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(help="Few-shot examples [default: the task's own].")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="Items a task, at most [default: 1,500 for the search, all after].")
    ] = None,
    racing: Annotated[
        bool | None,
        typer.Option(
            "--racing/--no-racing", help="Stop scoring what is dominated [default: quick runs on tasks]."
        ),
    ] = None,
    train_data: Annotated[
        str, typer.Option(help="Alpaca-form JSON(L), text file or hub id [default: data-free].")
    ] = "",
    lora_rank: Annotated[
        int | None, typer.Option(help="Tune adapters of this rank, in less memory [default: all weights].")
    ] = None,
    evaluations: Annotated[int | None, typer.Option(help="Sub-networks to evaluate and measure.")] = None,
    tuning_minutes: Annotated[float | None, typer.Option(help="Longest fine-tuning, minutes.")] = None,
    winner_minutes: Annotated[
        float | None, typer.Option(help="Longest fine-tuning of the winner alone, minutes; 0: none.")
    ] = None,
    tuning_steps: Annotated[int | None, typer.Option(help="Steps of each fine-tuning, at most.")] = None,
    tuning_batch: Annotated[int | None, typer.Option(help="Sequences of a fine-tuning step.")] = None,
    tuning_recipe: Annotated[
        str, typer.Option(help="Networks of a step: alternate (one) [default] or sandwich (four).")
    ] = "",
    tuning_super_every: Annotated[
        int | None,
        typer.Option(
            help="Steps from one super-network step to the next [default: --train-data 2, else 8]; 0: none."
        ),
    ] = None,
    tuning_sampling: Annotated[
        str, typer.Option(help="How sub-networks are drawn: budget [default], small, size or genes.")
    ] = "",
    tuning_loss: Annotated[
        str,
        typer.Option(help="distill, cross-entropy or both [default: labels for --train-data, else distill]."),
    ] = "",
    tuning_teacher: Annotated[
        str, typer.Option(help="Distil from the frozen original [default], or the super network as it is.")
    ] = "",
    tuning_temperature: Annotated[
        float | None, typer.Option(help="Of the distilled distributions [default: 1].")
    ] = None,
    tuning_alpha: Annotated[
        float | None, typer.Option(help="Weight of the labels' loss in `both` [default: 0.5].")
    ] = None,
    tuning_gamma: Annotated[
        float | None, typer.Option(help="Weight of the distillation in `both` [default: 0.5].")
    ] = None,
    tuning_lr: Annotated[
        float | None, typer.Option(help="Learning rate [default: 3e-4; adapters 1e-3].")
    ] = None,
    text_sequences: Annotated[
        int | None, typer.Option(help="Texts the unpruned model writes to tune on.")
    ] = None,
    score_sequences: Annotated[int | None, typer.Option(help="Texts that agreement is scored on.")] = None,
    sequence_length: Annotated[int | None, typer.Option(help="Length of those texts, tokens.")] = None,
    bench_seconds: Annotated[float | None, typer.Option(help="Longest measurement of a candidate.")] = None,
    algorithm: Annotated[str, typer.Option(help="linas, published, nsga2 or random.")] = "",
    threads: Annotated[
        int | None, typer.Option(help="CPU threads of the engine [default: all cores].")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of everything random [default: 0].")] = None,
    cluster: Annotated[
        str, typer.Option(help="Ray cluster whose node `profile/NAME` measures, HOST:PORT.")
    ] = "",
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Print the plan, with memory and time of every stage, and leave."),
    ] = False,
    version: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False,
) -> None:
    """Make a LLaMA-family model fit the hardware you own, and serve it.

    Examples:

      compress --profile starter-cpu --model starter --preset quick

      compress --profile auto --model meta-llama/Llama-2-7b-hf --tasks paper

      compress --run runs/demo --resume

      compress serve runs/demo/package
    """
    if version:
        print(f"edge-compressor {__version__}")
        return
    if context.invoked_subcommand is not None:
        return
    asked = {
        name: value
        for name, value in context.params.items()
        if name not in ("resume", "run", "version", "dry_run") and value not in ("", None)
    }
    if not asked and run is None:
        if sys.stdin.isatty() and sys.stdout.isatty():
            tui(None)
        print(context.get_help())
        return
    if dry_run:
        print_plan(asked, run, resume)
    else:
        run_pipeline(asked, run, resume)


def print_plan(asked: dict[str, Any], run: Path | None, resume: bool) -> None:
    from compressor import device
    from compressor.pipeline.plan import make_plan
    from compressor.pipeline.plan_table import plan_table
    from compressor.request import understand

    path, request = understand(asked, run, resume)
    plan = make_plan(request, device.detect(), path)
    console = Console()
    console.print(plan_table(plan))
    for warning in plan.warnings:
        console.print(f"note: {warning}", highlight=False, markup=False)


def run_pipeline(asked: dict[str, Any], run: Path | None, resume: bool) -> None:
    from compressor.console import terminal_listener
    from compressor.request import check_inputs, understand

    console = Console()
    path, request = understand(asked, run, resume)
    check_inputs(request)
    with terminal_listener(console) as listener:
        from compressor.pipeline.run import execute

        verdict = execute(path, request, listener)
    verdict.print(console)
    if not verdict.budgets_met:
        raise typer.Exit(3)


@profiles_app.callback()
def profiles(context: typer.Context) -> None:
    if context.invoked_subcommand is not None:
        return
    from compressor import device
    from compressor.profile import load_profile, profile_names

    machine = device.detect()
    table = Table("profile", "device memory", "memory", "TTFT", "TPOT", "engine", "fits here")
    for name in profile_names():
        entry = load_profile(name)
        budgets = entry.budgets
        fit = device.fits(entry, machine)
        table.add_row(
            name,
            f"{entry.device.memory_gib:g} GiB",
            f"{budgets.memory_gib:g} GiB",
            f"{budgets.ttft_ms:g} ms",
            f"{budgets.tpot_ms:g} ms",
            entry.engine,
            "yes" if fit.ok else fit.reason,
        )
    Console().print(table)


@profiles_app.command("show")
def show_profile(name: Annotated[str, typer.Argument(help="Profile name or TOML file.")]) -> None:
    """Print a profile as TOML, to read or to copy and edit."""
    from compressor.profile import profile_text

    print(profile_text(name), end="")


@app.command()
def detect() -> None:
    """Say what this machine is, and which profiles fit it."""
    from compressor import device
    from compressor.profile import load_profile, profile_names

    machine = device.detect()
    console = Console()
    facts = Table.grid(padding=(0, 2))
    for label, value in device.describe(machine):
        facts.add_row(label, value)
    console.print(facts)
    table = Table("profile", "fits", "why")
    for name in profile_names():
        fit = device.fits(load_profile(name), machine)
        table.add_row(name, "yes" if fit.ok else "no", fit.reason)
    console.print(table)


@app.command()
def doctor(
    run: Annotated[Path, typer.Option(help="Folder where runs will lie.")] = Path("runs"),
) -> None:
    """Check that this environment is fit to run: versions, engines, disk, memory, load, starter model."""
    from compressor.doctor import diagnose

    table = Table("check", "", "found", "what to do")
    checks = diagnose(run)
    for check in checks:
        table.add_row(
            check.name, "ok" if check.ok else "FAIL", check.detail, "" if check.ok else check.remedy
        )
    Console().print(table)
    if not all(check.ok for check in checks):
        raise typer.Exit(2)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def serve(
    context: typer.Context,
    package: PackageArgument,
) -> None:
    """Serve a package behind an OpenAI-compatible endpoint; further flags: `python -m serve --help`."""
    _go_to_the_engine(package)
    os.execv(sys.executable, [sys.executable, "-m", "serve", str(package), *context.args])


@app.command()
def join(
    address: Annotated[str, typer.Argument(help="Ray cluster's head, HOST:PORT.")],
    profile: Annotated[str, typer.Option(help="Profile whose device this machine is.")],
) -> None:
    """Lend this machine to a cluster as a profile's device; Ctrl-C takes it back.

    Start the head with `ray start --head`, then `compress --profile NAME --cluster HOST:6379` measures here.
    """
    from compressor.cluster import join as command

    argv = command(address, profile)
    os.execv(argv[0], argv)


@app.command()
def tui(run: Annotated[Path | None, typer.Argument(help="Run folder to attach to.")] = None) -> None:
    """Open the wizard: the same steps, led through on screen."""
    os.execv(sys.executable, [sys.executable, "-m", "tui", *([str(run)] if run else [])])


@app.command()
def ask(
    package: PackageArgument,
    question: Annotated[str, typer.Argument(help="What to ask.")],
    max_tokens: Annotated[int, typer.Option(help="Longest answer, tokens.")] = 64,
) -> None:
    """Start the endpoint, ask one chat question through HTTP, print the answer, stop the endpoint."""
    from compressor.ask import ask_package

    print(ask_package(package, question, max_tokens))


@app.command()
def report(
    run: RunArgument,
    llm_int8: Annotated[
        bool,
        typer.Option(
            "--llm-int8", help="Score the front in LLM.int8 too, the paper's INT8, before and after."
        ),
    ] = False,
) -> None:
    """Print a run's table and write its page, report/index.html."""
    from compressor.pipeline.run import write_report

    console = Console()
    write_report(run).print(console)
    if llm_int8:
        from compressor.console import terminal_listener
        from compressor.pipeline.llm_int8 import rescore, table

        with terminal_listener(console) as listener:
            found = rescore(run, listener)
        console.print(table(found))


@app.command()
def replan(
    run: RunArgument,
    memory_budget: Annotated[float | None, typer.Option(help="Memory budget, GiB.")] = None,
    ttft_budget: Annotated[float | None, typer.Option(help="Time to first token, ms.")] = None,
    tpot_budget: Annotated[float | None, typer.Option(help="Time per output token, ms.")] = None,
) -> None:
    """Pick the winner again under other budgets, from what was evaluated; evaluates nothing."""
    from compressor.pipeline.replanning import replan as pick_again

    choice = pick_again(run, memory_gib=memory_budget, ttft_ms=ttft_budget, tpot_ms=tpot_budget)
    choice.print(Console())


@app.command()
def package(
    run: RunArgument,
    pick: Annotated[str, typer.Option(help="winner, best, smallest, fastest, or a digest.")] = "best",
    out: Annotated[Path | None, typer.Option(help="Folder to write [default: RUN/package-PICK].")] = None,
    engine: Annotated[
        str, typer.Option(help="What will serve it, onnxruntime or vllm [default: what the run measured in].")
    ] = "",
) -> None:
    """Package another sub-network of a finished run's front."""
    from compressor.console import terminal_listener
    from compressor.pipeline.exporting import package_for

    console = Console()
    with terminal_listener(console) as listener:
        folder = package_for(run, engine, pick, out, listener)
    console.print(f"serve it:  compress serve {folder}", highlight=False, markup=False, soft_wrap=True)


@app.command()
def export(
    source: Annotated[
        Path, typer.Argument(metavar="RUN", help="Run folder, or a Hugging Face model folder.")
    ],
    format: Annotated[str, typer.Option(help="gguf, hf, vllm or onnx.")],
    pick: Annotated[str, typer.Option(help="winner, best, smallest, fastest, or a digest.")] = "winner",
    numerics: Annotated[str, typer.Option(help="Numerics of that format [default: its usual ones].")] = "",
    portable: Annotated[
        bool, typer.Option("--portable", help="vllm: pad to one width, for vLLM without the plugin.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(help="File or folder to write [default: SOURCE-FORMAT].")
    ] = None,
) -> None:
    """Write a sub-network of a finished run, or a whole model, for another runtime.

    Examples:

      compress export runs/demo --format gguf

      compress export runs/demo --format vllm --pick smallest --portable
    """
    from compressor.console import terminal_listener
    from compressor.pipeline.exporting import export as write

    console = Console()
    with terminal_listener(console) as listener:
        written = write(source, format, pick, numerics, portable, out, listener)
    console.print(f"written: {written}", highlight=False, markup=False, soft_wrap=True)


@app.command()
def compare(
    run: RunArgument,
    pick: Annotated[
        str, typer.Option(help="Whose size: winner, best, smallest, fastest, or a digest.")
    ] = "winner",
    tuning_minutes: Annotated[
        float | None, typer.Option(help="Tuning of each rival, minutes [default: as the run's own].")
    ] = None,
) -> None:
    """Prune the run's model by LLM-Pruner and SliceGPT to a sub-network's size, tune alike, and compare.

    Examples:

      compress compare runs/demo

      compress compare runs/demo --pick smallest --tuning-minutes 10
    """
    from compressor.console import terminal_listener
    from compressor.pipeline.comparing import compare as prune_and_compare
    from compressor.report.comparison import comparison_table

    if tuning_minutes is not None and not tuning_minutes > 0:
        raise InputError(f"--tuning-minutes must be above 0 (got {tuning_minutes:g})")
    console = Console()
    with terminal_listener(console) as listener:
        comparison = prune_and_compare(run, pick, tuning_minutes, listener)
    console.print(comparison_table(comparison))


@app.command()
def measure(
    target: Annotated[
        str, typer.Argument(help="Package, model (folder, GGUF, hub id, `starter`) or endpoint URL.")
    ] = "",
    url: Annotated[str, typer.Option(help="A running OpenAI endpoint, instead of TARGET.")] = "",
    profile: Annotated[
        str, typer.Option(help="Profile whose workload is run, on its kind of device.")
    ] = "auto",
    seconds: Annotated[float, typer.Option(help="Longest measurement, seconds.")] = 10.0,
    threads: Annotated[int | None, typer.Option(help="CPU threads [default: all cores].")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Measure TTFT, TPOT, throughput and peak memory of a package, a model or a running endpoint.

    Examples:

      compress measure runs/demo/package --profile starter-cpu

      compress measure --url http://127.0.0.1:8000/v1 --profile starter-cpu --json
    """
    from compressor.engines.measure import is_url
    from compressor.engines.measure import measure as run_measure
    from compressor.request import named_profile

    if bool(target) == bool(url):
        raise InputError("name one thing to measure: a package, a model, or a running endpoint by --url")
    if url and not is_url(url):
        raise InputError(f"--url {url}: an endpoint's address begins with http:// or https://")
    target = target or url
    _go_to_the_engine(Path(target))
    chosen = named_profile(profile)
    workload = chosen.workload
    measured = run_measure(target, workload, threads=threads, max_seconds=seconds, on=chosen.device.kind)
    if as_json:
        print(
            json.dumps(
                {**measured.metrics(), "workload": workload.label, "conditions": dict(measured.conditions)}
            )
        )
        return
    table = Table("figure", "median", "p90", title=f"{target}, {workload.label}", title_justify="left")
    table.add_row("TTFT", f"{measured.ttft_ms:.1f} ms", f"{measured.ttft_p90_ms:.1f} ms")
    table.add_row("TPOT", f"{measured.tpot_ms:.2f} ms", f"{measured.tpot_p90_ms:.2f} ms")
    table.add_row("throughput", f"{measured.throughput_tok_s:.1f} tok/s", "")
    if measured.peak_memory_bytes:
        table.add_row("peak memory", f"{measured.peak_memory_bytes / 2**20:.0f} MiB", "")
    console = Console()
    console.print(table)
    for name, value in measured.conditions.items():
        console.print(f"{name}: {value}", highlight=False, markup=False)


@app.command()
def verify(package: PackageArgument) -> None:
    """Prove a package whole: every file's hash, that it loads, and that it speaks."""
    from compressor.engines import verify_package

    _go_to_the_engine(package)
    for line in verify_package(package):
        print(line)


def _go_to_the_engine(package: Path) -> None:
    """Go on in vLLM's environment where a package is vLLM's and this one lacks it."""
    from compressor.environments import python_for

    python = str(python_for(package))
    if python != sys.executable:
        os.execv(python, [python, "-m", "compressor.cli", *sys.argv[1:]])


if __name__ == "__main__":
    main()
