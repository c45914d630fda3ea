"""A GPU gives the same as the CPU: the published networks' logits, the engine's texts, every stage's losses.

Skipped where there is no GPU: a run without one does not show that CUDA works.
"""

import pytest
import torch
from PIL import Image

from model import LMConfig, MiniMindLM
from model.inference.request import Request
from model.inference.scheduler import Engine
from scripts.demo.exam import left_padded
from tests.conftest import write_jsonl
from tests.dataset.test_dpo_dataset import pair
from tests.dataset.test_vlm_dataset import line
from tests.model.networks import network
from tests.model.test_reference import reference
from tests.running import TINY_TRAINING, run_script
from tests.stages.test_eval_model import SPEED
from tests.stages.training import distance, losses, weights

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no CUDA GPU here"),
]
EIGHT_STEPS = ("--epochs", "4", "--max_steps", "8", "--learning_rate", "1e-2")
GPU = ("--device", "cuda")
STAGES = {  # script: the weights it leaves
    "train_full_sft.py": "full_sft_32",
    "train_dpo.py": "rlhf_32",
    "train_lora.py": "lora/lora_32",
    "train_distillation.py": "full_dist_32",
    "train_distill_reason.py": "reason_32",
    "train_pretrain_vlm.py": "pretrain_vlm_32",
    "train_sft_vlm.py": "sft_vlm_32",
}


@pytest.mark.parametrize("name", ["minimind2_dense_lora", "minimind2_moe"])
@pytest.mark.parametrize("flash_attn", [True, False])
def test_reference_logits(shared, name, flash_attn):
    state, expected = reference(shared, name)
    model = MiniMindLM(LMConfig(**expected["config"], flash_attn=flash_attn)).cuda().eval()
    model.load_state_dict(state)
    with torch.no_grad():
        logits = model(expected["input_ids"].cuda()).logits
    torch.testing.assert_close(logits.cpu(), expected["logits"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("use_moe", [False, True])
class TestWriting:
    def test_the_engine_writes_what_it_writes_on_the_cpu(self, tiny_tokenizer, use_moe):
        model = network(vocab_size=len(tiny_tokenizer), max_seq_len=160, use_moe=use_moe)

        def written() -> list[list[int]]:
            engine = Engine(model, tiny_tokenizer, slots=3, token_budget=24)
            return [answer.ids for answer in engine.run([Request(prompt=ids, max_new_tokens=20) for ids in _prompts()])]

        on_cpu = written()
        model.cuda()
        assert written() == on_cpu

    def test_a_padded_batch_is_continued_as_on_the_cpu(self, tiny_tokenizer, use_moe):
        model = network(vocab_size=len(tiny_tokenizer), max_seq_len=160, use_moe=use_moe)
        prompts = _prompts()
        ids, real = left_padded(prompts), left_padded([[1] * len(prompt) for prompt in prompts])
        on_cpu = model.generate(ids, real, max_new_tokens=20)
        assert model.cuda().generate(ids.cuda(), real.cuda(), max_new_tokens=20).tolist() == on_cpu.tolist()

    def test_half_precision_writes_too(self, tiny_tokenizer, use_moe):
        model = network(vocab_size=len(tiny_tokenizer), max_seq_len=160, use_moe=use_moe).cuda()
        engine = Engine(model, tiny_tokenizer, slots=3, token_budget=24, dtype=torch.bfloat16)
        requests = [Request(prompt=ids, max_new_tokens=20, eos_token_id=()) for ids in _prompts()]
        assert [len(answer.ids) for answer in engine.run(requests)] == [23, 60, 37, 29]


def _prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(8, 580, (length,), generator=generator).tolist() for length in (3, 40, 17, 9)]


def test_eval_model_answers_as_on_the_cpu(tiny_out, tokenizer_dir):
    flags = ("--dim", "32", "--out_dir", tiny_out, "--tokenizer", tokenizer_dir, "--max_new_tokens", "12")
    asked = ("--model_mode", "1", "--temperature", "0", "--prompt", "What is the capital?")
    on_cpu, on_gpu = (run_script("eval_model.py", *flags, *asked, "--device", device) for device in ("cpu", "cuda"))
    assert on_cpu.stdout.strip()
    assert SPEED.sub("", on_gpu.stdout) == SPEED.sub("", on_cpu.stdout)


@pytest.fixture(scope="module")
def on_cpu(pretrain, tmp_path_factory):
    out = tmp_path_factory.mktemp("cpu")
    pretrain(out, *EIGHT_STEPS)
    return out


@pytest.mark.parametrize("flags", ["", "--compile 1", "--num_workers 2", "--packing 0", "--use_moe"])
def test_pretraining_follows_the_cpu(pretrain, on_cpu, tmp_path, flags):
    flags = flags.split()
    expected, name = on_cpu, "pretrain_32_moe" if "--use_moe" in flags else "pretrain_32"
    if {"--packing", "--use_moe"} & set(flags):
        expected = tmp_path / "cpu"
        pretrain(expected, *EIGHT_STEPS, *flags)
    done = pretrain(tmp_path, *EIGHT_STEPS, *GPU, *flags)
    assert "8 steps on cuda:0, float32" in done.stdout
    assert losses(tmp_path, name) == pytest.approx(losses(expected, name), abs=1e-3)
    assert distance(weights(tmp_path, name), weights(expected, name)) < 1e-2


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_pretraining_learns_as_much_in_half_precision(pretrain, on_cpu, tmp_path, dtype, optimizer):
    expected = on_cpu
    if optimizer == "muon":
        expected = tmp_path / "cpu"
        pretrain(expected, *EIGHT_STEPS, "--optimizer", "muon")
    pretrain(tmp_path, *EIGHT_STEPS, *GPU, "--dtype", dtype, "--optimizer", optimizer)
    assert losses(tmp_path) == pytest.approx(losses(expected), rel=0.02)
    assert losses(tmp_path)[-1] < losses(tmp_path)[0] - 0.5


def test_an_interrupted_run_goes_on(pretrain, tmp_path):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    pretrain(whole, *EIGHT_STEPS, *GPU)
    pretrain.interrupted(stopped, "SIGTERM", "log", 3, *EIGHT_STEPS, *GPU, exit_code=143)
    pretrain(stopped, *EIGHT_STEPS, *GPU, "--resume")
    assert losses(stopped) == pytest.approx(losses(whole), abs=1e-4)  # not bit for bit: a GPU adds in arbitrary order


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="PyTorch sees no two GPUs here")
def test_nccl_takes_every_gpu(pretrain, tmp_path):
    gpus = torch.cuda.device_count()
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(gpus))
    done = pretrain(tmp_path, *EIGHT_STEPS, *GPU, launcher=launcher)
    assert f"DDP on {gpus} processes" in done.stdout
    assert losses(tmp_path)[-1] < losses(tmp_path)[0] - 0.5


@pytest.fixture(scope="module")
def lines(tmp_path_factory):
    """A few lines for each stage that has its own format, and images."""
    folder = tmp_path_factory.mktemp("lines")
    write_jsonl(
        folder / "dpo.jsonl", [pair(f"What is {n} + {n}?", f"It is {2 * n}.", "I do not know. ") for n in range(30)]
    )
    thought = "<think>\n{0} and {0} more\n</think>\n<answer>\n{1}\n</answer>"
    chats = [(f"What is {n} + {n}?", thought.format(n, 2 * n)) for n in range(30)]
    write_jsonl(folder / "reason.jsonl", [line(*chat) for chat in chats])
    for number in range(3):
        Image.new("RGB", (40, 32), (90 * number, 0, 200)).save(folder / f"{number}.png")
    write_jsonl(
        folder / "vlm.jsonl",
        [line("<image>\nWhich one?", f"Number {n % 3}.", f"{n % 3}.png") for n in range(30)],
    )
    return folder


@pytest.fixture(scope="module")
def train(tiny_out, tiny_data, lines, clip_dir, tokenizer_dir):
    """Runs a stage with a folder as --out_dir, starting from the weights in `tiny_out`."""
    eyes = ("--vision_model", clip_dir, "--images_path", lines, "--data_path", lines / "vlm.jsonl")
    chats = ("--data_path", tiny_data / "sft_mini_512.jsonl")
    own = {
        "train_full_sft.py": chats,
        "train_dpo.py": ("--data_path", lines / "dpo.jsonl"),
        "train_lora.py": (*chats, "--lora_name", "lora"),
        "train_distillation.py": (*chats, "--teacher_weight", "full_sft_32", "--from_weight", "pretrain"),
        "train_distill_reason.py": ("--data_path", lines / "reason.jsonl", "--from_weight", "full_sft"),
        "train_pretrain_vlm.py": eyes,
        "train_sft_vlm.py": eyes,
    }

    def run(script: str, out, *flags) -> None:
        out.mkdir(exist_ok=True)
        for name in ("pretrain_32", "full_sft_32"):
            for suffix in (".pth", ".json"):
                (out / f"{name}{suffix}").symlink_to((tiny_out / f"{name}{suffix}").resolve())
        common = ("--tokenizer", tokenizer_dir, *TINY_TRAINING, *EIGHT_STEPS, "--max_seq_len", "160")
        run_script(script, "--out_dir", out, *common, *own[script], *flags)

    return run


@pytest.mark.parametrize("script", STAGES)
def test_every_other_stage_follows_the_cpu(train, script, tmp_path):
    flags = ("--overwrite",)
    if script == "train_sft_vlm.py":
        train("train_pretrain_vlm.py", tmp_path / "eyes", "--device", "cpu")
        flags += ("--from_weight", tmp_path / "eyes" / "pretrain_vlm_32.pth")
    train(script, tmp_path / "cpu", *flags)
    train(script, tmp_path / "gpu", *flags, *GPU)
    on_cpu, on_gpu = (losses(tmp_path / device, STAGES[script]) for device in ("cpu", "gpu"))
    assert len(on_cpu) == 8
    assert on_gpu == pytest.approx(on_cpu, abs=2e-3)
