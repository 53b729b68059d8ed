"""The peers as samplers: absent ones say so, fakes stand in for those that want a card, and
transformers, which runs on a CPU, follows the target."""

import functools
import sys
from importlib import metadata
from types import ModuleType, SimpleNamespace

import pytest
import torch
from scipy.stats import chisquare

from src import peers
from src.contract import SamplerUnavailable
from src.peers import compat
from tests.cases import make_case
from tests.test_distribution import ALPHA

PACKAGES = {
    "flashinfer": "flashinfer-python",
    "sglang": "sglang",
    "transformers": "transformers",
    "vllm": "vllm",
}


def install(monkeypatch, package, version, **modules):
    """Pretends that `package` is installed, with these functions: module path -> {name: value}."""
    real = metadata.version
    monkeypatch.setattr(
        metadata, "version", lambda name: version if name == package else real(name)
    )
    for path, names in modules.items():
        module = ModuleType(path)
        vars(module).update(names)
        parts = path.split(".")
        for end in range(1, len(parts)):
            parent = ".".join(parts[:end])
            if parent not in sys.modules:
                monkeypatch.setitem(sys.modules, parent, ModuleType(parent))
        monkeypatch.setitem(sys.modules, path, module)


def absent(monkeypatch, package):
    def version(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", version)


@pytest.mark.parametrize("name", peers.names())
def test_a_missing_peer_says_so_with_the_command_that_installs_it(monkeypatch, name):
    package = PACKAGES[name.partition("-")[0]]
    absent(monkeypatch, package)
    with pytest.raises(SamplerUnavailable, match=f"{package} is not installed") as error:
        peers.get(name).load("cuda")
    assert error.value.command.startswith(f'pip install "{package}==')


def test_an_old_peer_a_gone_function_and_a_changed_one_are_named(monkeypatch):
    path = "flashinfer.sampling"
    install(monkeypatch, "flashinfer-python", "0.2.1", **{path: {}})
    with pytest.raises(SamplerUnavailable, match=r"is 0\.2\.1; wanted 0\.6 or later"):
        peers.get("flashinfer").load("cuda")
    install(monkeypatch, "flashinfer-python", "0.9.0.post1+cu130", **{path: {}})
    with pytest.raises(SamplerUnavailable, match="has no flashinfer.sampling.chain_spec"):
        peers.get("flashinfer").load("cuda")
    changed = {"chain_speculative_sampling": lambda draft_probs, target_probs: None}
    install(monkeypatch, "flashinfer-python", "0.9.0", **{path: changed})
    with pytest.raises(SamplerUnavailable, match="does not take draft_token_ids, generator, seed"):
        peers.get("flashinfer").load("cuda")


def test_a_peer_that_does_not_import_says_why(monkeypatch):
    install(monkeypatch, "vllm", "0.33.0")
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(SamplerUnavailable, match=r"vllm 0\.33\.0 does not import here"):
        peers.get("vllm-v1").load("cuda")


def test_an_unknown_peer_is_named():
    with pytest.raises(ValueError, match="'nothing' is not known; wanted one of transformers"):
        peers.get("nothing")


STAND_INS = {
    "flashinfer": ("flashinfer-python", "flashinfer.sampling", "chain_speculative_sampling"),
    "flashinfer-preallocated": (
        "flashinfer-python",
        "flashinfer.sampling",
        "chain_speculative_sampling",
    ),
    "sglang": (
        "sglang",
        "sglang.kernels.ops.speculative.reject_sampling",
        "chain_speculative_sampling_triton",
    ),
    "sglang-blockwise": (
        "sglang",
        "sglang.kernels.ops.speculative.dspark.blockwise_rejection",
        "blockwise_rejection_triton",
    ),
    "vllm-v1": ("vllm", "vllm.v1.sample.rejection_sampler", "rejection_sample"),
    "vllm-v2": (
        "vllm",
        "vllm.v1.worker.gpu.spec_decode.rejection_sampler_utils",
        "rejection_sample",
    ),
}
OURS = {
    "flashinfer": [compat.chain_speculative_sampling],
    "flashinfer-preallocated": [compat.chain_speculative_sampling],
    "sglang": [compat.sglang_chain_speculative_sampling],
    "sglang-blockwise": [compat.sglang_blockwise_rejection],
    "vllm-v1": [compat.vllm_rejection_sample, compat.vllm_rejection_sample_from_probs],
    "vllm-v2": [compat.vllm_v2_rejection_sample],
}


def make_rejection_noise(random_seed, device):
    """SGLang's: what its block-wise sampler draws from."""
    counter = torch.zeros(1, dtype=torch.int64, device=device)
    return SimpleNamespace(key=random_seed, counter=counter)


def stand_in(monkeypatch, name, ours):
    """Pretends that the peer `name` is installed, and that `ours` is its function."""
    package, path, function = STAND_INS[name]
    names = {function: ours, "make_rejection_noise": make_rejection_noise}
    install(monkeypatch, package, "99.0", **{path: names})


@pytest.mark.parametrize("name", OURS)
def test_a_cuda_peer_refuses_the_cpu(monkeypatch, name):
    stand_in(monkeypatch, name, OURS[name][0])
    package = name.partition("-")[0]
    with pytest.raises(SamplerUnavailable, match=f"{package} runs on cuda, not on cpu"):
        peers.get(name).load("cpu")


@pytest.mark.parametrize("name", ["flashinfer", "sglang", "vllm-v2"])
def test_a_peer_that_wants_the_drafts_distribution_refuses_a_one_hot_draft(monkeypatch, name):
    stand_in(monkeypatch, name, OURS[name][0])
    case = make_case(4, 3, 20)
    with pytest.raises(ValueError, match="the draft is one-hot; .* wants its distribution"):
        peers.get(name).load("cuda")(case["draft_token_ids"], None, case["target_probs"])


@pytest.mark.parametrize("name", ["sglang-blockwise", "vllm-v1"])
def test_a_one_hot_draft_is_accepted_at_the_targets_probability(monkeypatch, name):
    stand_in(monkeypatch, name, OURS[name][0])
    p = torch.tensor([0.7, 0.1, 0.2]).expand(4000, 2, 3)
    ids = torch.zeros(4000, 1, dtype=torch.int32)
    torch.manual_seed(7)
    output = peers.get(name).load("cuda")(ids, None, p)
    assert abs(output.num_accepted.float().mean() - 0.7) < 0.04
    assert output.token_ids.dtype == torch.int32
    assert (output.token_ids[output.num_accepted == 0, 0] != 0).all()


@pytest.mark.parametrize(
    "name, ours",
    [
        pytest.param(n, f, id=f"{n}-{f.__name__}")
        for n, functions in OURS.items()
        for f in functions
    ],
)
def test_the_adapters_layouts_bring_our_own_operator_back_unharmed(monkeypatch, name, ours):
    """Our operator stands in for the peer: layouts there and back, and the distribution."""
    stand_in(monkeypatch, name, ours)
    sample = peers.get(name).load("cuda")
    follows_the_target(sample, draws=20_000)
    if peers.get(name).reads == "logits":
        follows_the_target(from_logits(sample), draws=20_000)
    case = make_case(5, 3, 40)
    call = sample.prepare(case["draft_token_ids"], case["draft_probs"], case["target_probs"])
    first = call()
    kept = [tensor.clone() for tensor in first]
    second = call()
    assert all(map(torch.equal, first, kept)), "a later call must leave a result alone"
    assert first.token_ids.dtype == torch.int64 and first.num_accepted.dtype == torch.int32
    many = torch.stack([call().token_ids for _ in range(20)])
    assert (many != many[0]).any(), "each call must draw fresh numbers"
    assert second.token_ids.shape == (5, 4)


def logits_of(case, dtype):
    draft, target = (case[f"{side}_probs"].log().to(dtype) for side in ("draft", "target"))
    return case["draft_token_ids"], draft, target


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["sglang-blockwise", "vllm-v1", "vllm-v2"])
def test_a_peer_of_logits_is_given_them_as_they_are(monkeypatch, name, dtype):
    ours, given = OURS[name][0], {}

    @functools.wraps(ours)
    def sample(**arguments):
        given.update(arguments)
        return ours(**arguments)

    stand_in(monkeypatch, name, sample)
    ids, draft, target = logits_of(make_case(5, 3, 40), dtype)
    call = peers.get(name).load("cuda").prepare_logits(ids, draft, target)
    output = call()
    assert output.token_ids.shape == (5, 4) and output.token_ids.dtype == ids.dtype
    rows = target[:, :3] if name == "vllm-v1" else target  # V1's bonus is drawn by the caller
    assert torch.equal(given["target_logits"], rows.reshape(-1, 40))
    if name == "vllm-v1":
        assert torch.equal(given["draft_probs"], draft.float().softmax(-1).reshape(-1, 40))
    else:
        assert torch.equal(given["draft_logits"], draft)


def test_transformers_is_given_float32_logits(monkeypatch):
    def sample(
        candidate_input_ids, candidate_logits, candidate_length, new_logits, is_done_candidate
    ):
        assert candidate_logits.dtype == new_logits.dtype == torch.float32
        rows.append((candidate_logits, new_logits))
        return candidate_input_ids[:, :1], torch.tensor(0)

    rows, functions = [], {"_speculative_sampling": sample}
    install(monkeypatch, "transformers", "99.0", **{"transformers.generation.utils": functions})
    ids, draft, target = logits_of(make_case(5, 3, 40), torch.bfloat16)
    peers.get("transformers").load("cpu").prepare_logits(ids, draft, target)()
    for given, wanted in zip(zip(*rows, strict=True), (draft, target), strict=True):
        assert torch.equal(torch.cat(given), wanted.float())


def from_logits(adapter):
    """The adapter as a sampler of probabilities whose logits it is given."""
    return lambda ids, q, p: adapter.prepare_logits(ids, q.log(), p.log())()


def follows_the_target(sample, draws):
    g = torch.Generator().manual_seed(1)
    torch.manual_seed(5)
    p = torch.tensor([0.30, 0.05, 0.20, 0.02, 0.18, 0.10, 0.12, 0.03])
    q = torch.tensor([0.10, 0.25, 0.05, 0.20, 0.10, 0.10, 0.05, 0.15])
    rows = [p, p.flip(0), p.roll(3)]
    ids = torch.multinomial(q, 2 * draws, replacement=True, generator=g).reshape(draws, 2)
    output = sample(ids, q.expand(draws, 2, 8), torch.stack(rows).expand(draws, 3, 8))
    places = torch.arange(3)
    assert torch.equal(output.token_ids >= 0, places <= output.num_accepted[:, None])
    kept = places[:-1] < output.num_accepted[:, None]
    assert torch.equal(output.token_ids[:, :2][kept], ids[kept])
    for k, expected in enumerate(rows):
        emitted = output.token_ids[:, k][output.token_ids[:, k] >= 0]
        counts = torch.bincount(emitted, minlength=8).double()
        wanted = expected.double() / expected.double().sum() * counts.sum()
        assert chisquare(counts.numpy(), wanted.numpy()).pvalue > ALPHA, (k, counts)


def test_transformers_follows_the_target():
    pytest.importorskip("transformers")
    follows_the_target(peers.get("transformers").load("cpu"), draws=2500)


def test_transformers_takes_a_one_hot_draft():
    pytest.importorskip("transformers")
    case = make_case(4, 3, 20)
    output = peers.get("transformers").load("cpu")(
        case["draft_token_ids"], None, case["target_probs"]
    )
    assert output.token_ids.shape == (4, 4) and output.token_ids.max() < 20


@pytest.mark.gpu
@pytest.mark.parametrize("name", peers.names())
def test_an_installed_peer_follows_the_target_on_a_gpu(name):
    try:
        sample = peers.get(name).load("cuda")
    except SamplerUnavailable as error:
        pytest.skip(str(error))

    def there(*tensors):
        output = sample(*(tensor.cuda().contiguous() for tensor in tensors))
        return type(output)(*(tensor.cpu() for tensor in output))

    follows_the_target(there, draws=2000 if name == "transformers" else 40_000)
