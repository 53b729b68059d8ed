"""Three plots of a comparison in one picture: speed, acceptance by position, where time goes."""

from __future__ import annotations

import io
from collections.abc import Sequence

from src.decoding.tables import overall

_PHASES = ("draft", "verify", "sample")


def picture(rows: Sequence[dict], title: str) -> bytes | None:
    """A PNG, or None where no method ran."""
    rows = [row for row in overall(rows) if row["status"] == "ok"]
    if not rows:
        return None
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (speed, acceptance, split) = pyplot.subplots(1, 3, figsize=(18, 5))
    _bars(speed, rows)
    _acceptance(acceptance, rows)
    _split(split, [row for row in rows if row["verify_s"] is not None])
    figure.suptitle(title)
    figure.tight_layout()
    png = io.BytesIO()
    figure.savefig(png, dpi=120)
    pyplot.close(figure)
    return png.getvalue()


def _name(row: dict) -> str:
    return f"{row['label']}\n{row['mode']}"


def _bars(axes, rows) -> None:
    bars = axes.barh([_name(row) for row in rows], [row["tokens_per_s"] for row in rows])
    axes.bar_label(bars, fmt="%.0f", padding=2)
    axes.margins(x=0.12)
    axes.invert_yaxis()
    axes.set_xlabel("tokens/s")
    axes.tick_params(axis="y", labelsize=7)


def _acceptance(axes, rows) -> None:
    # Greedy samplers agree and sampled ones differ by chance: one line a mode says it all, that of
    # the longest drafts. Lengths that differ between categories would mix these by position.
    rows = [row for row in rows if row["acceptance_by_position"]]
    rows = [row for row in rows if row["spec_length"] != "auto"] or rows
    drawn = {
        row["mode"]: row for row in sorted(rows, key=lambda row: len(row["acceptance_by_position"]))
    }
    for mode, row in drawn.items():
        shares = row["acceptance_by_position"]
        axes.plot(range(1, len(shares) + 1), shares, marker="o", label=mode)
    axes.set(xlabel="draft position", ylabel="accepted / drafted", ylim=(0, 1.05))
    if drawn:
        axes.legend()


def _split(axes, rows) -> None:
    left = [0.0] * len(rows)
    for phase in _PHASES:
        widths = [row[f"{phase}_s"] for row in rows]
        axes.barh([_name(row) for row in rows], widths, left=left, label=phase)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.invert_yaxis()
    axes.set_xlabel("seconds a generation")
    axes.tick_params(axis="y", labelsize=7)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(_PHASES), frameon=False)
