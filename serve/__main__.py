"""``python -m serve PACKAGE``: put a package behind an OpenAI-compatible endpoint."""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import fields
from pathlib import Path
from typing import get_args

from compressor.errors import CompressorError
from compressor.manifest import CacheNumerics, read_manifest
from serve.settings import CONCURRENCY, Settings


def main() -> int:
    """Returns the exit code: 0 after a shutdown that was asked for, 2 for what the user can mend."""
    try:
        settings = _settings(_parser().parse_args())
        engine = read_manifest(settings.package).engine
        if engine == "vllm":
            from serve.vllm_launcher import launch

            return launch(settings)
        from serve.server import run

        run(settings)
    except CompressorError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "serve", description="Serve a package behind an OpenAI-compatible endpoint."
    )
    add = parser.add_argument
    add("package", type=Path, help="folder with manifest.json")
    add("--host", default=Settings.host, help="address to listen on [%(default)s]")
    add("--port", type=int, default=Settings.port, help="port; 0 picks a free one [%(default)s]")
    add(
        "--api-key", default=os.environ.get("EDGE_API_KEY"), help="key that clients must send [$EDGE_API_KEY]"
    )
    add("--insecure", action="store_true", help="allow a public address without a key")
    add("--threads", type=int, help="threads of one operator [the usable cores]")
    add(
        "--max-concurrency",
        type=int,
        help=f"sequences at once [{CONCURRENCY}; on a GPU what its memory holds]",
    )
    add("--queue-size", type=int, default=Settings.queue_size, help="sequences that may wait [%(default)s]")
    add("--max-context", type=int, help="longest prompt plus answer, tokens [the model's]")
    add(
        "--cache-gib",
        type=float,
        help="memory of the key-value cache, GiB [0.4 of what is free; on a GPU what the budget leaves]",
    )
    add(
        "--kv-cache",
        choices=get_args(CacheNumerics),
        help="how keys and values are kept in ONNX Runtime [as the package was measured]",
    )
    add(
        "--request-timeout",
        type=float,
        dest="request_timeout_seconds",
        help="seconds a request may take [600]",
    )
    add("--drain-seconds", type=float, help="when the server is gone after SIGTERM, whatever still runs [30]")
    add("--max-body-bytes", type=int, help="largest request body [4 MiB]")
    add(
        "--cors-origin",
        action="append",
        dest="cors_origins",
        metavar="ORIGIN",
        help="origin to allow; repeatable",
    )
    add(
        "--allowed-host",
        action="append",
        dest="allowed_hosts",
        metavar="NAME",
        help="name, beside this machine's own, by which a server without a key may be asked; repeatable",
    )
    add("--max-connections", type=int, help="connections at once; half of them from one address [1024]")
    add("--model-name", help="name that clients ask for [the manifest's]")
    return parser


def _settings(flags: argparse.Namespace) -> Settings:
    known = {entry.name for entry in fields(Settings)}
    given = {name: value for name, value in vars(flags).items() if name in known and value is not None}
    for name in ("cors_origins", "allowed_hosts"):
        if name in given:
            given[name] = tuple(given[name])
    return Settings(**given)


if __name__ == "__main__":
    sys.exit(main())
