"""Faster, slower or the same as an earlier result: by interval, not by point."""

from __future__ import annotations

# Two runs of the same code differ by this much from clocks and temperature alone.
DRIFT = 0.03
_KEY = ("sampler", "workload", "batch_size", "spec_length", "vocab_size", "dtype", "acceptance")
_CLOCKS = {"latency_us": "latency", "gpu_us": "GPU time"}


def change(old: dict, new: dict) -> str:
    """ "faster", "slower" or "same" for two summaries (median, p10, p90).

    Same where the intervals p10-p90 overlap or the medians differ by less than DRIFT.
    """
    overlap = new["p10"] <= old["p90"] and old["p10"] <= new["p90"]
    if overlap or abs(new["median"] / old["median"] - 1) < DRIFT:
        return "same"
    return "slower" if new["median"] > old["median"] else "faster"


def lines(old: dict, new: dict) -> list[str]:
    """A line for each row of `new` and clock: what changed since `old`, both result files."""
    earlier = {_key(row): row for row in old["rows"]}
    found = []
    if old["environment"]["device"] != new["environment"]["device"]:
        devices = [result["environment"]["device"] for result in (old, new)]
        found.append("another device: {} then, {} now".format(*devices))
    for row in new["rows"]:
        name = f"{row['label']}, batch {row['batch_size']}, vocab {row['vocab_size']}"
        before = earlier.get(_key(row))
        for clock, title in _CLOCKS.items():
            if before is None or not (row[clock] or before[clock]):
                continue
            was, now = before[clock], row[clock]
            if was and now:
                what = f"{change(was, now)}, {_interval(was)} then, {_interval(now)} now"
            else:
                then, today = ("ok" if r[clock] else r["status"] for r in (before, row))
                what = f"cannot be compared: {then} then, {today} now"
            found.append(f"{name}: {title} {what}")
        if before is None:
            found.append(f"{name}: not in the earlier result")
    return found


def _interval(clock: dict) -> str:
    return f"{clock['median']:.1f} us ({clock['p10']:.1f}-{clock['p90']:.1f}, n {clock['n']})"


def _key(row: dict) -> tuple:
    return tuple(row.get(field) for field in _KEY)
