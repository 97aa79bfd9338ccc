"""Whatever is written is complete or absent, also where the disk fills half way."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from compressor.engines.onnx_store import Export, open_export
from compressor.engines.whole import whole_file, whole_folder
from compressor.errors import InputError, PackageError

LIMIT_BYTES = 60_000
"""Less than any of the artefacts; a file grows this far and then the write fails, as on a full disk."""

WRITE = """
import resource, sys
from pathlib import Path
from compressor.engines.gguf_file import write_gguf
from compressor.engines.hf_folder import write_hf_folder
from compressor.engines.onnx_export import export
from compressor.engines.onnx_package import write_package as write_onnx
from compressor.engines.onnx_store import open_export
from compressor.engines.vllm_package import write_package as write_vllm
from compressor.errors import PackageError
from compressor.space import SubNetwork
kind, model, exported, out, limit = sys.argv[1], *map(Path, sys.argv[2:5]), int(sys.argv[5])
subnet, fields = SubNetwork((0, 1, 3), (128, 64, 96)), {"name": "x", "base_model": "x"}
writers = {
    "export": lambda: export(model, out),
    "onnx": lambda: write_onnx(open_export(exported), subnet, out, fields),
    "vllm": lambda: write_vllm(model, subnet, out, fields),
    "hf": lambda: write_hf_folder(model, subnet, out, fields),
    "gguf": lambda: write_gguf(model, subnet, out, fields),
}
open_export(exported).tensors(subnet)  # its cuts are made while there is room
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
try:
    writers[kind]()
except PackageError as error:
    print(error)
"""

CUT = """
import resource, sys
from pathlib import Path
from compressor.engines.onnx_store import open_export
from compressor.errors import PackageError
export = open_export(Path(sys.argv[1]))
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
try:
    export.prepare((64,))
except PackageError as error:
    print(error)
"""


@pytest.mark.parametrize("kind", ["export", "onnx", "vllm", "hf", "gguf"])
def test_a_disk_that_fills_half_way_leaves_nothing(
    tiny_model_folder: Path, tiny_export: Export, tmp_path: Path, kind: str
) -> None:
    arguments = [kind, str(tiny_model_folder), str(tiny_export.folder), str(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, "-c", WRITE, *arguments, str(LIMIT_BYTES)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "could not be written" in done.stdout and "free disk space" in done.stdout
    assert not list(tmp_path.iterdir())


def test_a_cut_that_the_disk_refuses_leaves_nothing_and_is_made_later(
    tiny_export: Export, tmp_path: Path
) -> None:
    folder = tmp_path / "export"
    shutil.copytree(tiny_export.folder, folder, ignore=shutil.ignore_patterns("down-*"))
    before = sorted(folder.iterdir())
    done = subprocess.run([sys.executable, "-c", CUT, str(folder), "4000"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "could not be written" in done.stdout and "free disk space" in done.stdout
    assert sorted(folder.iterdir()) == before
    open_export(folder).prepare((64,))
    assert (folder / "down-64.bin").is_file()


@pytest.mark.parametrize("kind", [whole_folder, whole_file])
def test_what_exists_is_refused_and_kept(tmp_path: Path, kind: object) -> None:
    (tmp_path / "mine").write_text("precious")
    with pytest.raises(InputError, match="exists"), kind(tmp_path / "mine"):  # type: ignore[operator]
        pass
    assert (tmp_path / "mine").read_text() == "precious"


def test_a_failure_within_the_block_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), whole_folder(tmp_path / "new") as scratch:
        (scratch / "half").write_text("written")
        raise ZeroDivisionError
    with pytest.raises(PackageError, match="free disk space"), whole_file(tmp_path / "new") as scratch:
        scratch.write_text("half")
        raise OSError(28, "No space left on device")
    assert not list(tmp_path.iterdir())
