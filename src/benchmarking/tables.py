"""Markdown from result files: tables, conditions, and the notes under them."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from tabulate import tabulate

from src.benchmarking import compare, environment

REFERENCE = "vectorized"


def conditions(result: dict) -> str:
    """One line: machine, versions, commit, date, measured copy bandwidth."""
    env = result["environment"]
    line = f"{environment.machine_line(env)}, {env['utc'][:10]}"
    return f"{line}, copy {env['copy_gb_s']} GB/s" if env.get("copy_gb_s") else line


def notes(rows: Iterable[dict]) -> list[str]:
    """A line for each row that was skipped, failed, lacks its GPU time or was throttled."""
    lines: dict[str, list[str]] = {}
    for row in rows:
        parts = [part for part in (row["reason"], row.get("warning")) if part]
        if parts:
            mend = f"; run: {row['command']}" if row.get("command") else ""
            status = "" if row["status"] == "ok" else f" {row['status']}"
            line = f"{row['label']}{status}: {'; '.join(parts)}{mend}"
            lines.setdefault(line, []).append(cell_name(row))
    return [f"{line} ({', '.join(dict.fromkeys(cells))})" for line, cells in lines.items()]


def method_table(result: dict) -> str:
    """Method | Time (ms) | Speedup, and the GPU's own time where there is one."""
    gpu = any(row["gpu_us"] for row in result["rows"])
    headers = ["Method", "Time (ms)", "Speedup"] + ["GPU time (ms)"] * gpu
    body = [
        [row["label"], milliseconds(row, "latency_us"), _times(row["speedup"])]
        + [milliseconds(row, "gpu_us")] * gpu
        for row in result["rows"]
    ]
    return markdown(body, headers)


def batch_table(result: dict) -> str:
    """A line a batch size; latency, then GPU time, of every sampler; the least latency there is."""
    table = _pivot(result, ["Batch Size"], lambda row: (row["batch_size"],))
    return "\n".join([table, *bullets(_least_latency(result["rows"]))])


def _least_latency(rows: list[dict]) -> list[str]:
    """What a torch.add of one element takes in place of the kernel, at the smallest batch."""
    kernel = fastest_kernel(rows)
    mine = next((row for row in rows if row["sampler"] == kernel and row["latency_us"]), None)
    if mine is None or not mine.get("torch_add_latency_us"):
        return []
    took, add = mine["latency_us"]["median"], mine["torch_add_latency_us"]
    line = (
        f"At batch {mine['batch_size']} a torch.add of one element, called and waited for in turn "
        f"with the samplers, takes {add:.1f} us, {mine['label']} {took:.1f}"
    )
    if mine["speedup"]:
        bound = mine["speedup"] * took / add
        line += (
            f": it is {mine['speedup']:.1f} times as fast as the Python loop, the add {bound:.1f}"
        )
    return [f"{line}."]


def vocab_table(result: dict) -> str:
    """A line a configuration or vocabulary, then bytes and bandwidth fraction of every row."""
    return f"{vocab_brief(result)}\n\n{bytes_table(result)}"


def vocab_brief(result: dict) -> str:
    """A line a configuration or vocabulary."""
    headers = ["Configuration", "Batch Size", "Vocab Size"]
    return _pivot(
        result, headers, lambda row: (row["workload"], row["batch_size"], row["vocab_size"])
    )


def bytes_table(result: dict) -> str:
    """Bytes that a call must touch and how near it comes to the bandwidth of a large copy."""
    headers = ["Configuration", "Method", "Acceptance", "Bytes", "Time (us)", "of copy bandwidth"]
    body = []
    for row in result["rows"]:
        fraction = bandwidth_fraction(row, result["environment"].get("copy_gb_s"))
        clock = row["gpu_us"] or row["latency_us"]
        body.append(
            [
                row["workload"],
                row["label"],
                "-" if row["acceptance_rate"] is None else f"{row['acceptance_rate']:.2f}",
                "-" if row["bytes"] is None else f"{row['bytes']:,}",
                row["status"] if clock is None else f"{clock['median']:.1f}",
                "-" if fraction is None else f"{100 * fraction:.1f} %",
            ]
        )
    return markdown(body, headers)


def bandwidth_fraction(row: dict, copy_gb_s: float | None) -> float | None:
    """The algorithm's bytes over GPU time (latency where there is none), as a share of a copy's."""
    clock = row["gpu_us"] or row["latency_us"]
    if not clock or not copy_gb_s or not row["bytes"]:
        return None
    return row["bytes"] / (clock["median"] * 1e-6) / (copy_gb_s * 1e9)


def fastest_kernel(rows: Iterable[dict]) -> str | None:
    """The sampler whose speedup a table states: the extension's kernel for the device."""
    present = {row["sampler"] for row in rows}
    return next((name for name in ("cuda", "cpp") if name in present), None)


def verdict(row: dict | None, other: dict | None, clock: str = "latency_us") -> str:
    """ "2.1x win" or "0.7x loss" of `row` over `other`; "1.0x same" by compare.change."""
    if not (row and other and row[clock] and other[clock]):
        return "-"
    mine, theirs = row[clock], other[clock]
    least = compare.least_difference(row, other, clock=clock)
    word = {"faster": "win", "slower": "loss"}.get(compare.change(theirs, mine, least), "same")
    return f"{theirs['median'] / mine['median']:.2f}x {word}"


def _pivot(result: dict, headers: list[str], key: Callable[[dict], tuple]) -> str:
    rows = result["rows"]
    labels = {row["sampler"]: row["label"] for row in rows}
    kernel = fastest_kernel(rows)
    lines: dict[tuple, dict[str, dict]] = {}
    for row in rows:
        lines.setdefault(key(row), {})[row["sampler"]] = row
    tables = []
    for clock, title in (("latency_us", "Latency (ms)"), ("gpu_us", "GPU time (ms)")):
        shown = [name for name in labels if any(r[clock] for r in rows if r["sampler"] == name)]
        if not shown:
            continue
        if clock == "latency_us":
            shown = list(labels)  # a sampler that never ran is still a column
        speedup = ["Speedup"] if clock == "latency_us" and kernel else []
        against = [f"over {labels[REFERENCE]}"] if kernel and REFERENCE in shown else []
        body = []
        for shape, by_name in lines.items():
            mine = by_name.get(kernel) if kernel else None
            body.append(
                [*shape]
                + [milliseconds(by_name[n], clock) if n in by_name else "-" for n in shown]
                + [verdict(mine, by_name.get("baseline"))] * len(speedup)
                + [verdict(mine, by_name.get(REFERENCE), clock)] * len(against)
            )
        columns = [*headers, *(labels[name] for name in shown), *speedup, *against]
        tables.append(f"{title}\n\n{markdown(body, columns)}")
    return "\n\n".join(tables) if tables else "Nothing ran: see the notes."


def milliseconds(row: dict, clock: str) -> str:
    if row["status"] != "ok":
        return row["status"]
    return "-" if not row[clock] else f"{row[clock]['median'] / 1e3:.4f}"


def _times(speedup: float | None) -> str:
    return "-" if speedup is None else f"{speedup:.2f}x"


def markdown(body: list[list], headers: list[str]) -> str:
    # Numbers arrive formatted; tabulate would drop their trailing zeros.
    sides = ["left" if header in ("Method", "Configuration") else "right" for header in headers]
    return tabulate(body, headers, tablefmt="github", disable_numparse=True, colalign=sides)


def bullets(lines: list[str]) -> list[str]:
    return ["", *(f"- {line}" for line in lines)] if lines else []


def cell_name(row: dict) -> str:
    if row.get("workload"):
        return row["workload"]
    parts = {"batch": "batch_size", "vocab": "vocab_size", "": "mode"}
    known = [f"{name} {row[key]}".strip() for name, key in parts.items() if row.get(key)]
    return ", ".join(known) or "every workload"
