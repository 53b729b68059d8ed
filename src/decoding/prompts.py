"""Prompts in Spec-Bench's format: JSON lines with question_id, category and turns."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

OWN = Path(__file__).resolve().parents[2] / "prompts" / "prompts.jsonl"


class Prompt(NamedTuple):
    question_id: int | str
    category: str
    text: str  # the first turn


def read(path: Path | str = OWN, categories: Sequence[str] = ()) -> list[Prompt]:
    """The prompts of a file, of the given categories or of all.

    Raises ValueError for a line without the three keys or without a turn, by its number, and for
    a category that no prompt has.
    """
    prompts = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            prompt = Prompt(record["question_id"], record["category"], record["turns"][0])
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise ValueError(
                f"{path}, line {number}: wanted question_id, category and turns ({error!r})"
            ) from error
        prompts.append(prompt)
    known = list(dict.fromkeys(prompt.category for prompt in prompts))
    for category in categories:
        if category not in known:
            raise ValueError(f"category {category!r} is not in {path}; wanted {', '.join(known)}")
    return [prompt for prompt in prompts if not categories or prompt.category in categories]


def first(prompts: Sequence[Prompt], count: int | None) -> list[Prompt]:
    """The first `count` prompts of each category; None is all."""
    seen, kept = {}, []
    for prompt in prompts:
        seen[prompt.category] = seen.get(prompt.category, 0) + 1
        if count is None or seen[prompt.category] <= count:
            kept.append(prompt)
    return kept
