"""Plans compared with real models, optimizers and PyTorch's own counters; exact where they claim to be."""

import argparse

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from model import LMConfig, MiniMindLM, attention
from model.loss import next_token_loss, target_mask
from scripts.plan import memory_size
from scripts.planning.estimates import GPUS, Machines, Work, estimate_step, peak_bytes, sent_bytes
from scripts.planning.memory import (
    ALONE,
    DDP,
    ENGINES,
    FSDP2,
    ZERO_1,
    ZERO_2,
    ZERO_3,
    saved_bytes,
    state_bytes,
    working_bytes,
)
from scripts.planning.recommending import all_plans, recommend
from scripts.planning.sizes import count_active, count_parameters, count_tensors, forward_flops, training_flops
from tests.running import call_script
from trainer.errors import UserError
from trainer.schedule import make_optimizer

SMALL = {"dim": 64, "n_layers": 3, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 300}
OTHER = {"dim": 96, "n_layers": 2, "n_heads": 8, "n_kv_heads": 8, "vocab_size": 500}
M_26 = LMConfig()


def model(sizes: dict, **own) -> MiniMindLM:
    torch.manual_seed(0)
    return MiniMindLM(LMConfig(**sizes, **own)).train()


@pytest.mark.parametrize("own", [{}, {"use_moe": True}, {"use_moe": True, "n_shared_experts": False}], ids=str)
@pytest.mark.parametrize("sizes", [SMALL, OTHER, {"dim": 640}], ids=["small", "other", "640"])
def test_parameters_are_those_of_the_model(sizes, own):
    with torch.device("meta"):
        whole = model(sizes, **own)
    kinds = {"embedding": ("tok_embeddings",), "attention": (".attention.",), "feed_forward": (".feed_forward.",)}
    found = count_parameters(whole.config)
    assert found.total == sum(p.numel() for p in whole.parameters())
    assert count_tensors(whole.config) == len(list(whole.parameters()))
    for kind, parts in kinds.items():
        named = [p.numel() for key, p in whole.named_parameters() if any(part in key for part in parts)]
        assert getattr(found, kind) == sum(named), kind


def test_a_token_passes_through_the_experts_it_is_routed_to():
    config = LMConfig(**SMALL, use_moe=True, n_routed_experts=6, num_experts_per_tok=2)
    two = LMConfig(**SMALL, use_moe=True, n_routed_experts=2, num_experts_per_tok=2)
    routers = 3 * 64 * (6 - 2)
    assert count_active(config) == count_parameters(two).total + routers
    assert count_active(M_26) == count_parameters(M_26).total


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("use_moe", [False, True])
@pytest.mark.parametrize("sizes", [SMALL, OTHER], ids=["small", "other"])
def test_operations_are_those_that_pytorch_counts(sizes, use_moe, checkpointing):
    """With attention written out by hand, because the counter does not know the fused one on a CPU."""
    whole = model(sizes, use_moe=use_moe, flash_attn=False)
    whole.gradient_checkpointing = checkpointing
    with FlopCounterMode(display=False) as counter:
        out = whole(torch.randint(0, 300, (2, 32)))
        forward = counter.get_total_flops()
        (out.logits.sum() + out.aux_loss).backward()
    assert forward == 2 * forward_flops(whole.config, 32)
    assert counter.get_total_flops() == 2 * training_flops(whole.config, 32, checkpointing)


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "adamw8bit"])
@pytest.mark.parametrize("use_moe", [False, True])
def test_bytes_of_state_are_those_of_a_real_run(use_moe, optimizer):
    whole = model(SMALL, use_moe=use_moe)
    stepped = make_optimizer(whole, argparse.Namespace(optimizer=optimizer, learning_rate=1e-3))
    whole(torch.randint(0, 300, (4, 32)), labels=torch.randint(0, 300, (4, 32))).loss.backward()
    stepped.step()
    parts = getattr(stepped, "optimizers", [stepped])
    states = [value for part in parts for state in part.state.values() for value in state.values()]
    found = state_bytes(whole.config, ALONE, 1, optimizer)
    assert found.weights == sum(p.nbytes for p in whole.parameters())
    assert found.gradients == sum(p.grad.nbytes for p in whole.parameters())
    assert found.optimizer == sum(value.nbytes for value in states if torch.is_tensor(value))
    assert found.copies == 0


def measured_bytes(whole: MiniMindLM, half: bool, packed: bool) -> int:
    """Bytes that the forward pass saves for the backward pass: each storage once, without weights and their copies."""
    ids = torch.randint(0, 300, (4, 96))
    weights = {p.untyped_storage().data_ptr() for p in whole.parameters()}
    saved = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = tensor  # kept, so that no other storage reuses its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            positions = torch.arange(48).repeat(2).expand(4, 96) if packed else None
            out = whole(ids, position_ids=positions, logits_to_keep=target_mask(ids))
        assert (next_token_loss(out.logits, ids) + out.aux_loss).requires_grad
    parameters = count_parameters(whole.config)
    copies = 2 * (parameters.total - parameters.norms) if half else 0
    return sum(tensor.untyped_storage().nbytes() for tensor in saved.values()) - copies


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("use_moe", [False, True])
def test_saved_activations_are_right_within_ten_percent(use_moe, half, packed, monkeypatch):
    monkeypatch.setattr(attention.Segments, "of", lambda segments: None)  # with a mask, as on a GPU
    whole = model(SMALL, use_moe=use_moe)
    found = saved_bytes(whole.config, 4, 96, half, packed=packed, fused_norm=False)
    assert found == pytest.approx(measured_bytes(whole, half, packed), rel=0.1)


def test_gradient_checkpointing_saves_a_blocks_input_instead_of_the_block():
    """For the largest models: the inputs (4 bytes per token, layer and dimension), one block, and the head remain."""
    config = LMConfig(dim=1024, n_layers=100, vocab_size=100)
    inputs = 8 * 512 * 4 * 1024 * 100
    assert inputs < saved_bytes(config, 8, 512, checkpointing=True) < 1.3 * inputs
    assert saved_bytes(config, 8, 512) > 5 * saved_bytes(config, 8, 512, checkpointing=True)


def test_the_stages_of_zero_share_what_their_paper_says():
    """Rajbhandari et al., figure 1: the optimizer is sharded first, then also the gradients, then the weights."""
    states = [state_bytes(M_26, engine, 64) for engine in (DDP, ZERO_1, ZERO_2, ZERO_3)]
    assert state_bytes(M_26, FSDP2, 64)[:3] == states[-1][:3]
    assert state_bytes(M_26, FSDP2, 64).copies == 0
    whole = 4 * count_parameters(M_26).total
    part = whole / 64
    counts = 4 * count_tensors(M_26)
    assert [state.weights for state in states] == pytest.approx([whole, whole, whole, part], abs=1)
    assert [state.gradients for state in states] == pytest.approx([whole, whole, part, part], abs=1)
    assert [state.optimizer - counts for state in states] == pytest.approx(
        [2 * whole, 2 * part, 2 * part, 2 * part], abs=1
    )
    assert [state.copies for state in states] == pytest.approx([whole, whole + part, whole + part, part], abs=1)


@pytest.mark.parametrize(("engine", "halves"), [(DDP, 2), (ZERO_1, 2), (ZERO_2, 6), (ZERO_3, 15), (FSDP2, 15)])
def test_what_travels_in_a_step_of_five_micro_batches(engine, halves):
    assert sent_bytes(M_26, engine, 1, 5) == 0
    assert sent_bytes(M_26, engine, 4, 5) == halves * 3 * count_parameters(M_26).total


def test_a_step_takes_the_longer_of_computing_and_sending():
    machines = Machines(8, GPUS["a100"], mfu=0.5, bandwidth=1e9)
    step = estimate_step(M_26, DDP, machines, Work(512, 4, 2))
    assert step.computing == pytest.approx(8 * training_flops(M_26, 512) / (312e12 / 2))
    assert step.sending == pytest.approx(2 * 4 * count_parameters(M_26).total * 7 / 8 / 1e9, rel=1e-6)
    assert step.seconds == step.sending > step.computing
    quick = estimate_step(M_26, DDP, machines._replace(bandwidth=1e15), Work(512, 4, 2))
    assert quick.seconds == quick.computing == step.computing


def recommended(memory: float, gpus: int = 8, optimizer: str = "adamw", **sizes):
    machines = Machines(gpus, GPUS["a100"]._replace(memory=memory), mfu=0.4, bandwidth=1e12)
    config = LMConfig(**{"dim": 2048, "n_layers": 24} | sizes)
    return config, recommend(all_plans(config, machines, 512, 64, True, optimizer))


def test_the_simplest_engine_is_recommended_that_is_about_as_fast_as_any():
    assert recommended(1e12)[1].engine is DDP
    assert recommended(1e12, gpus=1)[1].engine is ALONE
    names = [recommended(memory)[1] for memory in (60e9, 30e9, 12e9, 6e9)]
    order = [ENGINES.index(plan.engine) for plan in names]
    assert order == sorted(order)
    assert order[-1] == ENGINES.index(FSDP2)


def test_what_is_recommended_fits_and_is_the_whole_step():
    for memory in (200e9, 60e9, 20e9, 8e9):
        config, plan = recommended(memory)
        assert peak_bytes(config, plan.engine, 8, plan.work, "adamw") <= 0.9 * memory
        assert plan.work.rows * plan.work.accumulation >= 64


def test_nothing_is_recommended_where_nothing_fits():
    assert recommended(1e9)[1] is None
    assert recommended(20e9, optimizer="muon")[1] is None  # it would fit with ZeRO, which cannot train it


def test_a_plan_is_printed(capsys):
    call_script("scripts/plan.py", "--dim", "768", "--n_layers", "16", "--gpus", "16", "--price", "2")
    out = capsys.readouterr().out
    assert "parameters    104,030,976: " in out
    command = "torchrun --nnodes 2 --node_rank N --master_addr A --master_port P --nproc_per_node 8 train_pretrain.py"
    assert f"recommended   DDP: {command} --dim 768 --n_layers 16" in out
    assert "2,080,619,520 tokens" in out  # 20 bytes per parameter
    assert " at 2 per hour" in out
    assert "note" not in out


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_table_has_the_memory_of_each_engines_own_plan(dtype, capsys):
    call_script("scripts/plan.py", "--dim", "768", "--n_layers", "16", "--gpus", "4", "--dtype", dtype)
    lines = capsys.readouterr().out.splitlines()
    head = next(number for number, line in enumerate(lines) if line.split()[:2] == ["engine", "weights"])
    config, half = LMConfig(dim=768, n_layers=16), dtype != "float32"
    for line, engine in zip(lines[head + 1 :], (engine for engine in ENGINES if engine is not ALONE), strict=False):
        name, *state, rows, _, steps, saved, working, peak, _sent, _step, _unit = line.split()
        work = Work(512, int(rows), int(steps.strip("*")), steps.endswith("*"), half)
        assert name == engine.name
        assert work.rows * work.accumulation == 16
        expected = (
            *state_bytes(config, engine, 4, "adamw"),
            saved_bytes(config, work.rows, 512, half, work.checkpointing, packed=True),
            working_bytes(config, work.rows, 512, half),
            peak_bytes(config, engine, 4, work, "adamw"),
        )
        assert [*state, saved, working, peak] == [f"{size / 1e9:,.2f}" for size in expected]


@pytest.mark.parametrize(
    ("gpu", "units", "clock", "operations", "gigabytes"),
    [  # streaming multiprocessors, boost in GHz, dense bf16 operations of one per clock, as the white papers have them
        *(("rtx3090", 82, 1.695, 512, 24), ("rtx4090", 128, 2.52, 512, 24), ("l40s", 142, 2.52, 1024, 48)),
        *(("a100", 108, 1.41, 2048, 80), ("h100", 132, 1.83, 4096, 80), ("h200", 132, 1.83, 4096, 141)),
        ("b200", 148, 1.85, 8192, 180),
    ],
)
def test_a_gpu_does_what_its_units_do_at_their_clock(gpu, units, clock, operations, gigabytes):
    assert GPUS[gpu].flops == pytest.approx(units * clock * 1e9 * operations, rel=0.02)
    assert GPUS[gpu].memory == gigabytes * 1e9


def test_a_plan_for_a_model_that_fits_nowhere(capsys):
    call_script("scripts/plan.py", "--dim", "8192", "--n_layers", "80", "--n_heads", "64", "--gpu_memory", "24GB")
    out = capsys.readouterr().out
    assert "does not fit" in out
    assert "docs/scaling.md" in out
    assert "train_pretrain.py trains 8 query" in out


@pytest.mark.parametrize(("said", "gigabytes"), [("24", 24), ("24GB", 24), ("1.5", 1.5), ("500MB", 0.5)])
def test_a_bare_number_of_memory_is_in_gigabytes(said, gigabytes):
    assert memory_size(said) == gigabytes * 10**9


def test_a_model_that_cannot_be(capsys):
    call_script("scripts/plan.py", "--dim", "100", exit_code=2)
    assert "no such model: dim 100" in capsys.readouterr().err


def test_as_few_rows_as_there_are_gpus(capsys):
    call_script("scripts/plan.py", "--gpus", "1024")
    assert "steps of 524,288 tokens, as each GPU needs at least one row" in capsys.readouterr().out


def test_gpus_are_named_alike(monkeypatch):
    from scripts import plan

    assert set(plan.GPU_NAMES) == set(GPUS)
    monkeypatch.setattr("sys.argv", ["plan.py", "--gpu", "abacus"])
    with pytest.raises(UserError, match="--gpu"):
        plan.get_args()
