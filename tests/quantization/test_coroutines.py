# SPDX-License-Identifier: Apache-2.0
from contextlib import contextmanager

import psutil
import pytest
import torch
from torch._C._dynamo import eval_frame
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from conftest import tiny_llama_config, waiting_forwards
from optq.model import feed_stages, find_blocks, find_linears, observe_stages
from optq.quantization.coroutines import BlockCall, Coroutine, Finished, SuspendedForwards

CPU = torch.device("cpu")


@pytest.fixture
def model():
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(tiny_llama_config()).eval()


@pytest.fixture
def batches():
    ids = torch.randint(4, 90, (2, 2, 10), generator=torch.Generator().manual_seed(0))
    return [
        {"input_ids": ids[0]},
        {"input_ids": ids[1], "attention_mask": torch.tensor([[1] * 10, [1] * 6 + [0] * 4])},
    ]


def run_to_the_end(model, blocks, batches):
    """Drive every forward through all blocks, running each block twice; returns the logits."""
    logits = {}
    model.lm_head.register_forward_hook(lambda module, args, output: logits.setdefault(len(logits), output))
    with torch.no_grad(), SuspendedForwards(model, blocks, CPU) as forwards:
        calls = forwards.start(batches)
        while calls:
            assert {call.block for call in calls} == {calls[0].block}
            block = forwards.original_forwards[calls[0].block]
            for call in calls:
                block(*call.args, **call.kwargs)
            calls = [
                following
                for call in calls
                if isinstance(following := forwards.resume(call, block(*call.args, **call.kwargs)), BlockCall)
            ]
    return list(logits.values())


def test_suspended_logits_are_bit_identical(model, batches):
    with torch.no_grad():
        expected = [model(**batch, use_cache=False).logits for batch in batches]
    found = run_to_the_end(model, find_blocks(model), batches)
    assert all(torch.equal(left, right) for left, right in zip(found, expected, strict=True))
    assert not waiting_forwards()


def test_leaving_early_ends_the_forwards_and_restores_the_blocks(model, batches):
    found = find_blocks(model)
    blocks = list(found.values())
    kept = blocks[1].forward
    blocks[1].forward = kept  # as accelerate's hooks do: an attribute of the instance
    with pytest.raises(KeyboardInterrupt), SuspendedForwards(model, found, CPU) as forwards:
        forwards.start(batches)
        assert len(waiting_forwards()) == 2
        raise KeyboardInterrupt
    assert not waiting_forwards()
    assert "forward" not in blocks[0].__dict__
    assert blocks[1].__dict__["forward"] is kept


def test_an_error_inside_the_model_surfaces_in_the_driver(model, batches):
    batches[1]["input_ids"] = torch.full((1, 4), 10_000)
    with pytest.raises(IndexError), SuspendedForwards(model, find_blocks(model), CPU) as forwards:
        forwards.start(batches)
    assert not waiting_forwards()


def test_hooks_of_others_see_each_block_once(model, batches):
    blocks = find_blocks(model)
    seen = []
    blocks["model.layers.0"].register_forward_hook(lambda *_: seen.append(0))
    run_to_the_end(model, blocks, batches[:1])
    assert seen == [0]


def test_stages_are_the_linears_that_share_an_input(model, batches):
    block = find_blocks(model)["model.layers.0"]
    views = list(find_linears(block, "model.layers.0").values())
    with torch.no_grad(), SuspendedForwards(model, {"model.layers.0": block}, CPU) as forwards:
        call = forwards.start(batches)[0]

        def run():
            return forwards.original_forwards[0](*call.args, **call.kwargs)

        stages = observe_stages(views, run)
        assert [stage.name for stage in stages] == ["q_proj+k_proj+v_proj", "o_proj", "gate_proj+up_proj", "down_proj"]
        assert [stage.in_features for stage in stages] == [64, 64, 64, 96]

        fed = []
        later = []
        stages[3].views[0].module.register_forward_pre_hook(lambda *_: later.append(1))
        feed_stages([stages[0], stages[2]], run, lambda stage, found: fed.append((stage.name, found[0].shape)))
        assert fed == [("q_proj+k_proj+v_proj", (2, 10, 64)), ("gate_proj+up_proj", (2, 10, 64))]
        assert not later  # the forward was cut off once all was seen


def test_equal_values_in_different_tensors_are_different_inputs():
    left, right = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
    views = list(find_linears(torch.nn.ModuleList([left, right])).values())
    x = torch.randn(2, 4)

    def in_place():
        left(x)
        x.add_(0)  # the same memory, but written to in between
        right(x)

    assert len(observe_stages(views, lambda: (left(x), right(x)))) == 1
    assert len(observe_stages(views, lambda: (left(x), right(x.view(2, 4))))) == 1
    assert len(observe_stages(views, lambda: (left(x), right(x.clone())))) == 2
    assert len(observe_stages(views, in_place)) == 2
    assert len(observe_stages(views, lambda: left(x))) == 1


class Functions(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


class Dispatches(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


def torch_state():
    return {
        "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "autocast": (torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")),
        "compiler": _exchanged_compiler(None),
        "modes": (torch._C._len_torch_function_stack(), torch._C._len_torch_dispatch_stack()),
    }


def _exchanged_compiler(other):
    """What runs each Python function for torch.compile; False: only what has been compiled already."""
    before = eval_frame.set_eval_frame(other)
    if other is None:
        eval_frame.set_eval_frame(before)
    return before


@contextmanager
def compiled():
    before = _exchanged_compiler(False)
    yield
    eval_frame.set_eval_frame(before)


@contextmanager
def no_state():
    yield


STATES = {
    "grad mode": torch.enable_grad,
    "inference mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.float16),
    "a function mode": Functions,
    "a dispatch mode": Dispatches,
    "torch.compile": compiled,
    "nothing": no_state,
}


@pytest.mark.parametrize("inside", STATES)
@pytest.mark.parametrize("outside", STATES)
def test_forwards_and_the_driver_each_keep_their_own_torch_state(inside, outside):
    """Two forwards wait in a state of their own, and go on in another order, while the driver has a third."""
    seen = []

    def forward():
        with STATES[inside]():
            before = torch_state()
            for _ in range(2):
                Coroutine.current(owner).pause("waits")
                seen.append(torch_state() == before)

    owner = object()
    with torch.no_grad():
        at_first = torch_state()
        forwards = [Coroutine(owner, forward, index) for index in range(3)]
        with STATES[outside]():
            mine = torch_state()
            for each in forwards:
                assert each.wait() == "waits"
                assert torch_state() == mine
        for each in (forwards[1], forwards[0]):
            assert each.wait() == "waits"
            assert torch_state() == at_first
        with STATES[outside]():
            assert isinstance(forwards[1].wait(), Finished)
            forwards[0].abandon()
            assert torch_state() == mine
        forwards[2].abandon()
        assert torch_state() == at_first
    assert seen == [True] * 3
    assert not waiting_forwards()


def test_one_forward_more_takes_no_thread_more(model, batches):
    process = psutil.Process()
    threads = process.num_threads()
    with torch.no_grad(), SuspendedForwards(model, find_blocks(model), CPU) as forwards:
        forwards.start(batches * 20)
        assert len(waiting_forwards()) == 40
        assert process.num_threads() <= threads
