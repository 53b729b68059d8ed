"""The demo, from its options to its files, on models that any machine runs."""

import argparse

import pytest
import torch
from transformers import PreTrainedTokenizerFast

import demo_with_real_llm as demo
from src.benchmarking import environment, results
from src.decoding import models, options, tables
from src.decoding.methods import Comparison, Method, Settings
from src.decoding.prompts import Prompt
from src.decoding.speculative import Generation, Stats
from tests.tiny import llama, relative

PROMPTS = [Prompt(1, "code", "a b a b a"), Prompt(2, "math", "b a a"), Prompt(3, "math", "a")]


class _Tokenizer:
    """Two words and an end, all that a tiny model with random weights needs."""

    chat_template = None
    eos_token_id = 60

    def encode(self, text):
        return [1 + (word == "b") for word in text.split()]

    def decode(self, ids, skip_special_tokens=True):
        return " ".join(map(str, ids))


def comparison(draft=None, **settings):
    draft = relative(0) if draft is None else draft
    pair = models.Pair("tiny", llama(0), draft, _Tokenizer(), "tiny")
    settings = {"spec_lengths": [3], "max_new_tokens": 8, "runs": 1, "modes": ["eager"], **settings}
    return Comparison(pair, PROMPTS, Settings(**settings))


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_every_method_has_a_row_for_each_category_and_one_over_all(temperature):
    rows = comparison(temperature=temperature, top_p=0.95).run()
    assert [row["prompt_category"] for row in rows[:3]] == ["code", "math", "all"]
    ok = {row["method"] for row in rows if row["status"] == "ok"}
    assert {"plain", "baseline", "vectorized", "transformers", "transformers-assisted"} <= ok
    for row in rows:
        if row["status"] == "ok":
            assert row["tokens_per_s"] == pytest.approx(row["tokens"] / row["seconds"])
            assert row["speedup_vs"] == "plain eager"
    fast = next(row for row in rows if row["method"] == "vectorized")
    assert len(fast["acceptance_by_position"]) == 3 and fast["mean_accepted_length"] > 1
    assert "1. No Spec Decode" in tables.tables(rows) and tables.insights(rows)


def test_graphed_methods_on_a_cpu_are_skipped_with_their_reason():
    rows = comparison(modes=["graphed"]).run()
    assert {row["status"] for row in rows} == {"skipped"}
    assert "Skipped: graphed mode wants a CUDA device" in tables.tables(rows)


def test_a_wrong_sampler_has_a_failed_row_and_no_speedup(monkeypatch):
    def always(draft_token_ids, draft_probs, target_probs, **random):
        from src.compiled.rejection_sampler import rejection_sample

        output = rejection_sample(draft_token_ids, draft_probs, target_probs, **random)
        if draft_token_ids.shape[1] == 0:
            return output
        return output._replace(token_ids=(output.token_ids + 1) % 60)

    from src.baseline import rejection_sampler

    monkeypatch.setattr(rejection_sampler, "rejection_sample", always)
    row = next(row for row in comparison().run() if row["method"] == "baseline")
    assert row["status"] == "failed" and row["speedup"] is None
    assert "greedy tokens are not the argmax" in row["reason"]


def test_the_verification_asked_for_reaches_the_samplers_that_have_it(monkeypatch):
    from src.compiled import rejection_sampler

    own, seen = rejection_sampler.rejection_sample, []

    def spy(*arguments, verification="token", **random):
        seen.append(verification)
        return own(*arguments, verification=verification, **random)

    monkeypatch.setattr(rejection_sampler, "rejection_sample", spy)
    rows = comparison(temperature=0.9, verification="block").run()
    assert set(seen) == {"block"} and {row["verification"] for row in rows} == {"block"}
    reasons = {row["method"]: row["reason"] for row in rows}
    assert reasons["baseline"] == "it has no block verification" and not reasons["vectorized"]


def test_batches_mix_categories_that_do_not_fill_them_and_the_peer_takes_one_prompt():
    compared = comparison(batch_size=2)
    assert [name for name, _ in compared.batches] == ["mixed", "mixed"]
    assert [[p.question_id for p in batch] for _, batch in compared.batches] == [[1, 2], [3]]
    rows = compared.run()
    assisted = next(row for row in rows if row["method"] == "transformers-assisted")
    assert "--batch-size 1" in assisted["reason"]
    assert sum(row["tokens"] for row in rows if row["method"] == "plain") > 0
    # "auto" measures over the mixed batches, which are no prompt's category.
    auto = comparison(batch_size=2, spec_lengths=[1, "auto"]).run()
    assert [row["status"] for row in auto] == ["ok"] * len(auto)


def test_auto_measures_the_spec_length_and_falls_back_to_plain(monkeypatch):
    compared = comparison(spec_lengths=["auto"])
    fast = Method("vectorized", "", "eager", "auto")
    monkeypatch.setattr("src.decoding.spec_length.choose", lambda seconds: 2)
    assert compared.spec_length(fast, "code") == 2
    monkeypatch.setattr("src.decoding.spec_length.choose", lambda seconds: 0)
    assert compared.spec_length(fast, "math") == 0
    generated = compared.generate(fast, compared.batches[1][1])
    assert generated.stats.drafted == [], "nothing is drafted where nothing pays"


@pytest.mark.parametrize("slow, best", [((), 3), ((3,), 4), ((2, 3, 4), 0)])
def test_auto_tries_the_lengths_that_should_be_best_and_takes_the_fastest(monkeypatch, slow, best):
    """Two tokens cost more than one, and three no more. slow: lengths that turn out worse."""
    # Rounds of Llama-3.2 shapes on an H100: a plain step 2.64 ms, a verify forward 3.33.
    times = {0: 2.64} | {k: 4.81 + (k - 1) * 1.045 for k in range(1, 17)}
    accepted = [round(1000 * 0.8**k) for k in range(1, 17)]
    tried = []

    def measure(self, method, length, batches, profile=False):
        tried.append(length)
        emitted = 1000 + sum(accepted[:length])
        stats = Stats(rounds=1000, steps=1000, tokens=emitted, accepted=accepted[:length])
        seconds = times[length]
        if profile:
            stats.seconds = {"draft": seconds}
        elif length in slow:
            seconds *= 1.5
        return [Generation([], seconds, 0.0, stats)]

    monkeypatch.setattr(Comparison, "_measure", measure)
    compared = comparison(spec_lengths=["auto"])
    assert compared.spec_length(Method("vectorized", "", "eager", "auto"), "code") == best
    assert tried == [0, 1, 8, 0, 3, 4, 2]


def test_several_spec_lengths_run_the_fastest_sampler_at_each(monkeypatch):
    monkeypatch.setattr("src.decoding.spec_length.choose", lambda seconds: 3)
    rows = comparison(spec_lengths=[1, 3, "auto"]).run()
    ran = [row for row in rows if row["status"] == "ok" and row["prompt_category"] == "all"]
    assert [row["spec_length"] for row in ran] == [0, 1, 3, 3]
    assert {row["method"] for row in ran[1:]} == {"cpp"} and len({r["label"] for r in ran}) == 4
    for row in ran[1:]:
        assert row["expected_speedup"] > 0 and 0 < row["model_share"] < 1
    assert "K auto" in tables.tables(rows) and "S(K)" in tables.tables(rows)


@pytest.mark.parametrize("text", ["", "0", "2-1", "1,1", "fast", "1-"])
def test_a_bad_spec_length_is_refused(text):
    with pytest.raises((argparse.ArgumentTypeError, ValueError)):
        options.spec_lengths(text)
    assert options.spec_lengths("1-3,8,auto") == (1, 2, 3, 8, "auto")


def test_greedy_text_is_reported_equal_to_plain_decoding():
    report = comparison(batch_size=2).check_lossless()
    ran = [entry for entry in report if "skipped" not in entry]
    assert ran and all(entry["equal"] == entry["rows"] == 2 for entry in ran)
    assert all(entry["not_argmax"] == 0 and not entry["divergences"] for entry in ran)
    assert "Equal to plain" in tables.lossless(report)


def test_the_stream_shows_the_whole_text():
    shown = []
    comparison().stream(lambda text, **options: shown.append(text))
    assert "plain decoding" in shown[0] and any("a round)" in text for text in shown)


@pytest.mark.parametrize("draft", ["synthetic:tiny", "prompt-lookup"])
def test_the_script_writes_its_results(draft, tmp_path, capsys):
    arguments = ["--smoke", "--device", "cpu", "--output", str(tmp_path), "--spec-length", "4"]
    if draft == "prompt-lookup":
        llama(0).save_pretrained(tmp_path / "target")
        _saved_tokenizer().save_pretrained(tmp_path / "target")
        arguments += ["--target", str(tmp_path / "target"), "--check-lossless", "--stream"]
    else:
        arguments += ["--pair", draft]
    assert demo.main(arguments) == 0
    path = results.folder(tmp_path, "cpu") / "demo_with_real_llm-smoke.json"
    names = [path.with_suffix(suffix).name for suffix in (".json", ".md", ".png")]
    assert sorted(p.name for p in path.parent.iterdir()) == names, "no temporary file is left"
    result = results.load(path)
    assert result["script"] == "demo_with_real_llm"
    env = result["environment"]
    assert env["device"] == environment.device_name("cpu")
    assert env["commit"] == environment.source_version()[0]
    assert env["command"].startswith("python demo_with_real_llm.py --smoke --device cpu --output ")
    assert str(tmp_path) not in path.read_text(), "results are published"
    assert {row["synthetic"] for row in result["rows"]} == {draft != "prompt-lookup"}
    document = path.with_suffix(".md").read_text()
    assert "Method" in document and environment.machine_line(env) in document
    assert "Key Insights" in capsys.readouterr().out


def test_the_result_of_another_commit_is_kept_unless_it_may_be_replaced(
    monkeypatch, tmp_path, capsys
):
    arguments = ["--smoke", "--device", "cpu", "--output", str(tmp_path), "--spec-length", "2"]
    arguments += ["--pair", "synthetic:tiny"]
    path = results.folder(tmp_path, "cpu") / "demo_with_real_llm-smoke.json"
    path.parent.mkdir()
    earlier = results.dumps(results.make(demo.SCRIPT, {"commit": "a" * 40}, []))
    path.write_text(earlier)
    with monkeypatch.context() as context:
        context.setattr(models, "load", lambda *args, **options: pytest.fail("a model was loaded"))
        with pytest.raises(SystemExit) as stop:
            demo.main(arguments)
    assert stop.value.code == 2 and path.read_text() == earlier
    assert "was recorded at commit aaaaaaaaaaaa" in (error := capsys.readouterr().err)
    assert error.endswith("replace it with --overwrite\n")
    assert demo.main([*arguments, "--overwrite"]) == 0
    assert results.load(path)["rows"]


def _saved_tokenizer():
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers.models import WordLevel

    tokenizer = Tokenizer(WordLevel({"a": 1, "the": 2, "[UNK]": 3}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def test_a_missing_model_is_one_message_and_status_2(monkeypatch, tmp_path, capsys):
    def unavailable(*args, **options):
        raise models.ModelUnavailable("X is gated", ["hf auth login", "hf download X"])

    monkeypatch.setattr(models, "load", unavailable)
    assert demo.main(["--pair", "llama", "--device", "cpu", "--output", str(tmp_path)]) == 2
    assert capsys.readouterr().err == "X is gated\n  hf auth login\n  hf download X\n"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--pair", "gpt"], "pair 'gpt' is not known"),
        (["--draft", "x"], "--draft came without --target"),
        (["--spec-length", "0"], "--spec-length: wanted an integer of at least 1, got '0'"),
        (["--pair", "synthetic:tiny", "--modes", "fast"], "mode 'fast' is not known; wanted eager"),
        (["--pair", "synthetic:tiny", "--category", "poems"], "category 'poems' is not in"),
    ],
)
def test_a_bad_option_is_named(arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit):
        demo.main([*arguments, "--device", "cpu", "--output", str(tmp_path)])
    assert message in capsys.readouterr().err


def test_sampling_settings_reach_both_distributions():
    compared = comparison(temperature=0.5, top_k=3)
    probs = compared.distribution(torch.randn(1, 2, 61))
    assert (probs > 0).sum(-1).tolist() == [[3, 3]]
