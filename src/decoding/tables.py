"""Tables and findings from the rows of a comparison (src/decoding/methods.py)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePosixPath

_BLOCKS = {
    "eager": "Eager: one kernel launch after another, as model.generate pays for them",
    "graphed": "Graphed: static cache, rounds captured in CUDA graphs",
}


def tables(rows: Sequence[dict]) -> str:
    """A Markdown block for each mode, then acceptance and spec length by category."""
    blocks = []
    for mode, title in _BLOCKS.items():
        of_mode = [row for row in overall(rows) if row["mode"] == mode]
        if of_mode:
            blocks.append(f"### {title}\n\n{_block(of_mode)}")
    if any(row["expected_speedup"] for row in rows):
        blocks.append(
            "Times are of one generation, prefill included; draft, verify and sample of one round. "
            "S(K): the speedup\nif a round cost nothing but its forwards."
        )
    by_category = _by_category(rows)
    if by_category:
        blocks.append(f"### By category\n\n{by_category}")
    return "\n\n".join(blocks)


def summary(results: Sequence[tuple[dict, str]]) -> str:
    """One line for each (result, address of its figures) and mode: the method with the most
    tokens/s beside plain decoding, and what it gains in each category where there are several."""
    header = ["Run", "Card", "Mode", "Plain (tokens/s)", "Speculative", "K", "Acceptance"]
    header += ["Speedup", "By category"]
    body = []
    for result, address in results:
        rows = [row for row in result["rows"] if row["status"] == "ok"]
        for mode in _BLOCKS:
            plain, best = _plain_and_best(overall(rows), mode)
            if not best:
                continue
            categories = [
                f"{row['prompt_category']} {row['speedup']:.2f}"
                for row in rows
                if (row["label"], row["mode"]) == (best["label"], mode)
                and row["prompt_category"] != "all"
            ]
            run = PurePosixPath(address).stem.removeprefix(f"{result['script']}-")
            body.append(
                [
                    f"[{run}]({address})",
                    result["environment"]["device"].removeprefix("NVIDIA "),
                    mode,
                    f"{plain['tokens_per_s']:.0f}",
                    f"{best['tokens_per_s']:.0f}",
                    str(best["spec_length"]),
                    f"{best['acceptance_rate']:.2f}",
                    f"{best['speedup']:.2f}x",
                    ", ".join(categories) if len(categories) > 1 else "-",
                ]
            )
    return markdown(header, body)


def _plain_and_best(ran: Sequence[dict], mode: str) -> tuple[dict | None, dict | None]:
    """Of rows that ran, a mode's plain decoding and the speculative method with the most tokens/s;
    (None, None) where one of the two is missing."""
    of_mode = [row for row in ran if row["mode"] == mode]
    plain = next((row for row in of_mode if row["method"] == "plain"), None)
    rated = [row for row in of_mode if row["acceptance_rate"] is not None]
    if not plain or not rated:
        return None, None
    return plain, max(rated, key=lambda row: row["tokens_per_s"])


def overall(rows: Sequence[dict]) -> list[dict]:
    """One row a method and mode: over all prompts."""
    whole = {}
    for row in rows:  # "all" comes last, and is missing where there is one category
        whole[row["mode"], row["label"]] = row
    return list(whole.values())


def _block(rows: Sequence[dict]) -> str:
    reasons = {row["reason"] for row in rows}
    if all(row["status"] == "skipped" for row in rows) and len(reasons) == 1:
        return f"Skipped: {reasons.pop()}"
    header = ["Method", "Avg Time (s)", "Speedup", "S(K)", "Tokens/s", "K", "Acceptance"]
    header += ["Tokens/round", "Draft (ms)", "Verify (ms)", "Sample (ms)"]
    body, notes = [], []
    for number, row in enumerate(rows, 1):
        label = f"{number}. {row['label']}"
        if row["status"] != "ok":
            mend = f"; run: {row['command']}" if row["command"] else ""
            notes.append(f"{label}: {row['status']}: {row['reason']}{mend}")
            body.append([label, row["status"], *["-"] * (len(header) - 2)])
            continue
        body.append(
            [
                label,
                _number(row["seconds"], "{:.3f}"),
                _number(row["speedup"], "{:.2f}x"),
                _number(row["expected_speedup"], "{:.2f}x"),
                _number(row["tokens_per_s"], "{:.1f}"),
                str(row["spec_length"] or "-"),
                _number(row["acceptance_rate"], "{:.2f}"),
                _number(row["mean_accepted_length"], "{:.2f}"),
                *(_round_ms(row, phase) for phase in ("draft", "verify", "sample")),
            ]
        )
    return "\n".join([markdown(header, body), *[f"\n- {note}" for note in notes]])


def _round_ms(row: dict, phase: str) -> str:
    seconds, steps = row[f"{phase}_s"], row.get("profiled_steps")
    return "-" if seconds is None or not steps else f"{1e3 * seconds / steps:.2f}"


def _by_category(rows: Sequence[dict]) -> str:
    """The fastest speculative method of the last mode that ran, category by category."""
    ran = [row for row in rows if row["status"] == "ok" and row["acceptance_by_position"]]
    ran = [row for row in ran if row["prompt_category"] != "all"] or ran
    if not ran:
        return ""
    mode = ran[-1]["mode"]
    best = max((row for row in ran if row["mode"] == mode), key=lambda row: row["tokens_per_s"])
    header = ["Category", "K", "Acceptance", "by position", "Tokens/round", "Tokens/s", "Speedup"]
    body = [
        [
            row["prompt_category"],
            str(row["spec_length"]),
            f"{row['acceptance_rate']:.2f}",
            " ".join(f"{share:.2f}" for share in row["acceptance_by_position"]),
            f"{row['mean_accepted_length']:.2f}",
            f"{row['tokens_per_s']:.1f}",
            _number(row["speedup"], "{:.2f}x"),
        ]
        for row in ran
        if (row["mode"], row["label"]) == (mode, best["label"])
    ]
    return f"{best['label']}, {mode}:\n\n{markdown(header, body)}"


def insights(rows: Sequence[dict]) -> str:
    """Key Insights: what this run says, in sentences computed from its rows."""
    found = _findings(rows) or ["Nothing was measured that could be compared."]
    if any(row["synthetic"] for row in rows):
        found.append("Random weights: the timings are real, the text and the acceptance are not.")
    return "\n".join(["### Key Insights\n", *(f"- {sentence}" for sentence in found)])


def _findings(rows: Sequence[dict]) -> list[str]:
    found = []
    ran = [row for row in overall(rows) if row["status"] == "ok"]
    ok = {(row["mode"], row["method"]): row for row in ran}
    for mode in _BLOCKS:
        _, best = _plain_and_best(ran, mode)
        if not best:
            continue
        verb = "gains over" if best["speedup"] > 1 else "does not pay against"
        found.append(
            f"{mode}: {best['label']} {verb} plain decoding: {best['speedup']:.2f}x at acceptance "
            f"{best['acceptance_rate']:.2f}, {best['mean_accepted_length']:.2f} tokens a round."
        )
        spent = {phase: best[f"{phase}_s"] for phase in ("draft", "verify", "sample")}
        total = sum(spent.values())
        shares = ", ".join(f"{phase} {100 * s / total:.1f} %" for phase, s in spent.items())
        found.append(f"{mode}: where a round of it goes: {shares}.")
        if best["model_share"]:
            found.append(
                f"{mode}: {100 * best['model_share']:.1f} % of its time after prefill is forwards."
            )
        peer = ok.get(("eager", "transformers-assisted"))  # it has no graphs
        if peer:
            ratio = best["tokens_per_s"] / peer["tokens_per_s"]
            found.append(
                f"{mode}: {ratio:.2f} times the tokens/s of transformers' assisted generation."
            )
    if ("eager", "plain") in ok and ("graphed", "plain") in ok:
        ratio = ok["graphed", "plain"]["tokens_per_s"] / ok["eager", "plain"]["tokens_per_s"]
        found.append(
            f"Graphs and fused layers alone make plain decoding {ratio:.2f} times as fast."
        )
    return found


def lossless(report: Sequence[dict]) -> str:
    """The table of Comparison.check_lossless."""
    header = [
        "Method",
        "Mode",
        "Rows",
        "Equal to plain",
        "Tokens",
        "Not argmax",
        "First divergence",
    ]
    body = []
    for entry in report:
        if "skipped" in entry:
            body.append([entry["label"], entry["mode"], "skipped", *["-"] * 4])
            continue
        parted = min(entry["divergences"], key=lambda d: d["position"], default=None)
        where = (
            f"token {parted['position']}, top-2 margin {parted['margin']:.4f}" if parted else "-"
        )
        counts = [str(entry[key]) for key in ("rows", "equal", "tokens", "not_argmax")]
        body.append([entry["label"], entry["mode"], *counts, where])
    return f"### Losslessness\n\n{markdown(header, body)}"


def markdown(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A Markdown table, padded to be read as it is."""
    widths = [max(map(len, column)) for column in zip(header, *body, strict=True)]
    lines = [header, ["-" * width for width in widths], *body]
    return "\n".join(
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) + " |"
        for line in lines
    )


def _number(value, form: str) -> str:
    return "-" if value is None else form.format(value)
