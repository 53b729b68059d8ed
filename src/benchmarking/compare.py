"""Faster, slower or the same as an earlier result: by interval, not by point."""

from __future__ import annotations

# Two runs of the same code differ by this much from clocks and temperature alone.
DRIFT = 0.03
_KEY = ("sampler", "workload", "batch_size", "spec_length", "vocab_size", "dtype", "acceptance")
_CLOCKS = {"latency_us": "latency", "gpu_us": "GPU time"}


def change(old: dict, new: dict, least: float = DRIFT) -> str:
    """ "faster", "slower" or "same" for two summaries (median, p10, p90).

    Same where the intervals p10-p90 overlap or the medians differ by less than `least`, a share.
    """
    overlap = new["p10"] <= old["p90"] and old["p10"] <= new["p90"]
    if overlap or difference(old, new) < least:
        return "same"
    return "slower" if new["median"] > old["median"] else "faster"


def difference(old: dict, new: dict) -> float:
    """How far apart two medians are, as a share of the smaller one."""
    low, high = sorted((old["median"], new["median"]))
    return high / low - 1


def repeat(rows: list[dict], again: list[dict]) -> dict[str, float]:
    """The largest difference by clock between two runs of the same thing, whose rows correspond.
    Sets each row's `repeated` to its own differences."""
    worst: dict[str, float] = {}
    for row, other in zip(rows, again, strict=True):
        both = {clock for clock in _CLOCKS if row[clock] and other[clock]}
        row["repeated"] = {c: round(difference(row[c], other[c]), 4) for c in sorted(both)}
        for clock, share in row["repeated"].items():
            worst[clock] = max(share, worst.get(clock, 0.0))
    return worst


def repeated(environment: dict) -> list[str]:
    """A sentence on the runs that `repeat` compared; nothing where there was one run."""
    worst = environment.get("repeatability") or {}
    parts = [f"{100 * share:.1f} % ({_CLOCKS[clock]})" for clock, share in worst.items()]
    if not parts:
        return []
    return [f"Two runs of the same thing differed by at most {' and '.join(parts)}."]


def least_difference(*rows: dict, clock: str) -> float:
    """Below this share two rows do not differ: DRIFT, or what two runs of one of them showed."""
    return max([DRIFT, *((row.get("repeated") or {}).get(clock, 0.0) for row in rows)])


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
                least = least_difference(before, row, clock=clock)
                what = f"{change(was, now, least)}, {_interval(was)} then, {_interval(now)} now"
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
