"""What a result looks like, by the script that made it: its table, a brief one, its sentences."""

from __future__ import annotations

from collections.abc import Callable

from src.benchmarking import compare
from src.benchmarking.losslessness_tables import (
    losslessness_table,
    losslessness_words,
    soak_table,
    soak_words,
)
from src.benchmarking.profile_tables import profile_brief, profile_table
from src.benchmarking.profile_tables import words as words_of_profile
from src.benchmarking.tables import (
    batch_table,
    bullets,
    conditions,
    method_table,
    notes,
    vocab_brief,
    vocab_table,
)
from src.benchmarking.target_tables import (
    kernel_brief,
    kernel_table,
    kernel_words,
    logits_brief,
    logits_table,
    logits_words,
)
from src.decoding import tables as decoding_tables


def table(result: dict) -> str:
    """The Markdown table of a result, by its script."""
    return _TABLES.get(result["script"], method_table)(result)


def document(result: dict) -> str:
    """The .md beside a result's .json: the machine, the table, the rows with something to say."""
    env = result["environment"]
    lines = [f"# {result['script']}", "", conditions(result), "", table(result)]
    said = [*compare.repeated(env), *notes(result["rows"])]
    return "\n".join([*lines, *bullets(said), "", f"    {env['command']}", ""])


_TABLES: dict[str, Callable[[dict], str]] = {
    "quick_demo": method_table,
    "test_batch_sizes": batch_table,
    "compare_vocab_sizes": vocab_table,
    "kernel": kernel_table,
    "from_logits": logits_table,
    "profile_rejection_sampling": profile_table,
    "demo_with_real_llm": lambda result: decoding_tables.tables(result["rows"]),
    "losslessness": losslessness_table,
    "soak": soak_table,
}


_WORDS: dict[str, Callable[[dict], list[str]]] = {
    "kernel": kernel_words,
    "from_logits": logits_words,
    "profile_rejection_sampling": words_of_profile,
    "losslessness": losslessness_words,
    "soak": soak_words,
}


_BRIEF: dict[str, Callable[[dict], str]] = {
    "compare_vocab_sizes": vocab_brief,
    "kernel": kernel_brief,
    "from_logits": logits_brief,
    "profile_rejection_sampling": profile_brief,
}


def brief(result: dict) -> str:
    """The table, or what the README shows of one that is long."""
    return _BRIEF.get(result["script"], table)(result)


# Of many results of one script, in one table.
SUMMARIES = {"demo_with_real_llm": decoding_tables.summary}


def words(result: dict) -> list[str]:
    """What a result's numbers come to in sentences, for the scripts that say so."""
    return _WORDS.get(result["script"], lambda result: [])(result)
