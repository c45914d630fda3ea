"""Choice of device and dtype, and what differs between kinds of devices. Most kinds are simulated: the tests check that
PyTorch is called in the right way."""

from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model.inference import sampling
from model.loss import next_token_loss, target_mask
from tests.model.networks import network
from tests.trainer.accelerators import OnMac, pretend, pretend_random
from trainer import device as devices
from trainer.device import backend_of, default_dtype, device_ids, moved, pick_device, random_state, set_random_state
from trainer.errors import UserError
from trainer.schedule import make_optimizer

CPU = torch.device("cpu")


def nothing(monkeypatch) -> None:
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: None)


@pytest.mark.parametrize("name", ["meta", "mps", "xpu", "cuda", "cuda:0"])
def test_a_device_that_is_not_there(name, monkeypatch):
    nothing(monkeypatch)
    with pytest.raises(UserError, match=f"^--device {name}: PyTorch sees no accelerator here; use --device cpu$"):
        pick_device(name)


@pytest.mark.parametrize("name", ["gpu", "tpu", "cuda:x", ""])
def test_what_is_no_device(name):
    with pytest.raises(UserError, match=f"^--device {name}: use cpu, cuda, cuda:N, mps, xpu"):
        pick_device(name)


def test_another_device_than_the_one_there(monkeypatch):
    pretend(monkeypatch, "mps", 1)
    with pytest.raises(UserError, match="--device cuda: PyTorch sees mps here; use --device mps or cpu"):
        pick_device("cuda")


def test_without_an_accelerator_the_cpu_computes(monkeypatch):
    nothing(monkeypatch)
    assert pick_device(None) == pick_device("cpu") == CPU


@pytest.mark.parametrize("kind", ["cuda", "mps", "xpu"])
def test_the_accelerator_of_a_rank(kind, monkeypatch):
    current = pretend(monkeypatch, kind, 2)
    assert pick_device(None, local_rank=1) == torch.device(kind, 1)
    assert pick_device(kind) == torch.device(kind, 0)
    assert pick_device(f"{kind}:0", local_rank=1) == torch.device(kind, 0)
    assert pick_device("cpu", local_rank=1) == CPU
    assert current == [1, 0, 0]
    with pytest.raises(UserError, match=f"{kind}:2 does not exist: there are 2 {kind} devices"):
        pick_device(kind, local_rank=2)


def test_only_cuda_is_told_not_to_ask_cudnn(monkeypatch):
    told = []
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", told.append)
    for kind in ("mps", "cuda"):
        pretend(monkeypatch, kind, 1)
        pick_device(kind)
    assert told == [False]


@pytest.mark.parametrize(
    ("able", "dtype"),
    [
        ({"avx2": True}, "float32"),
        ({"avx512_f": True, "avx512_bf16": False}, "float32"),
        ({"avx512_bf16": True}, "bfloat16"),
        ({"amx_bf16": True}, "bfloat16"),
        ({"neon": True, "bf16": True}, "bfloat16"),
        ({"neon": True}, "float32"),
    ],
)
def test_a_cpu_trains_in_bfloat16_where_it_computes_in_it(able, dtype, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able, raising=False)
    assert default_dtype(CPU) == dtype


@pytest.mark.parametrize(("able", "dtype"), [(True, "bfloat16"), (False, "float16")])
def test_a_gpu_trains_in_bfloat16_where_it_computes_in_it(able, dtype, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: able or including_emulation)
    assert default_dtype(torch.device("cuda")) == dtype


@pytest.mark.parametrize("kind", ["mps", "xpu"])
def test_what_nobody_has_measured_trains_in_float32(kind, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True}, raising=False)  # another chip's
    assert default_dtype(torch.device(kind)) == "float32"


def test_the_cpu_is_shared_by_ranks_and_an_accelerator_is_not():
    assert device_ids(CPU) is None
    assert device_ids(torch.device("cpu:0")) is None
    assert device_ids(torch.device("xpu:1")) == [1]


@pytest.mark.parametrize(("kind", "waits"), [("cpu", True), ("cuda", False), ("mps", True), ("xpu", True)])
def test_a_batch_goes_over_without_waiting_on_cuda_alone(kind, waits):
    calls = []
    tensor = SimpleNamespace(to=lambda device, non_blocking: calls.append((device.type, not non_blocking)))
    moved(tensor, torch.device(kind))
    assert calls == [(kind, waits)]


@pytest.mark.parametrize("kind", ["cuda", "mps", "xpu"])
def test_the_random_state_of_cpu_and_accelerator(kind, monkeypatch):
    states = pretend_random(monkeypatch)
    device = torch.device(kind, 0)
    torch.manual_seed(3)
    saved = random_state(device)
    assert set(saved) == {"cpu", kind}
    assert saved[kind].tolist() == [7]
    drawn = torch.rand(4)
    set_random_state(device, saved | {kind: torch.tensor([9], dtype=torch.uint8)})
    assert torch.equal(torch.rand(4), drawn)
    assert {place: state.tolist() for place, state in states.items()} == {device: [9]}
    set_random_state(torch.device("meta"), saved)  # a run resumed on another machine
    assert torch.equal(torch.rand(4), drawn)
    assert set(states) == {device}


def test_the_cpu_alone_has_one_random_state():
    assert set(random_state(CPU)) == {"cpu"}


def test_a_token_is_drawn_alike_where_there_is_no_float64(monkeypatch):
    probabilities = torch.rand(5, 40, generator=torch.Generator().manual_seed(1)).softmax(-1)
    drawn = sampling.sample_from(probabilities, torch.Generator().manual_seed(2))
    rand, searchsorted = torch.rand, torch.searchsorted
    monkeypatch.setattr(torch, "rand", lambda *size, device, generator: rand(*size, generator=generator))
    found = []

    def search(*tensors, **how):
        assert not any(isinstance(tensor, OnMac) for tensor in tensors)
        found.append(searchsorted(*tensors, **how))
        return found[-1].as_subclass(OnMac)

    monkeypatch.setattr(torch, "searchsorted", search)
    on_mac = sampling.sample_from(probabilities.as_subclass(OnMac), torch.Generator().manual_seed(2))
    assert on_mac.device.type == "mps"
    assert torch.equal(found[0].squeeze(1), drawn)


class NoFloat64(TorchDispatchMode):
    """Refuses every tensor that a device without float64 cannot store."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                assert tensor.dtype not in (torch.float64, torch.complex128), function
        return made


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "adamw8bit"])
@pytest.mark.parametrize("use_moe", [False, True])
def test_a_training_step_needs_no_float64(use_moe, optimizer):
    model = network(use_moe=use_moe)
    taken = make_optimizer(model, SimpleNamespace(optimizer=optimizer, learning_rate=1e-3))
    ids = torch.randint(3, model.config.vocab_size, (2, 12), generator=torch.Generator().manual_seed(0))
    with NoFloat64():
        out = model(ids, logits_to_keep=target_mask(ids))
        (next_token_loss(out.logits, ids) + out.aux_loss).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        taken.step()


def test_every_dtype_of_the_flag_is_known():
    assert set(devices.DTYPES) == {"float32", "bfloat16", "float16"}


def test_only_an_accelerator_that_is_really_there_is_taken(monkeypatch):
    """PyTorch built for CUDA reports it even on a machine without a GPU."""
    monkeypatch.setattr(
        torch.accelerator,
        "current_accelerator",
        lambda check_available=False: None if check_available else torch.device("cuda"),
    )
    assert pick_device(None) == CPU


@pytest.mark.parametrize(("count", "index", "there"), [(1, 0, True), (1, 1, False), (4, 3, True), (4, 4, False)])
def test_devices_are_counted_from_0(count, index, there, monkeypatch):
    pretend(monkeypatch, "xpu", count)
    if there:
        assert pick_device(f"xpu:{index}") == pick_device(None, local_rank=index) == torch.device("xpu", index)
    else:
        with pytest.raises(UserError, match="counted from 0"):
            pick_device(f"xpu:{index}")


class TestOlderPyTorch:
    """PyTorch 2.6 lacks functions of later versions: without them the result is the same."""

    @pytest.fixture(autouse=True)
    def hide(self, monkeypatch):
        def current_accelerator():
            return torch.device("xpu")

        monkeypatch.delattr(torch.accelerator, "set_device_index")
        monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
        monkeypatch.delattr(torch.distributed, "get_default_backend_for_device")
        monkeypatch.setattr(torch.accelerator, "current_accelerator", current_accelerator)

    @pytest.mark.parametrize(("there", "found"), [(True, "xpu:1"), (False, "cpu")])
    def test_the_device(self, there, found, monkeypatch):
        current = []
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: there)
        monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
        monkeypatch.setattr(torch.accelerator, "set_device_idx", current.append, raising=False)
        assert pick_device(None, local_rank=1) == torch.device(found)
        assert current == ([torch.device("xpu:1")] if there else [])

    def test_the_dtype_and_the_backend(self):
        assert default_dtype(torch.device("cpu")) == "float32"
        assert backend_of(torch.device("cpu")) == "gloo"
        assert backend_of(torch.device("cuda")) == "nccl"
