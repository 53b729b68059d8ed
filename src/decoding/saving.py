"""Result files of the demo, schema 1."""

from __future__ import annotations

import json
import platform
import re
import subprocess
import sys
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

import torch


def environment(device: str) -> dict:
    """What a figure depends on: device, versions, commit, time, command."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=False)
        return done.stdout.strip()

    on_card = device == "cuda"
    return {
        "device": torch.cuda.get_device_name() if on_card else f"cpu {platform.machine()}",
        "cuda": torch.version.cuda if on_card else None,
        "torch": torch.__version__,
        "transformers": metadata.version("transformers"),
        "python": platform.python_version(),
        "threads": None if on_card else torch.get_num_threads(),
        "commit": git("rev-parse", "HEAD"),
        "dirty": bool(git("status", "--porcelain")),
        "utc": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


def save(
    folder: Path, script: str, env: dict, rows: list[dict], markdown: str, *, suffix: str = ""
) -> Path:
    """Writes FOLDER/<device>/<script><suffix>.json and .md; returns the path of the JSON."""
    device = re.sub(r"[^a-z0-9]+", "-", env["device"].lower()).strip("-")
    path = folder / device / f"{script}{suffix}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    result = {"schema": 1, "script": script, "environment": env, "rows": rows}
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(f"# {script}\n\n{markdown}\n", encoding="utf-8")
    return path
