"""What a recorded number needs beside it: the machine, the software, the commit, the command.

No host names and no paths of the machine: results are published.
"""

from __future__ import annotations

import datetime
import os
import platform
import re
import subprocess
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]


def collect(device: str, command: list[str]) -> dict:
    """The `environment` of a result file (schema 1) without copy_gb_s, which is measured.

    device: "cpu" or "cuda" (the current card); command: the script's name and arguments.
    """
    commit, dirty = source_version()
    return {
        "device": device_name(device),
        "driver": _nvidia_smi("driver_version") if device == "cuda" else None,
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "commit": commit,
        "dirty": dirty,
        "utc": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join(["python", *map(_without_folders, command)]),
    }


def device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else f"CPU {_cpu_name()}"


def slug(name: str) -> str:
    """The folder of a device: "NVIDIA H100 80GB HBM3" -> "nvidia-h100-80gb-hbm3"."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def machine_line(environment: dict) -> str:
    parts = [environment["device"]]
    if environment.get("driver"):
        parts.append(f"driver {environment['driver']}")
    if environment.get("cuda"):
        parts.append(f"CUDA {environment['cuda']}")
    parts += [f"torch {environment['torch']}", f"Python {environment['python']}"]
    commit = (environment["commit"] or "unknown")[:12]
    return ", ".join([*parts, f"commit {commit}{' (dirty)' if environment['dirty'] else ''}"])


def gpu_state() -> dict | None:
    """Clock, temperature and throttling of the card now; None where they cannot be asked for."""
    answer = _nvidia_smi("clocks.sm,temperature.gpu,clocks_throttle_reasons.active")
    fields = [field.strip() for field in answer.split(",")] if answer else []
    try:
        clock, temperature, reasons = int(fields[0]), int(fields[1]), int(fields[2], 16)
    except (IndexError, ValueError):
        return None
    # Bits of nvmlClocksEventReasons that slow a busy card down: power cap, hardware slowdown,
    # software and hardware thermal slowdown, power brake. Idle (1) and user clocks (2) do not.
    slowed = bool(reasons & (0x4 | 0x8 | 0x20 | 0x40 | 0x80))
    return {"sm_mhz": clock, "celsius": temperature, "throttled": slowed}


def idle_utilisation() -> int | None:
    """Percent of the last second in which somebody kept the card busy, after a second in which this
    process did not; None where nvidia-smi cannot say."""
    torch.cuda.synchronize()
    time.sleep(1.2)
    answer = _nvidia_smi("utilization.gpu")
    return int(answer) if answer and answer.isdecimal() else None


def source_version() -> tuple[str | None, bool | None]:
    """The commit measured and whether the sources differ from it; recorded results do not count.

    A copy of the sources without .git may give `git describe --always --dirty --abbrev=40
    --exclude=*` in BENCHMARK_COMMIT. (None, None) where neither says.
    """
    given = os.environ.get("BENCHMARK_COMMIT")
    if given:
        return given.removesuffix("-dirty"), given.endswith("-dirty")
    # Without this check a copy inside another repository would report that one's commit.
    commit = _output(["git", "rev-parse", "HEAD"]) if (ROOT / ".git").exists() else None
    if commit is None:
        return None, None
    changes = _output(["git", "status", "--porcelain", "--", ".", ":!benchmark_results"])
    return commit, changes != ""


def is_recorded(result: Path) -> bool:
    """Whether git keeps this file. A run of your own is no recorded result until it is added.
    True outside this repository, where only the files themselves can say."""
    if not (ROOT / ".git").exists() or not result.resolve().is_relative_to(ROOT):
        return True
    return bool(_output(["git", "ls-files", "--", str(result.resolve())]))


def _nvidia_smi(fields: str) -> str | None:
    if not torch.cuda.is_available():
        return None
    # By UUID: torch numbers the cards of CUDA_VISIBLE_DEVICES, nvidia-smi all of them.
    uuid = getattr(torch.cuda.get_device_properties(torch.cuda.current_device()), "uuid", None)
    which = ["-i", f"GPU-{str(uuid).removeprefix('GPU-')}"] if uuid else []
    query = ["nvidia-smi", *which, f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    answer = _output(query)
    return answer.splitlines()[0].strip() if answer else None


def _output(command: list[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    if platform.system() == "Darwin":
        return _output(["sysctl", "-n", "machdep.cpu.brand_string"]) or platform.machine()
    return platform.processor() or platform.machine() or "unknown"


def _without_folders(argument: str) -> str:
    option, equals, value = argument.rpartition("=")
    return option + equals + (Path(value).name if Path(value).is_absolute() else value)
