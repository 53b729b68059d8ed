import ast
from pathlib import Path

import pytest
import torch

from src import samplers
from src.contract import validate
from tests.cases import make_case

ROOT = Path(__file__).resolve().parent.parent
ALLOWED = {
    "contract": set(),
    "philox": {"contract"},
    "oracle": {"contract"},
    "randomness": {"contract"},
    "baseline": {"contract", "randomness"},
    "compiled": {"contract", "randomness"},
    "cuda": {"contract", "randomness"},
    "decoding": {"contract", "from_logits", "randomness", "samplers"},
    "peers": {"contract", "cuda", "oracle", "randomness"},
    "samplers": {"baseline", "compiled", "contract", "cuda"},
    "from_logits": {"compiled", "contract", "cuda", "samplers"},
    "benchmarking": {"contract", "cuda", "decoding", "from_logits", "oracle", "peers", "philox"}
    | {"samplers"},
}
SCRIPTS_MAY_IMPORT = {"benchmarking", "decoding", "samplers"}


def test_imports_point_one_way():
    scripts = [(path, None, SCRIPTS_MAY_IMPORT) for path in ROOT.glob("*.py")]
    library = []
    for path in (ROOT / "src").rglob("*.py"):
        unit = path.relative_to(ROOT / "src").parts[0].removesuffix(".py")
        if unit != "__init__":
            library.append((path, unit, ALLOWED[unit]))
    for path, unit, allowed in scripts + library:
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.ImportFrom):
                module = node.module or ""
                names = [f"{module}.{a.name}" if module == "src" else module for a in node.names]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            for name in names:
                if name.startswith("src.") and name.split(".")[1] != unit:
                    assert name.split(".")[1] in allowed, f"{path.name} imports {name}"


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"draft_token_ids": torch.zeros(2, 3)}, TypeError, "draft_token_ids has dtype"),
        ({"target_probs": torch.zeros(2, 3, 5)}, ValueError, r"target_probs .* wanted \[2, 4, 5\]"),
        ({"draft_probs": torch.zeros(2, 3, 5).half()}, TypeError, "draft_probs has dtype"),
        ({"draft_probs": torch.zeros(2, 3, 6)}, ValueError, r"draft_probs .* wanted \[2, 3, 5\]"),
        ({"uniforms": torch.zeros(2, 3)}, ValueError, r"uniforms .* wanted \[2, 4\]"),
        ({"seeds": torch.zeros(2).long()}, ValueError, "seeds came without offsets"),
        ({"generator": torch.Generator()}, ValueError, "uniforms and generator were given"),
        ({"num_draft_tokens": torch.zeros(2).long()}, TypeError, "num_draft_tokens has dtype"),
        ({"target_probs": [1.0]}, TypeError, "target_probs is a list"),
    ],
)
def test_a_bad_argument_is_named(change, error, message):
    with pytest.raises(error, match=message):
        validate(**{**make_case(2, 3, 5), **change})


def test_an_unknown_sampler_is_named_with_the_known_ones():
    with pytest.raises(ValueError, match="'fast' is not known; wanted one of baseline, vectorized"):
        samplers.get("fast")
