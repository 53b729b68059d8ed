"""The profile's Markdown and its summary in words, both made from the rows' numbers."""

from __future__ import annotations

from src.benchmarking.tables import bandwidth_fraction, bullets, markdown

# Within this share of a large copy's bandwidth there is little left to win by reading faster.
NEAR_COPY = 0.75
_WORK = {True: "GPU time by kernel", False: "Time by operator"}


def profile_table(result: dict) -> str:
    """Time, bytes, bandwidth and floor of every row; then host stages; then kernels; then words."""
    copy = result["environment"].get("copy_gb_s")
    rows = result["rows"]
    on_gpu = any(row["gpu_us"] for row in rows)
    parts = [
        _figures(rows, copy),
        "Host time by stage (us)\n\n" + _stages(rows),
        f"{_WORK[on_gpu]}, by the profiler (us a call)\n\n" + _kernels(rows),
        "In words\n" + "\n".join(bullets(words(result))),
    ]
    return "\n\n".join(parts)


def profile_brief(result: dict) -> str:
    """Time, bytes, bandwidth and floor of every row, and which is the fastest."""
    said = [line for line in words(result) if line.startswith("Batch ")]
    figures = _figures(result["rows"], result["environment"].get("copy_gb_s"))
    return "\n".join([figures, *bullets(said)])


def _figures(rows: list[dict], copy: float | None) -> str:
    headers = ["Method", "Batch Size", "Latency (us)", "Host (us)", "GPU (us)", "Floor (us)"]
    headers += ["over floor", "Bytes", "GB/s", "of copy"]
    body = []
    for row in rows:
        gpu, host, floor = (_median(row, clock) for clock in ("gpu_us", "host_us", "floor_us"))
        fraction = bandwidth_fraction(row, copy)
        over = gpu / floor if gpu and floor else None
        cells = [_median(row, "latency_us"), host, gpu, floor, over]
        shown = [row["status"] if row["status"] != "ok" else _number(cells[0])]
        shown += [_number(value) for value in cells[1:4]]
        shown.append("-" if cells[4] is None else f"{cells[4]:.2f}x")
        shown.append("-" if row["bytes"] is None else f"{row['bytes']:,}")
        shown.append("-" if fraction is None else f"{fraction * copy:.1f}")
        shown.append("-" if fraction is None else f"{100 * fraction:.1f} %")
        body.append([row["label"], row["batch_size"], *shown])
    return markdown(body, headers)


def _stages(rows: list[dict]) -> str:
    timed = [row for row in rows if row.get("stages_us")]
    names = list(dict.fromkeys(name for row in timed for name in row["stages_us"]))
    body = [
        [row["label"], row["batch_size"], *(_number(row["stages_us"].get(name)) for name in names)]
        for row in timed
    ]
    return markdown(body, ["Method", "Batch Size", *names]) if body else "Nothing was profiled."


def _kernels(rows: list[dict]) -> str:
    body = [
        [row["label"], row["batch_size"], _short(kernel["name"]), f"{kernel['calls']:g}"]
        + [f"{kernel['us']:.1f}"]
        for row in rows
        for kernel in row.get("kernels") or []
    ]
    headers = ["Method", "Batch Size", "Kernel", "launches", "us"]
    return markdown(body, headers) if body else "Nothing was profiled."


def words(result: dict) -> list[str]:
    """A sentence for each timed row, and one for each batch size on the ladder's best rung."""
    copy = result["environment"].get("copy_gb_s")
    rows = [row for row in result["rows"] if row["status"] == "ok" and row["latency_us"]]
    said = [_row_in_words(row, copy) for row in rows]
    for batch in dict.fromkeys(row["batch_size"] for row in rows):
        mine = [row for row in rows if row["batch_size"] == batch]
        clock = "gpu_us" if any(row["gpu_us"] for row in mine) else "latency_us"
        timed = sorted((row for row in mine if row[clock]), key=lambda r: r[clock]["median"])
        if len(timed) > 1:
            first, last = timed[0], timed[-1]
            ratio = last[clock]["median"] / first[clock]["median"]
            unit = "GPU time" if clock == "gpu_us" else "latency"
            said.append(
                f"Batch {batch}: {first['label']} is the fastest by {unit}, "
                f"{ratio:.1f} times faster than {last['label']}."
            )
    return said


def _row_in_words(row: dict, copy: float | None) -> str:
    gpu, host, floor = (_median(row, clock) for clock in ("gpu_us", "host_us", "floor_us"))
    fraction = bandwidth_fraction(row, copy)
    text = f"{row['label']}, batch {row['batch_size']}: "
    if gpu:
        text += f"{gpu:.1f} us on the GPU"
        if floor:
            text += f", {gpu - floor:.1f} us above the floor of {floor:.1f} us ({gpu / floor:.2f}x)"
    else:
        text += f"{_median(row, 'latency_us'):.1f} us to the result"
    if fraction:
        near = "near the memory's limit" if fraction > NEAR_COPY else "not limited by memory"
        text += f"; {100 * fraction:.0f} % of a large copy's bandwidth, {near}"
    if gpu and host:
        bound = "the host" if host > gpu else "the GPU"
        text += f"; the host is busy for {host:.1f} us, so calls one after another wait for {bound}"
    stages = row.get("stages_us")
    if stages:
        name, us = max(stages.items(), key=lambda item: item[1])
        share = 100 * us / (sum(stages.values()) or 1.0)
        text += f"; most host time goes to {name} ({share:.0f} %)"
    top = (row.get("kernels") or [None])[0]
    if top:
        share = 100 * top["us"] / sum(kernel["us"] for kernel in row["kernels"])
        text += f"; {_short(top['name'])} is {share:.0f} % of its kernels' time"
    return text + "."


def _median(row: dict, clock: str) -> float | None:
    value = row.get(clock)
    return value["median"] if isinstance(value, dict) else value


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _short(name: str) -> str:
    """A kernel's name without arguments; of templates only the head. No Markdown in it."""
    head = name.removeprefix("void ").split("(")[0].replace("|", "/")
    return head if len(head) <= 60 else head[:57] + "..."
