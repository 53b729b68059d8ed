"""Pictures of result files: time over one dimension of the workload, both axes logarithmic."""

from __future__ import annotations

import io
import textwrap
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no display is needed, and none is opened
import matplotlib.pyplot as plt

from src.benchmarking import results, tables

_CLOCKS = {
    "latency_us": "Latency: call to synchronised result",
    "gpu_us": "GPU time: calls in a CUDA graph",
}
_MARKERS = "osD^vPX"


def over_batch(result: dict, path: Path) -> None:
    """Time over batch size, with the floor where it was measured."""
    _time_over(result, path, "batch_size", "batch size")


def over_vocab(result: dict, path: Path) -> None:
    """Time over vocab size, one line style for each batch size."""
    _time_over(result, path, "vocab_size", "vocab size (tokens)")


def roofline(result: dict, path: Path) -> None:
    """Achieved bandwidth over the bytes that a call must touch, a line a sampler, under the roof of
    a large copy. Arithmetic never limits a sampler: it does about one operation a byte."""
    rows = [row for row in result["rows"] if row["latency_us"] and row["bytes"]]
    clock = "gpu_us" if any(row["gpu_us"] for row in rows) else "latency_us"
    figure, panel = plt.subplots(figsize=(7.5, 5.5), layout="constrained")
    for i, sampler in enumerate(dict.fromkeys(row["sampler"] for row in rows)):
        mine = [row for row in rows if row["sampler"] == sampler and row[clock]]
        points = sorted((row["bytes"], _gb_s(row["bytes"], row[clock]["median"])) for row in mine)
        if points:
            style = {"color": f"C{i}", "marker": _MARKERS[i % len(_MARKERS)], "markersize": 4}
            panel.plot(*zip(*points, strict=True), label=mine[0]["label"], **style)
    floors = sorted({(r["bytes"], _gb_s(r["bytes"], r["floor_us"])) for r in rows if r["floor_us"]})
    if floors:
        label = "floor: only reads the rows"
        panel.plot(*zip(*floors, strict=True), color="black", linestyle=":", label=label)
    copy = result["environment"].get("copy_gb_s")
    if copy:
        panel.axhline(copy, color="black", linewidth=1, label=f"a large copy: {copy:g} GB/s")
    panel.set(xscale="log", yscale="log", xlabel="bytes that a call must touch", ylabel="GB/s")
    panel.set_title("Bandwidth by " + _CLOCKS[clock], fontsize=10)
    panel.grid(True, alpha=0.3)
    if rows:
        figure.legend(loc="outside lower center", ncols=3, fontsize=8)
    _save(figure, result, path)


def kernel(result: dict, path: Path) -> None:
    """Time over batch size, a panel a vocabulary, with the floor and the target (float32, the
    cells without a name)."""
    rows = [r for r in result["rows"] if not r["workload"] and r["dtype"] == "float32"]
    _panels(result, path, rows, "vocab_size", "{:,} tokens")


def from_logits(result: dict, path: Path) -> None:
    """Time over batch size in bfloat16, a panel a filter, with the target."""
    rows = [row for row in result["rows"] if row["dtype"] == "bfloat16"]
    _panels(result, path, rows, "workload", "{}")


def losslessness(result: dict, path: Path) -> None:
    """Observed against expected: shares of first tokens, total variation, and p-values."""
    rows = [row for row in result["rows"] if row["tests"]]
    figure, (shares, variation, tails) = plt.subplots(1, 3, figsize=(15, 5), layout="constrained")
    by_label: dict[str, list[dict]] = {}
    for row in rows:
        by_label.setdefault(row["label"], []).append(row)
    for i, (label, mine) in enumerate(by_label.items()):
        style = {"color": f"C{i}", "s": 8, "marker": _MARKERS[i % len(_MARKERS)], "alpha": 0.6}
        points = [point for row in mine for point in row["points"] if point[1] > 0]
        shares.scatter(*zip(*points, strict=True), label=label, **style)
        tests = [t for row in mine for t in row["tests"].values() if t.get("tv_expected")]
        pairs = [(test["tv_expected"], test["tv"]) for test in tests]
        if pairs:
            variation.scatter(*zip(*pairs, strict=True), **style)
        values = sorted(max(t["p"], 1e-300) for row in mine for t in row["tests"].values())
        uniform = [(k + 0.5) / len(values) for k in range(len(values))]
        tails.scatter(uniform, values, **style)
    titles = {
        shares: ("probability in the target", "share of first tokens"),
        variation: ("total variation that chance gives", "total variation"),
        tails: ("p-value", "p-value"),
    }
    for panel, (x, y) in titles.items():
        panel.set(xscale="log", yscale="log", xlabel=f"expected: {x}", ylabel=f"observed: {y}")
        panel.axline((0.1, 0.1), (1, 1), color="black", linewidth=0.8)
        panel.grid(True, alpha=0.3)
    env = result["environment"]
    if env.get("tests"):
        line = {"color": "black", "linestyle": "--", "linewidth": 0.8}
        tails.axhline(env["alpha"] / env["tests"], label="fails below (Bonferroni)", **line)
        tails.legend(fontsize=8)
    if rows:
        figure.legend(*shares.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    _save(figure, result, path, f"{sum(row['draws'] for row in rows):,} draws")


def soak(result: dict, path: Path) -> None:
    """Memory over calls, as it differs from the first sample."""
    figure, panel = plt.subplots(figsize=(8, 5), layout="constrained")
    for row in result["rows"]:
        samples = row["memory"] or []
        names = [name for name in (samples[0] if samples else {}) if name.endswith("_mib")]
        for name in names:
            values = [sample[name] - samples[0][name] for sample in samples]
            label = f"{row['label']}: {name.removesuffix('_mib').replace('_', ' ')}"
            panel.plot([sample["calls"] for sample in samples], values, label=label)
    panel.set(xlabel="calls", ylabel="MiB more than at the first sample")
    panel.grid(True, alpha=0.3)
    if panel.get_legend_handles_labels()[1]:
        panel.legend(fontsize=8)
    _save(figure, result, path, "every call of a mixed pool of shapes, dtypes and layouts")


def _panels(result: dict, path: Path, rows: list[dict], apart: str, title: str) -> None:
    clock = "gpu_us" if any(row["gpu_us"] for row in rows) else "latency_us"
    groups = list(dict.fromkeys(row[apart] for row in rows)) or [None]
    figure, panels = plt.subplots(
        1,
        len(groups),
        figsize=(5 * len(groups), 5),
        squeeze=False,
        sharey=True,
        layout="constrained",
    )
    for panel, group in zip(panels[0], groups, strict=True):
        mine = [row for row in rows if row[apart] == group and row["latency_us"]]
        _draw(panel, mine, clock, "batch_size")
        targets = {row["batch_size"]: row["target_us"] for row in mine if row["target_us"]}
        if targets:
            points = zip(*sorted(targets.items()), strict=True)
            panel.plot(*points, color="black", linestyle="--", linewidth=0.8, label="target")
        _log_axes(panel, sorted({row["batch_size"] for row in mine}), "batch size")
        panel.set_title(title.format(group), fontsize=10)
    handles, labels = panels[0][0].get_legend_handles_labels()
    if labels:
        known = dict(zip(labels, handles, strict=True))
        figure.legend(known.values(), known, loc="outside lower center", ncols=3, fontsize=8)
    figure.supylabel(_CLOCKS[clock] + " (us)", fontsize=9)
    _save(figure, result, path)


def _log_axes(panel, values: list[int], title: str) -> None:
    panel.set(xscale="log", yscale="log", xlabel=title)
    ticks = _apart(values)
    panel.set_xticks(ticks, [str(tick) for tick in ticks], fontsize=8)
    panel.minorticks_off()
    panel.yaxis.set_major_formatter("{x:g}")
    panel.grid(True, alpha=0.3)


def _gb_s(bytes_: int, microseconds: float) -> float:
    return bytes_ / microseconds / 1e3


def _time_over(result: dict, path: Path, axis: str, title: str) -> None:
    rows = [row for row in result["rows"] if row["latency_us"]]
    clocks = [clock for clock in _CLOCKS if any(row[clock] for row in rows)] or ["latency_us"]
    figure, panels = plt.subplots(
        1, len(clocks), figsize=(6.5 * len(clocks), 5), squeeze=False, layout="constrained"
    )
    for panel, clock in zip(panels[0], clocks, strict=True):
        _draw(panel, rows, clock, axis)
        _log_axes(panel, sorted({row[axis] for row in rows}), title)
        panel.set_ylabel("microseconds a call")
        panel.set_title(_CLOCKS[clock], fontsize=10)
    handles, labels = panels[0][-1].get_legend_handles_labels()
    latency_only = panels[0][0].get_legend_handles_labels()
    known = dict(zip(latency_only[1] + labels, latency_only[0] + handles, strict=True))
    if known:
        figure.legend(known.values(), known, loc="outside lower center", ncols=3, fontsize=8)
    _save(figure, result, path)


def _save(figure, result: dict, path: Path, caption: str | None = None) -> None:
    figure.suptitle(_caption(result, caption), fontsize=9)
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=120)
    plt.close(figure)
    results.write_atomically(path, image.getvalue())


def _draw(panel, rows: list[dict], clock: str, axis: str) -> None:
    # Lines over the vocabulary are one batch size each; over the batch there is one line.
    apart = "batch_size" if axis == "vocab_size" else "vocab_size"
    samplers = list(dict.fromkeys(row["sampler"] for row in rows))
    groups = sorted({row[apart] for row in rows})
    for i, sampler in enumerate(samplers):
        for style, group in enumerate(groups):
            mine = [r for r in rows if r["sampler"] == sampler and r[apart] == group and r[clock]]
            mine.sort(key=lambda row: row[axis])
            if not mine:
                continue
            label = mine[0]["label"] + (f", batch {group}" if apart == "batch_size" else "")
            x = [row[axis] for row in mine]
            line = {"color": f"C{i}", "marker": _MARKERS[style % len(_MARKERS)], "markersize": 4}
            line["linestyle"] = ["-", "--", ":", "-."][style % 4]
            panel.plot(x, [row[clock]["median"] for row in mine], label=label, **line)
            low, high = ([row[clock][edge] for row in mine] for edge in ("p10", "p90"))
            panel.fill_between(x, low, high, color=f"C{i}", alpha=0.15)
    for group in groups if clock == "gpu_us" else []:
        floor = {r[axis]: r["floor_us"] for r in rows if r[apart] == group and r["floor_us"]}
        if floor:
            points = zip(*sorted(floor.items()), strict=True)
            panel.plot(*points, color="black", linestyle=":", label="floor: only reads the rows")


def _apart(values: list[int]) -> list[int]:
    """Without those so near the one before that their labels would overlap."""
    kept: list[int] = []
    for value in values:
        if not kept or value > 1.2 * kept[-1]:
            kept.append(value)
    return kept


def _caption(result: dict, below: str | None = None) -> str:
    if below is not None:
        return "\n".join([*textwrap.wrap(tables.conditions(result), 72), below])
    first = result["rows"][0] if result["rows"] else {}
    shape = f"spec length {first.get('spec_length')}, {first.get('dtype')}, "
    shape += f"{first.get('acceptance')} acceptance; medians, shaded p10-p90"
    return "\n".join([*textwrap.wrap(tables.conditions(result), 72), shape])
