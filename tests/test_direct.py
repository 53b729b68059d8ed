"""The extension's direct calls: the operators' results and errors without the dispatcher, and only
where the dispatcher would do nothing but find the kernel."""

import sys
import threading
import weakref
from contextlib import contextmanager

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from src import samplers
from src.contract import SampledTokens, SamplerOutput
from src.cuda import fused_sampler
from src.cuda.from_logits import sample_from_logits
from tests.cases import flatten, make_case, make_logits_case, ragged

on_both_devices = pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
)
RESULTS = {
    "rejection_sample": SamplerOutput,
    "rejection_sample_out": None,
    "rejection_sample_flattened": SamplerOutput,
    "rejection_sample_from_logits": SamplerOutput,
    "sample_from_logits": SampledTokens,
}
on_every_operator = pytest.mark.parametrize("name", RESULTS)
UNIFORMS, GENERATOR = 4, 7  # places among the arguments of rejection_sample


def direct(name):
    return fused_sampler._MODULE.direct(name, RESULTS[name])


def arguments_of(name, device="cpu"):
    """The operator's arguments, all of them."""
    case, logits = make_case(3, 4, 600), make_logits_case(3, 4, 600)
    ids, target, draft, uniforms = logits.values()
    padded = [case["draft_token_ids"], case["draft_probs"], case["target_probs"], None]
    padded += [case["uniforms"], None, None, None, False]
    arguments = {
        "rejection_sample": padded,
        "rejection_sample_out": [*padded, case["draft_token_ids"].new_empty(3, 5)],
        "rejection_sample_flattened": [
            *flatten(ragged(make_case(7, 5, 100))).values(),
            *(None, None, None, True),
        ],
        "rejection_sample_from_logits": [ids, target, draft, None, None, torch.ones(3)]
        + [None, None, None, None, uniforms, None, None, None, False],
        "sample_from_logits": [target[:, 0], torch.ones(3)]
        + [None, None, None, uniforms[:, 0], None, None, None],
    }[name]
    if name == "rejection_sample_out":
        arguments.append(torch.empty(3, dtype=torch.int32))
    return [value.to(device) if isinstance(value, torch.Tensor) else value for value in arguments]


@on_both_devices
@on_every_operator
def test_a_direct_call_gives_the_operators_result(name, device):
    arguments = arguments_of(name, device)
    expected = fused_sampler.operator(name)(*arguments)
    if name == "rejection_sample_out":
        expected = [tensor.clone() for tensor in arguments[-2:]]
        output = [torch.full_like(tensor, -77) for tensor in expected]
        assert direct(name)(*arguments[:-2], *output) is True
    else:
        output = direct(name)(*arguments)
        assert type(output) is RESULTS[name]
        assert output == RESULTS[name](*output) and hash(output) == hash(RESULTS[name](*output))
    for ours, theirs in zip(output, expected, strict=True):
        assert torch.equal(ours, theirs) and ours.dtype == theirs.dtype
        assert not ours.requires_grad and ours._version == theirs._version


@on_both_devices
def test_a_direct_call_draws_the_operators_numbers_from_a_generator(device):
    arguments = arguments_of("rejection_sample", device)
    arguments[UNIFORMS] = None
    draws = []
    for call in (direct("rejection_sample"), fused_sampler.operator("rejection_sample")):
        torch.manual_seed(3)
        draws.append([call(*arguments)[0] for _ in range(3)])
        arguments[GENERATOR] = torch.Generator(device).manual_seed(3)
        draws[-1] += [call(*arguments)[0] for _ in range(3)]
        arguments[GENERATOR] = None
    assert all(torch.equal(*pair) for pair in zip(*draws, strict=True))
    assert not torch.equal(draws[0][0], draws[0][1])
    assert all(torch.equal(draws[0][i], draws[0][i + 3]) for i in range(3))


@on_both_devices
@on_every_operator
def test_a_direct_call_raises_the_operators_errors(name, device):
    good = arguments_of(name, device)
    raised = 0
    for place, value in enumerate(good):
        if not isinstance(value, torch.Tensor):
            continue
        for bad in (value[None], value.to(torch.complex64), value[:0]):
            arguments = [*good[:place], bad, *good[place + 1 :]]
            errors = []
            for call in (direct(name), fused_sampler.operator(name)):
                try:
                    call(*arguments)
                except (TypeError, ValueError, RuntimeError) as error:
                    errors.append((type(error), str(error)))
            assert len(errors) != 1 and len(set(errors)) <= 1, errors
            raised += len(errors)
    assert raised > 8


@contextmanager
def seeing(mode):
    """The mode, with the operators that came through it in `seen`."""

    class Mode(mode):
        seen = []

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.seen.append(function)
            return function(*args, **(kwargs or {}))

        __torch_function__ = __torch_dispatch__

    with Mode() as entered:
        yield entered.seen


@pytest.mark.parametrize("mode", [TorchDispatchMode, TorchFunctionMode])
@on_every_operator
def test_a_mode_sees_the_operator(name, mode):
    arguments = arguments_of(name)
    call = fused_sampler.caller(name, None, RESULTS[name])
    with seeing(mode) as seen:
        assert direct(name)(*arguments) is None
        assert not seen
        output = call(*arguments)
    assert seen == [fused_sampler.operator(name)]
    assert output is True or type(output) is RESULTS[name]
    assert direct(name)(*arguments) is not None


def test_a_sampler_under_a_mode_emits_its_tokens():
    case = make_case(3, 4, 600)
    sample = samplers.get("cpp").load()
    expected = sample(**case)
    out = SamplerOutput(*(torch.empty_like(tensor) for tensor in expected))
    for mode in (TorchDispatchMode, TorchFunctionMode):
        with seeing(mode) as seen:
            outputs = sample(**case), sample(**case, out=out)
        assert len(seen) == 2
        for output in outputs:
            assert torch.equal(output.token_ids, expected.token_ids)


class Subclass(torch.Tensor):
    seen = []

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        cls.seen.append(function)
        return super().__torch_function__(function, types, args, kwargs)


def test_a_subclass_of_tensor_sees_the_operator():
    case = make_case(3, 4, 600)
    expected = samplers.get("cpp").load()(**case)
    for name in ("draft_token_ids", "uniforms"):
        Subclass.seen.clear()
        changed = {**case, name: case[name].as_subclass(Subclass)}
        output = fused_sampler.rejection_sample(**changed)
        assert fused_sampler.operator("rejection_sample") in Subclass.seen
        assert torch.equal(output.token_ids.as_subclass(torch.Tensor), expected.token_ids)


def test_fake_and_meta_tensors_reach_the_fake_kernel():
    case = make_case(3, 4, 600)
    with FakeTensorMode() as mode:
        fake = {name: mode.from_tensor(tensor) for name, tensor in case.items()}
        output = fused_sampler.rejection_sample(**fake)
        assert type(output.token_ids) is type(fake["uniforms"])
        assert output.token_ids.shape == (3, 5)
    meta = {name: tensor.to("meta") for name, tensor in case.items()}
    assert fused_sampler.rejection_sample(**meta).token_ids.device.type == "meta"


def test_an_argument_that_wants_a_gradient_goes_through_autograd():
    arguments = arguments_of("rejection_sample")
    arguments[2].requires_grad_()
    assert direct("rejection_sample")(*arguments) is None
    with torch.no_grad():
        assert direct("rejection_sample")(*arguments) is not None
    with torch.inference_mode():
        assert direct("rejection_sample")(*arguments).token_ids.is_inference()


def test_lazily_negated_tensors_are_read_negated():
    case = make_case(3, 4, 600)
    expected = fused_sampler.rejection_sample(**case)
    case["target_probs"] = torch._neg_view(-case["target_probs"])
    assert torch.equal(fused_sampler.rejection_sample(**case).token_ids, expected.token_ids)


def test_what_the_operator_does_not_take_is_left_to_it():
    call, good = direct("rejection_sample"), arguments_of("rejection_sample")
    for place, value in ((0, None), (2, [0.5]), (4, 0.5), (7, 3), (8, "block"), (8, 1)):
        assert call(*good[:place], value, *good[place + 1 :]) is None
    assert call(*good[:-1]) is None and call(*good, None) is None and call() is None
    flat = arguments_of("rejection_sample_flattened")
    for length in (2**70, 5.0, True):
        assert direct("rejection_sample_flattened")(*flat[:5], length, *flat[6:]) is None


def step(ids, q, p, uniforms):
    return fused_sampler.rejection_sample(ids, q, p, uniforms=uniforms).token_ids + 1


def test_tracers_record_the_operator():
    arguments = list(make_case(3, 4, 600).values())
    expected = step(*arguments)
    operator = fused_sampler.operator("rejection_sample")
    graphs = []

    def backend(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(step, fullgraph=True, backend=backend)
    assert torch.equal(compiled(*arguments), expected)
    graphs.append(make_fx(step)(*arguments))
    graphs.append(make_fx(step, pre_dispatch=True)(*arguments))
    for graph in graphs:
        assert operator in {node.target for node in graph.graph.nodes}
    assert len(graphs) == 3
    batched = torch.vmap(step)(*(argument[None] for argument in arguments))
    assert torch.equal(batched[0], expected)


def test_a_profiler_sees_the_operator_and_its_inputs():
    case = make_case(3, 4, 600)
    with torch.profiler.profile(record_shapes=True) as profile:
        fused_sampler.rejection_sample(**case)
    events = {event.key: event for event in profile.key_averages(group_by_input_shape=True)}
    event = events["fused_rejection::rejection_sample"]
    assert event.count == 1
    assert event.input_shapes[:5] == [[3, 4], [3, 4, 600], [3, 5, 600], [], [3, 5]]


@on_every_operator
def test_arguments_and_results_end_with_their_last_reference(name):
    for spoil in (lambda values: None, lambda values: values.__setitem__(0, values[0][:0])):
        arguments = arguments_of(name)
        spoil(arguments)
        alive = [weakref.ref(value) for value in arguments if isinstance(value, torch.Tensor)]
        counts = [sys.getrefcount(value) for value in arguments if isinstance(value, torch.Tensor)]
        for _ in range(3):
            try:
                output = direct(name)(*arguments)
            except (ValueError, RuntimeError):
                output = ()
        tensors = [value for value in arguments if isinstance(value, torch.Tensor)]
        assert [sys.getrefcount(tensor) - 1 for tensor in tensors] == counts
        alive += [weakref.ref(tensor) for tensor in output] if output is not True else []
        del arguments, tensors, output
        assert not any(reference() is not None for reference in alive)


def test_other_threads_run_during_a_call():
    # With this switch interval a thread has the GIL until it lets go of it.
    p = torch.rand(1, 1, 1_000_000).expand(300, 1, -1)
    ids, zeros = torch.empty(300, 0, dtype=torch.int64), torch.zeros(300, dtype=torch.int64)
    began, ran, seen = threading.Event(), [], []

    def call():
        began.set()
        fused_sampler.rejection_sample(ids, None, p, seeds=zeros, offsets=zeros)
        seen.extend(ran)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1000)
    try:
        thread = threading.Thread(target=call)
        thread.start()
        began.wait()
        ran.append(True)
        thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert seen == [True]


def test_strided_logits_and_uniforms_sample_as_contiguous_ones():
    logits = make_logits_case(4, 3, 700)["target_logits"][:, 1]
    uniforms = torch.rand(4, 2)[:, 0]
    assert not logits.is_contiguous() and not uniforms.is_contiguous()
    for ours, expected in zip(
        sample_from_logits(logits, uniforms=uniforms),
        sample_from_logits(logits.contiguous(), uniforms=uniforms.contiguous()),
        strict=True,
    ):
        assert torch.equal(ours, expected)
