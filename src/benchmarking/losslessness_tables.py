"""The tables of the distribution and soak runs, and what they come to in words."""

from __future__ import annotations

from src.benchmarking.tables import bullets, markdown

_TESTS = {
    "first": "first token",
    "second": "second",
    "later": "later",
    "first two": "first two",
    "calls": "calls",
    "rows": "rows",
}


def count_tests(rows: list[dict]) -> int:
    return sum(len(row["tests"]) for row in rows if row.get("tests"))


def losslessness_table(result: dict) -> str:
    """A line a sampler, source, verification and vocabulary; then a line a row of the result."""
    rows = result["rows"]
    headers = ["Method", "From", "Verification", "Vocab Size", "Draws", "Least p", "TV / chance"]
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        key = (row["label"], row["source"], row["verification"], row["vocab_size"])
        groups.setdefault(key, []).append(row)
    body = []
    for (label, source, verification, vocab_size), mine in groups.items():
        judged = [row for row in mine if row["least_p"] is not None]
        states = [row["status"] for row in mine]
        verdict = next((s for s in ("failed", "skipped") if s in states), "lossless")
        draws = sum(row["draws"] for row in judged)
        least = min((row["least_p"] for row in judged), default=None)
        body.append(
            [label, source, verification, vocab_size, f"{draws:,}"]
            + [_p(least), _range([_tv_ratio(row) for row in judged]), verdict]
        )
    whole = markdown(body, [*headers, "Verdict"])
    headers = ["Method", "From", "Verification", "K", "Vocab Size", "Draws", "chi2 / dof"]
    headers += ["TV (expected by chance)", *(f"p {title}" for title in _TESTS.values())]
    body = []
    for row in rows:
        tests = row["tests"] or {}
        first = tests.get("first")
        chi2 = tv = "-"
        if first:
            chi2 = f"{first['chi2']:.1f} / {first['dof']}"
            tv = f"{first['tv']:.2e} ({first['tv_expected']:.2e} ± {first['tv_sigma']:.1e})"
        body.append(
            [row["label"], row["source"], row["verification"], row["spec_length"]]
            + [row["vocab_size"], "-" if row["draws"] is None else f"{row['draws']:,}", chi2, tv]
            + [_p(tests[name]["p"]) if name in tests else "-" for name in _TESTS]
        )
    every = markdown(body, headers)
    words = "\n".join(bullets(losslessness_words(result))).lstrip("\n")
    return "\n\n".join([whole, words, every])


def losslessness_words(result: dict) -> list[str]:
    rows = result["rows"]
    judged = [row for row in rows if row["least_p"] is not None]
    if not judged:
        return ["Nothing was judged."]
    tests = count_tests(rows)
    alpha = result["environment"].get("alpha", 0.01)
    least = min(row["least_p"] for row in judged)
    failed = [row for row in rows if row["status"] == "failed"]
    draws = [row["draws"] for row in judged]
    said = [
        f"{tests} chi-square tests over {len(judged)} rows, {sum(draws):,} draws in all; "
        f"{min(draws):,} in the smallest row, {max(draws):,} in the largest.",
        f"Least p-value {least:.2g}; after Bonferroni over the table {min(1.0, least * tests):.2g} "
        f"(a row fails below {alpha:g}).",
    ]
    said.append(f"{len(failed)} rows failed." if failed else "No row departs from its target.")
    return said


def _tv_ratio(row: dict) -> float | None:
    first = row["tests"].get("first")
    return first["tv"] / first["tv_expected"] if first else None


def _range(values: list) -> str:
    values = [value for value in values if value is not None]
    return f"{min(values):.2f} to {max(values):.2f}" if values else "-"


def _p(value: float | None) -> str:
    return "-" if value is None else f"{value:.2g}"


def soak_table(result: dict) -> str:
    headers = ["Method", "Calls", "Checks", "Wrong", "Minutes", "us a call", "Memory", "Status"]
    body = [
        [row["label"], f"{row['calls']:,}", f"{row['checks']:,}", row["wrong"]]
        + [f"{row['seconds'] / 60:.1f}", f"{row['us_per_call']:.1f}"]
        + ["flat" if row["flat"] else "grew", row["status"]]
        if row["calls"]
        else [row["label"], "-", "-", "-", "-", "-", "-", row["status"]]
        for row in result["rows"]
    ]
    return "\n".join([markdown(body, headers), *bullets(soak_words(result))])


def soak_words(result: dict) -> list[str]:
    said = []
    for row in result["rows"]:
        if not row["calls"]:
            continue
        shares = ", ".join(f"{name} {count:,}" for name, count in row["kinds"].items())
        said.append(f"{row['label']}: calls by kind: {shares}.")
        for name, growth in row["growth_mib"].items():
            said.append(f"{name.replace('_', ' ')}: {growth:+.2f} MiB from first to last.")
    return said
