"""The tables of the two sweeps that have targets, and what they come to in words."""

from __future__ import annotations

import statistics

from src.benchmarking.tables import bandwidth_fraction, bullets, markdown, verdict

# The host's share of a call: at most this, or so many times a torch.add of one element.
HOST_US, HOST_ADDS = 12.0, 3.0
_MISSED = "Missed"
_MET = {True: "met", False: "missed", None: "-"}
_CELL = ("workload", "batch_size", "spec_length", "vocab_size", "dtype", "acceptance")
KERNELS = ("cuda", "cpp")


def kernel_table(result: dict) -> str:
    """A line a cell: the kernel's time, floor, target, and how it stands against the others."""
    headers = ["Configuration", "Batch Size", "K", "Vocab Size", "dtype", "Acceptance", "Time (us)"]
    headers += ["Floor (us)", "Target (us)", "Target", "of copy", "Host (us)", "over vectorized"]
    headers += ["over baseline (latency)", "over the fastest peer"]
    body = []
    for rows in cells(result["rows"]).values():
        mine = next((row for row in rows.values() if row["sampler"] in KERNELS), None)
        if mine is None:
            continue
        clock = "gpu_us" if mine["gpu_us"] else "latency_us"
        fraction = bandwidth_fraction(mine, result["environment"].get("copy_gb_s"))
        name = mine["workload"] or ""
        acceptance = "-" if mine["acceptance_rate"] is None else f"{mine['acceptance_rate']:.2f}"
        peer = fastest_peer(rows, clock)
        body.append(
            [name, mine["batch_size"], mine["spec_length"], mine["vocab_size"], mine["dtype"]]
            + [acceptance, _time(mine, clock), _us(mine["floor_us"]), _us(mine["target_us"])]
            + [_MET[mine["target_met"]]]
            + [
                "-" if fraction is None else f"{100 * fraction:.0f} %",
                _us(_median(mine, "host_us")),
            ]
            + [verdict(mine, rows.get("vectorized"), clock), verdict(mine, rows.get("baseline"))]
            + [f"{verdict(mine, peer, clock)} ({peer['label']})" if peer else "-"]
        )
    words = bullets(kernel_words(result))
    return "\n".join([_clock_line(result), "", markdown(body, headers), *words])


def kernel_brief(result: dict) -> str:
    """The cells of the plain sweep in its first dtype, without what stands still in them."""
    rows = result["rows"]
    plain = [row for row in rows if not row["workload"] and row["dtype"] == rows[0]["dtype"]]
    headers = ["Batch Size", "Vocab Size", "Time (us)", "Floor (us)", "Target (us)", "Target"]
    headers += ["Host (us)", "over vectorized", "over the fastest peer"]
    body = []
    for by_name in cells(plain).values():
        mine = next((row for row in by_name.values() if row["sampler"] in KERNELS), None)
        if mine is None:
            continue
        clock = "gpu_us" if mine["gpu_us"] else "latency_us"
        peer = fastest_peer(by_name, clock)
        body.append(
            [mine["batch_size"], mine["vocab_size"], _time(mine, clock), _us(mine["floor_us"])]
            + [_us(mine["target_us"]), _MET[mine["target_met"]], _us(_median(mine, "host_us"))]
            + [verdict(mine, by_name.get("vectorized"), clock)]
            + [verdict(mine, peer, clock) if peer else "-"]
        )
    said = [line for line in kernel_words(result) if not line.startswith(_MISSED)]
    return "\n".join([_clock_line(result), "", markdown(body, headers), *bullets(said)])


def kernel_words(result: dict) -> list[str]:
    """How many targets were met, which were missed and by how much, and where the kernel lost."""
    said = _targets_in_words(result["rows"])
    lost = []
    for rows in cells(result["rows"]).values():
        mine = next((row for row in rows.values() if row["sampler"] in KERNELS), None)
        for other in rows.values():
            for clock in ("gpu_us", "latency_us"):
                if mine and other is not mine and verdict(mine, other, clock).endswith("loss"):
                    unit = {"gpu_us": "GPU time", "latency_us": "latency"}[clock]
                    lost.append(f"{cell_text(mine)}: {other['label']} is faster by {unit}")
    if any(row["sampler"] in KERNELS and row["latency_us"] for row in result["rows"]):
        said += lost or ["The kernel lost to no other sampler in any cell by either clock."]
    return said + _host_in_words(result)


def _host_in_words(result: dict) -> list[str]:
    rows = [r for r in result["rows"] if r["sampler"] in KERNELS and r.get("torch_add_us")]
    if not rows:
        return []
    hosts = [_median(r, "host_us") for r in rows]
    adds = [r["torch_add_us"] for r in rows]
    host, add = statistics.median(hosts), statistics.median(adds)
    met = sum(h <= max(HOST_US, HOST_ADDS * a) for h, a in zip(hosts, adds, strict=True))
    return [
        f"The host is busy for {host:.1f} us a call in the median cell, {max(hosts):.1f} at most. "
        f"A torch.add of one element, taking turns with it, takes {add:.1f} us: the call costs "
        f"{host / add:.1f} of them. Target of {HOST_US:.0f} us or {HOST_ADDS:.0f} of them met in "
        f"{met} of {len(rows)} rows."
    ]


def logits_table(result: dict) -> str:
    """A line a row: time, target, bytes, and how it stands against softmax first."""
    headers = ["Configuration", "Batch Size", "Vocab Size", "dtype", "Method", "Acceptance"]
    headers += ["Time (us)", "Target (us)", "Target", "Bytes", "of copy", "over softmax first"]
    body = []
    for row in result["rows"]:
        clock = "gpu_us" if row["gpu_us"] else "latency_us"
        fraction = bandwidth_fraction(row, result["environment"].get("copy_gb_s"))
        over = row["over_softmax"]
        acceptance = "-" if row["acceptance_rate"] is None else f"{row['acceptance_rate']:.2f}"
        body.append(
            [row["workload"], row["batch_size"], row["vocab_size"], row["dtype"], row["label"]]
            + [acceptance, _time(row, clock), _us(row["target_us"]), _MET[row["target_met"]]]
            + ["-" if row["bytes"] is None else f"{row['bytes']:,}"]
            + ["-" if fraction is None else f"{100 * fraction:.0f} %"]
            + ["-" if over is None else f"{over:.2f}x"]
        )
    words = bullets(logits_words(result))
    return "\n".join([_clock_line(result), "", markdown(body, headers), *words])


def logits_brief(result: dict) -> str:
    """The kernel's rows, a line a cell, with and without a kept logsumexp side by side."""
    headers = ["Configuration", "Batch Size", "dtype", "Time (us)", "Target (us)", "of copy"]
    headers += ["over softmax first", "no logsumexp: Time (us)", "Target (us)"]
    body = []
    for rows in cells(result["rows"]).values():
        mine = next((rows[name] for name in KERNELS if name in rows), None)
        if mine is None:
            continue
        clock = "gpu_us" if mine["gpu_us"] else "latency_us"
        fraction = bandwidth_fraction(mine, result["environment"].get("copy_gb_s"))
        over, without = mine["over_softmax"], rows.get(f"{mine['sampler']}-no-logsumexp")
        body.append(
            [mine["workload"], mine["batch_size"], mine["dtype"], _time(mine, clock)]
            + [_us(mine["target_us"]), "-" if fraction is None else f"{100 * fraction:.0f} %"]
            + ["-" if over is None else f"{over:.2f}x"]
            + ([_time(without, clock), _us(without["target_us"])] if without else ["-", "-"])
        )
    said = [line for line in logits_words(result) if not line.startswith(_MISSED)]
    return "\n".join([_clock_line(result), "", markdown(body, headers), *bullets(said)])


def logits_words(result: dict) -> list[str]:
    return _targets_in_words(result["rows"])


def _targets_in_words(rows: list[dict]) -> list[str]:
    judged = [row for row in rows if row["target_met"] is not None]
    if not judged:
        return ["No target was judged: they are of GPU time."]
    said = [f"Target met in {sum(row['target_met'] for row in judged)} of {len(judged)} rows."]
    for row in judged:
        if not row["target_met"]:
            us = row["gpu_us"]["median"]
            said.append(
                f"{_MISSED}, {row['label']}, {cell_text(row)}: {us:.1f} us, target "
                f"{row['target_us']:.1f} us"
            )
    return said


def cells(rows: list[dict]) -> dict[tuple, dict[str, dict]]:
    """Rows by sampler, by cell."""
    found: dict[tuple, dict[str, dict]] = {}
    for row in rows:
        found.setdefault(tuple(row[key] for key in _CELL), {})[row["sampler"]] = row
    return found


def fastest_peer(rows: dict[str, dict], clock: str) -> dict | None:
    """Of the samplers of other packages, which draw their own numbers: none is held to be exact."""
    peers = [row for row in rows.values() if not row["exact"] and row[clock]]
    return min(peers, key=lambda row: row[clock]["median"], default=None)


def cell_text(row: dict) -> str:
    name = f"{row['workload']}, " if row["workload"] else ""
    return f"{name}batch {row['batch_size']}, vocab {row['vocab_size']}, {row['dtype']}"


def _clock_line(result: dict) -> str:
    if any(row["gpu_us"] for row in result["rows"]):
        return "Time is GPU time."
    return "Time is latency: there was no GPU."


def _time(row: dict, clock: str) -> str:
    return row["status"] if row["status"] != "ok" else _us(_median(row, clock))


def _median(row: dict, clock: str) -> float | None:
    return row[clock]["median"] if row.get(clock) else None


def _us(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"
