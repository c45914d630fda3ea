"""The speed benchmarks: how they time and summarise, with a fake clock, and one tiny real run of each."""

import asyncio
import importlib.util
import json
from types import SimpleNamespace

import httpx
import numpy as np
import pytest
import torch

from benchmarks import drafts, few_bits, generate, serve_load, train_throughput
from benchmarks.throughput.bare_model import BareModel
from benchmarks.throughput.vlm_peer import chats_with_pictures
from model import LMConfig, MiniMindLM
from trainer.errors import UserError

CPU = torch.device("cpu")


class Clock:
    """Replaces the module `time`; its clock moves only when a test advances it."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def passing(self, seconds, result):
        """A function whose calls take these numbers of seconds, one after another, and return the result."""
        each = iter(seconds)

        def work():
            self.now += next(each)
            return result

        return work


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    for module in (generate, serve_load, train_throughput):
        monkeypatch.setattr(module, "time", clock)
    return clock


def test_a_figure_is_the_median_of_the_rounds_behind_a_warm_up(clock):
    measured = {"a": clock.passing((100, 3, 1, 1), [[5]]), "b": clock.passing((100, 2, 9, 4), None)}
    assert generate.take_turns(measured, 3, CPU) == ({"a": 1, "b": 4}, {"a": [[5]], "b": None})


def test_contenders_are_compared_with_the_first_round_by_round(clock, capsys):
    """Two warm-up steps each, then as many steps as fit into 4 seconds."""
    slow = clock.passing((50, 50, 4, 2, 2, 1, 1, 1, 1), (100, 200))  # 25, 50 and 100 non-padding tokens per second
    fast = clock.passing((50, 50, 4, 4, 2, 2), (300, 300))  # 75, 75 and 150
    train_throughput.measure({"slow": slow, "fast": fast}, 3, 4, lambda: None)
    *_, first, second = capsys.readouterr().out.splitlines()
    assert first.split() == ["slow", "50", "100", "1.00", "1.00", "1.00", "1.00"]
    assert second.split() == ["fast", "75", "75", "1.50", "3.00", "1.50", "1.50"]


def test_writing_is_timed_for_real(monkeypatch, capsys):
    flags = "--dim 64 --n_layers 1 --tokens 2 --rounds 1 --dtype float32 int4 --device cpu --compile 0"
    monkeypatch.setattr("sys.argv", ["generate.py", *flags.split()])
    generate.main()
    said = capsys.readouterr().out
    assert "alone and in a batch: yes" in said
    if importlib.util.find_spec("xllamacpp"):
        assert [said.count(f"{name}  ") for name in ("llama.cpp, one", "llama.cpp, 16 at once")] == [2, 2]
    assert [line.split()[0] for line in said.splitlines()[-3:]] == ["128", "1024", "4096"]


@pytest.fixture
def time_training(monkeypatch, tiny_data, capsys):
    """Runs benchmarks.train_throughput at a tiny size and returns the lines that it printed."""
    asked = []
    monkeypatch.setattr(train_throughput, "pick_device", lambda name: asked.append(name) or CPU)
    monkeypatch.setattr(train_throughput, "PRODUCT_SECONDS", 0.0)
    monkeypatch.setattr(train_throughput, "PRODUCT_SIDE", 64)

    def call(*flags: str, data: str = "pretrain_hq") -> list[str]:
        tiny = "--dim 32 --n_layers 1 --batch_size 2 --max_seq_len 32 --rounds 1 --seconds 0.001 --compile 0"
        path = ("--data_path", str(tiny_data / f"{data}.jsonl"))
        monkeypatch.setattr("sys.argv", ["train_throughput.py", *tiny.split(), *path, *flags])
        train_throughput.main()
        assert asked == [None]
        return capsys.readouterr().out.splitlines()

    return call


def test_training_is_timed_for_real_on_the_best_device_there_is(time_training):
    lines = time_training("--dtype", "bfloat16", "--peak_tflops", "1e-3")
    start = next(number for number, line in enumerate(lines) if "positions/s" in line) + 1
    rows = [line.split() for line in lines[start : start + 6]]
    assert [(row[0].strip(","), float(row[-1]) > 0) for row in rows] == [
        *([("transformers", True)] * 2 + [("bare", True)] + [("MiniMind", True)] * 3)
    ]
    assert "matrix products: 0.001 TFLOPS in bf16" in lines[start + 7]
    shares = {" ".join(line.split()[:-3]): float(line.split()[-3].strip("%")) for line in lines[start + 8 : -1]}
    assert len(shares) == 6
    speed, share = float(rows[-1][4].replace(",", "")), shares["MiniMind, bf16, packed"]
    each = float(lines[start + 7].split()[0]) * 1e6  # operations per token, in whole millions
    assert share == pytest.approx(100 * speed * each / 1e9, rel=0.5)
    assert "waits for its rows" in lines[-1]


@pytest.mark.parametrize(
    ("flags", "data", "peer"),
    [
        (["--use_moe"], "pretrain_hq", "Qwen2-MoE"),
        (["--stage", "lora"], "sft_mini_512", "Llama"),
        (["--stage", "vlm", "--max_seq_len", "300"], "sft_mini_512", "Llama"),
    ],
)
def test_experts_adapters_and_pictures_have_a_peer_of_their_kind(flags, data, peer, time_training):
    lines = time_training("--dtype", "float32", "--max_seq_len", "64", *flags, data=data)
    start = next(number for number, line in enumerate(lines) if "positions/s" in line) + 1
    assert [line.split()[:2] for line in lines[start : start + 4]] == [
        *(["transformers", f"{peer},"], ["MiniMind,", "fp32,"], ["MiniMind,", "fp32,"], [])
    ]


def test_the_bare_peer_is_a_minimind_of_fused_matrices():
    """The same loss from the same weights, once its query and key rows are in MiniMind's order."""
    config = LMConfig(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=64)
    torch.manual_seed(0)
    ours, bare = MiniMindLM(config).eval(), BareModel(config, 12)
    order = torch.cat([torch.arange(0, 8, 2), torch.arange(1, 8, 2)])  # pairs (2i, 2i+1) -> halves

    def by_halves(weight):
        return weight.view(-1, 8, 32)[:, order].flatten(0, 1)

    with torch.no_grad():
        bare.embedding.weight.copy_(ours.tok_embeddings.weight)
        for theirs, block in zip(bare.blocks, ours.layers, strict=True):
            attention, feed_forward = block.attention, block.feed_forward
            q, k = by_halves(attention.wq.weight), by_halves(attention.wk.weight)
            theirs.qkv.weight.copy_(torch.cat([q, k, attention.wv.weight]))
            theirs.out.weight.copy_(attention.wo.weight)
            theirs.gate_up.weight.copy_(torch.cat([feed_forward.w1.weight, feed_forward.w3.weight]))
            theirs.down.weight.copy_(feed_forward.w2.weight)
    text = torch.randint(0, 64, (2, 13))
    expected = torch.nn.functional.cross_entropy(ours(text[:, :-1]).logits.flatten(0, 1), text[:, 1:].flatten())
    torch.testing.assert_close(bare(text[:, :-1], text[:, 1:]), expected)


def test_pictures_are_put_before_chats_alone(tiny_data, tmp_path):
    with pytest.raises(UserError, match="--stage vlm takes chats"):
        chats_with_pictures(tiny_data / "pretrain_hq.jsonl", tmp_path)


def test_what_the_clients_ask_is_of_many_lengths_and_answered_alike_each_time():
    """An answer is compared with the one alone: it must be greedy, and none is so long that it fills a slot."""
    asked = serve_load.questions()
    assert len(asked) == len({body["messages"][0]["content"] for body in asked}) == 80
    assert all((body["temperature"], body["stream"]) == (0, True) for body in asked)
    assert all(16 <= body["max_tokens"] < 196 for body in asked)
    assert len({body["max_tokens"] for body in asked}) == 80
    lengths = [len(body["messages"][0]["content"]) for body in asked]
    assert max(lengths) > 6 * min(lengths)


class TestLoad:
    """Load from clients on a fake server, whose answers take one second."""

    @pytest.fixture
    def load(self, clock, monkeypatch):
        """Runs three clients for 100 seconds; returns their seconds to the first text."""
        sleep, told, asking = asyncio.sleep, [], set()

        def run(answers=lambda question: question) -> list[float]:
            async def ask(client, body):
                asking.add(asyncio.current_task())
                await sleep(0)
                clock.now += 1
                told.append(float(len(told)))
                question = body["messages"][0]["content"]
                return (question if len(told) <= 80 else answers(question)), 5, told[-1], 2.0

            monkeypatch.setattr(serve_load, "ask", ask)
            monkeypatch.setattr(serve_load, "resident", lambda pid: pid << 20)
            patient = SimpleNamespace(
                sleep=lambda seconds: sleep(0), create_task=asyncio.create_task, gather=asyncio.gather
            )
            monkeypatch.setattr(serve_load, "asyncio", patient)
            asyncio.run(serve_load.load("http://127.0.0.1:9", 7, SimpleNamespace(clients=3, seconds=100)))
            assert len(asking) == 1 + 3  # the peer that answers one question at a time
            return told[80:]

        return run

    def test_what_the_clients_saw_is_summed_up(self, load, capsys):
        seconds = load()
        said = capsys.readouterr().out
        p5, p50, p95 = np.quantile(seconds, (0.05, 0.5, 0.95), method="weibull")
        assert f"first text, s:            p5 {p5:.3f}  p50 {p50:.3f}  p95 {p95:.3f}\n" in said
        assert f"{len(seconds)} answers" in said
        assert "tokens/s of an answer:    p5 2.000  p50 2.000  p95 2.000\n" in said  # four after the first, in 2 s
        assert "answers that differ from those alone: 0\n" in said
        assert "memory: 7 MiB early, 7 MiB at the end, +0.0%\n" in said

    def test_an_answer_other_than_alone_is_a_failure(self, load, capsys):
        with pytest.raises(UserError, match="lost or mixed up"):
            load(answers=lambda question: question + "!")
        assert "answers that differ from those alone: 0\n" not in capsys.readouterr().out


def asked_of(lines: list[dict | str]) -> tuple[str, int, float, float]:
    """The result of `ask` for the lines of a stream."""
    sent = "".join(f"data: {line if isinstance(line, str) else json.dumps(line)}\n\n" for line in lines)
    transport = httpx.MockTransport(lambda request: httpx.Response(200, text=sent))

    async def run():
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            return await serve_load.ask(client, {})

    return asyncio.run(run())


def piece(text: str, tokens: int | None = None) -> dict:
    usage = None if tokens is None else {"completion_tokens": tokens}
    return {"choices": [{"delta": {"content": text}}], "usage": usage}


def test_an_answer_is_joined_and_its_tokens_are_the_servers():
    text, tokens, first, rest = asked_of([piece(""), piece("to"), piece("day", 4), "[DONE]"])
    assert (text, tokens) == ("today", 4)
    assert min(first, rest) >= 0


@pytest.mark.parametrize(("lines", "told"), [([piece("to")], "broke off"), ([{"error": {"message": "full"}}], "full")])
def test_an_answer_that_breaks_off_is_told(lines, told):
    with pytest.raises(RuntimeError, match=told):
        asked_of(lines)


def test_memory_is_what_the_system_says_in_kibibytes(monkeypatch, tmp_path):
    (tmp_path / "status").write_text("Name:\tpython\nVmPeak:\t 999 kB\nVmRSS:\t 2048 kB\nRssAnon:\t 1 kB\n", "utf-8")
    monkeypatch.setattr(serve_load, "Path", lambda path: tmp_path / path.removeprefix("/proc/7/"))
    assert serve_load.resident(7) == 2 * 1024 * 1024


def test_the_cost_of_few_bits_is_measured_for_real(monkeypatch, tiny_out, tokenizer_dir, tmp_path, capsys):
    (tmp_path / "text.txt").write_text("The sun is hot. 水是湿的。", encoding="utf-8")
    files = ("--ppl", str(tmp_path / "text.txt"), "--plot", str(tmp_path / "x.png"), "--tokenizer", str(tokenizer_dir))
    monkeypatch.setattr("sys.argv", ["few_bits.py", str(tiny_out / "full_sft_32.pth"), *files])
    few_bits.main()
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    assert [row[1] for row in rows] == ["as", "int8", "int4"]
    exact, eight, four = (float(row[3 if row[1] == "as" else 2]) for row in rows)
    assert 0 < abs(eight - exact) < abs(four - exact) < 0.1
    assert (tmp_path / "x.png").stat().st_size > 1000


def test_a_text_without_words_is_refused(monkeypatch, tiny_out, tmp_path):
    (tmp_path / "text.txt").write_text("", encoding="utf-8")
    monkeypatch.setattr("sys.argv", ["few_bits.py", "x.pth", "--ppl", str(tmp_path / "text.txt")])
    with pytest.raises(UserError, match="contains no text"):
        few_bits.main()


def test_writing_with_drafts_is_timed_for_real(monkeypatch, capsys):
    flags = "--dim 32 --n_layers 1 --tokens 24 --rounds 1 --device cpu --compile 0 --speculate 4"
    monkeypatch.setattr("sys.argv", ["drafts.py", *flags.split()])
    drafts.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("text")] == ["text that repeats its prompt", "text that does not"]
    assert sum("x without" in line for line in lines) == 6
