from collections import Counter

import pytest

from src.decoding import prompts


def test_there_are_eight_categories_of_five_prompts_each():
    own = prompts.read()
    assert list(Counter(prompt.category for prompt in own).values()) == [5] * 8
    assert len({prompt.text for prompt in own}) == len({prompt.question_id for prompt in own}) == 40


def test_a_category_can_be_picked_and_an_unknown_one_is_named():
    assert {prompt.category for prompt in prompts.read(categories=["code", "edit"])} == {
        "code",
        "edit",
    }
    with pytest.raises(ValueError, match="category 'poems' is not in .*; wanted code, math"):
        prompts.read(categories=["poems"])


def test_a_bad_line_is_named_by_its_number(tmp_path):
    file = tmp_path / "prompts.jsonl"
    good = '{"question_id": 81, "category": "writing", "turns": ["a", "b"]}\n'
    file.write_text(good)
    assert prompts.read(file) == [prompts.Prompt(81, "writing", "a")]
    file.write_text(good + '\n{"question_id": 82, "turns": []}\n')
    with pytest.raises(ValueError, match="line 3: wanted question_id, category and turns"):
        prompts.read(file)
