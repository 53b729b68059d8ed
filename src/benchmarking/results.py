"""Result files, schema 1: benchmark_results/<device>/<script>.{json,md,png}."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

from src.benchmarking import environment

SCHEMA = 1


class CannotSave(RuntimeError):
    """A result that would not be written, in one line with what mends it."""


def folder(output: Path, device: str) -> Path:
    return output / environment.slug(environment.device_name(device))


def is_of_processor(folder: Path) -> bool:
    """Whether a device's folder is a processor's, not a graphics card's."""
    return folder.name.startswith("cpu-")


def cards_first(folder: Path) -> tuple[bool, str]:
    """A device's folder as a key to sort by: graphics cards before processors, then by name."""
    return is_of_processor(folder), folder.name


def ensure_writable(path: Path, overwrite: bool) -> None:
    """Called before anything is timed. Raises CannotSave where `path` could not be written, or is
    the result of another commit and `overwrite` is not set."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise CannotSave(
            f"{path.parent} cannot be written ({error.strerror}); wanted a folder: --output FOLDER"
        ) from error
    if overwrite or not path.exists():
        return
    try:
        earlier = load(path)["environment"]["commit"]
    except (ValueError, KeyError, TypeError):
        raise CannotSave(f"{path} is not a result file; replace it with --overwrite") from None
    commit = environment.source_version()[0]
    if earlier != commit:
        raise CannotSave(
            f"{path} was recorded at commit {(earlier or 'unknown')[:12]}, this is "
            f"{(commit or 'unknown')[:12]}; replace it with --overwrite"
        )


def make(script: str, env: dict, rows: list[dict]) -> dict:
    return {"schema": SCHEMA, "script": script, "environment": env, "rows": rows}


def dumps(result: dict) -> str:
    return json.dumps(result, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def load(path: Path) -> dict:
    """A result file. Raises ValueError for another schema or no JSON, OSError for no file."""
    result = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(result, dict) or result.get("schema") != SCHEMA:
        raise ValueError(f"{path} is not a result file of schema {SCHEMA}")
    return result


def write_atomically(path: Path, content: str | bytes) -> None:
    """Either the whole of `content` or, whatever interrupts, what was there before. Raises
    CannotSave where the folder cannot be written or the disk is full."""
    data = content.encode("utf-8") if isinstance(content, str) else content
    try:
        # The same folder: a rename across file systems would not be atomic.
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
            if os.name == "posix":
                umask = os.umask(0)
                os.umask(umask)
                os.chmod(name, 0o666 & ~umask)  # mkstemp's 0600 would hide results from a group
            os.replace(name, path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise CannotSave(
            f"{path} was not written ({error.strerror or error}); earlier results are as they were"
        ) from error
