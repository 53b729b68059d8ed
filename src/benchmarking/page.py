"""One HTML page of all results under a folder: it opens from disk and needs no network."""

from __future__ import annotations

import base64
from html import escape
from pathlib import Path
from urllib.parse import quote

from src.benchmarking import compare, rendering, results
from src.benchmarking.tables import bandwidth_fraction, conditions, notes

_HERE = Path(__file__).parent
# Columns in this order, by a row's key; others that hold a number or a word follow.
_TITLES = {
    "workload": "Configuration",
    "label": "Method",
    "method": "Method",
    "mode": "Mode",
    "prompt_category": "Prompts",
    "batch_size": "Batch size",
    "spec_length": "K",
    "vocab_size": "Vocab size",
    "dtype": "dtype",
    "acceptance": "Dial",
    "status": "Status",
    "gpu_us": "GPU time (us)",
    "latency_us": "Latency (us)",
    "host_us": "Host (us)",
    "floor_us": "Floor (us)",
    "target_us": "Target (us)",
    "target_met": "Target met",
    "speedup": "Speedup",
    "over_softmax": "over softmax first",
    "bytes": "Bytes",
    "of_copy": "of copy (%)",
    "acceptance_rate": "Acceptance",
    "tokens_per_step": "Tokens a step",
}
# They stand in the notes, in tables of their own, or in the raw file only.
_ELSEWHERE = {"sampler", "reason", "command", "warning", "copies", "exact", "bytes_without"}
_ELSEWHERE |= {"tests", "points", "memory", "kinds", "growth_mib"}
_INTRODUCTION = """Medians; a figure's p10, p90 and count show when the pointer rests on it.
Latency is the host's clock from the call to the synchronised result, GPU time a call's share of a
CUDA graph over inputs that do not fit the L2 cache, the floor a kernel that only reads the rows
that matter. Every sampler was checked on the timed inputs before it was timed. A column's head
sorts its table."""
_STORY = ["quick_demo", "test_batch_sizes", "compare_vocab_sizes", "kernel", "from_logits"]
_STORY += ["profile_rejection_sampling", "demo_with_real_llm", "losslessness", "soak"]


def page(folder: Path) -> str:
    """HTML of every result file <device>/<script>[-kind].json in `folder`, plots embedded. A smoke
    run is shown only where its script has no other result. Raises ValueError where there is none.
    """
    sections, contents = [], []
    devices = [path for path in folder.iterdir() if path.is_dir()]
    for device in sorted(devices, key=results.cards_first):
        entries = []
        for path in _result_files(device):
            section, entry = _section(path)
            sections.append(section)
            entries.append(entry)
        if entries:
            contents.append(f"<h3>{escape(_device_name(device))}</h3><ul>{''.join(entries)}</ul>")
    if not sections:
        raise ValueError(f"no result files <device>/<script>.json under {folder}")
    style, script = ((_HERE / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>Rejection sampling: benchmark results</title>\n<style>\n{style}</style>",
            "</head>\n<body>\n<h1>Rejection sampling: benchmark results</h1>",
            f"<p>{_INTRODUCTION}</p>",
            f"<nav>{''.join(contents)}</nav>",
            *sections,
            f"<script>\n{script}</script>\n</body>\n</html>\n",
        ]
    )


def _result_files(device: Path) -> list[Path]:
    def script(path: Path) -> str:
        return path.stem.partition("-")[0]

    def place(path: Path) -> tuple[int, str]:
        known = script(path) in _STORY
        return _STORY.index(script(path)) if known else len(_STORY), path.stem

    paths = sorted(device.glob("*.json"), key=place)
    real = {script(path) for path in paths if not path.stem.endswith("-smoke")}
    return [path for path in paths if not path.stem.endswith("-smoke") or script(path) not in real]


def _device_name(device: Path) -> str:
    for path in _result_files(device):
        try:
            return results.load(path)["environment"]["device"]
        except (ValueError, KeyError, TypeError):  # its section says so
            continue
    return device.name


def _section(path: Path) -> tuple[str, str]:
    """A result's HTML and its line in the page's contents."""
    name = f"{path.parent.name}-{path.stem}"
    address = quote(f"{path.parent.name}/{path.name}")
    link = f'<a href="{address}">raw JSON</a>'
    try:
        result = results.load(path)
        title = f"{path.stem.removesuffix('-smoke')} on {result['environment']['device']}"
        body = _body(result, name, path.with_suffix(".png"))
    except (ValueError, KeyError, TypeError) as error:
        title = f"{path.stem} in {path.parent.name}"
        body = [f"<p>This file cannot be shown: {escape(str(error))}</p>"]
    if path.stem.endswith("-smoke"):
        title += " (smoke run: tiny sizes)"
    parts = [f'<section id="{escape(name)}">', f"<h2>{escape(title)}</h2>", *body]
    text = path.stem.replace("demo_with_real_llm-", "demo_with_real_llm: ")
    entry = f'<li><a href="#{escape(quote(name))}">{escape(text)}</a></li>'
    return "\n".join([*parts, f"<p>{link}</p>", "</section>"]), entry


def _body(result: dict, name: str, plot: Path) -> list[str]:
    env, rows = result["environment"], result["rows"]
    parts = [f'<p class="conditions">{escape(conditions(result))}<br>']
    parts.append(f"<code>{escape(env['command'])}</code></p>")
    parts += _items([*rendering.words(result), *compare.repeated(env)], "words")
    if plot.exists():
        data = base64.b64encode(plot.read_bytes()).decode()
        alt = escape(f"Plot of {result['script']}", quote=True)
        parts.append(f'<p><img alt="{alt}" src="data:image/png;base64,{data}"></p>')
    parts.append(_main_table(result, name))
    parts += _profile_tables(rows, name)
    return parts + _items(notes(rows), "notes")


def _items(lines: list[str], kind: str) -> list[str]:
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return [f'<ul class="{kind}">{items}</ul>'] if lines else []


def _main_table(result: dict, name: str) -> str:
    copy = result["environment"].get("copy_gb_s")
    body = []
    for row in result["rows"]:
        fraction = bandwidth_fraction(row, copy) if "bytes" in row else None
        of_copy = None if fraction is None else round(100 * fraction, 1)
        body.append({**row, "of_copy": of_copy})
    keys = dict.fromkeys([*_TITLES, *(key for row in body for key in row)])
    shown = [
        key
        for key in keys
        if key not in _ELSEWHERE
        and any(_sortable(row.get(key)) != "" for row in body)
        and all(_is_figure(row.get(key)) for row in body)
    ]
    return _table(f"{name}-table", {key: _TITLES.get(key, key) for key in shown}, body)


def _profile_tables(rows: list[dict], name: str) -> list[str]:
    shape = {"label": "Method", "batch_size": "Batch size"}
    timed = [row for row in rows if row.get("stages_us")]
    if not timed:
        return []
    stages = dict.fromkeys(stage for row in timed for stage in row["stages_us"])
    by_stage = [{**row, **row["stages_us"]} for row in timed]
    by_kernel = [{**row, **kernel} for row in timed for kernel in row["kernels"]]
    kernel = {"name": "Kernel or operator", "calls": "Launches", "us": "us a call"}
    return [
        "<h3>Host time by stage (us)</h3>",
        _table(f"{name}-stages", {**shape, **{stage: stage for stage in stages}}, by_stage),
        "<h3>Time by kernel</h3>",
        _table(f"{name}-kernels", {**shape, **kernel}, by_kernel),
    ]


def _table(name: str, columns: dict[str, str], rows: list[dict]) -> str:
    """columns: titles by the rows' keys. Cells carry in data-value what they are sorted by."""
    text = {key for key in columns if any(isinstance(row.get(key), str) for row in rows)}
    heads = "".join(
        f'<th scope="col" data-key="{escape(key)}"{_kind(key in text)}>'
        f'<button type="button">{escape(title)}</button></th>'
        for key, title in columns.items()
    )
    lines = []
    for row in rows:
        cells = "".join(_cell(row.get(key), key in text) for key in columns)
        lines.append(f'<tr class="{escape(row.get("status") or "ok")}">{cells}</tr>')
    return (
        f'<div class="scroll"><table class="sortable" id="{escape(name)}">\n'
        f"<thead><tr>{heads}</tr></thead>\n<tbody>\n"
        + "\n".join(lines)
        + "\n</tbody></table></div>"
    )


def _cell(value, text: bool) -> str:
    title = ""
    if isinstance(value, dict):
        spread = f"p10 {value['p10']:g}, p90 {value['p90']:g}, n {value['n']}"
        title = f' title="{escape(spread)}"'
    sortable = _sortable(value)
    return (
        f'<td{_kind(text)} data-value="{escape(str(sortable))}"{title}>'
        f"{escape(_shown(sortable if isinstance(value, dict) else value))}</td>"
    )


def _kind(text: bool) -> str:
    return ' class="text"' if text else ""


def _is_figure(value) -> bool:
    return not isinstance(value, (dict, list)) or (isinstance(value, dict) and "median" in value)


def _sortable(value):
    if isinstance(value, dict):
        value = value.get("median")
    if isinstance(value, bool):
        return int(value)
    return "" if value is None else value


def _shown(value) -> str:
    if value is None or value == "":
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.3f}" if abs(value) < 10 else f"{value:,.1f}"
    return f"{value:,}" if isinstance(value, int) else str(value)
