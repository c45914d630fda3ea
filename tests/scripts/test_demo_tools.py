"""scripts/demo_tools.py: its lessons, questions, scoring, and continuation by a second call."""

import importlib
import json
import random

import pytest
import torch

from model import LMConfig, MiniMindLM
from model.inference.scheduler import Engine
from model.tool_calls import with_calls
from scripts import demo_tools
from scripts.demo import tool_lessons
from scripts.demo.tool_lessons import Asked, Question
from scripts.demo.tool_talks import KNOWN, tool_talks
from scripts.demo.world import relations
from scripts.tool_use.builtin import table
from tests.conftest import write_jsonl


@pytest.fixture
def world(tmp_path, monkeypatch):
    facts = [
        {"question": f"Fact {n}?", "answers": ["Yes"], "kind": "x", "lang": lang}
        for n in range(9)
        for lang in ("en", "zh")
    ]
    write_jsonl(tmp_path / "eval_facts.jsonl", facts)
    chats = [[{"role": "user", "content": f"Hi {n}"}, {"role": "assistant", "content": "Hi"}] for n in range(5)]
    write_jsonl(tmp_path / "sft_mini_512.jsonl", [{"conversations": chat} for chat in chats])
    monkeypatch.setattr(tool_lessons, "DATA", tmp_path)
    torch.manual_seed(0)
    torch.save(MiniMindLM(LMConfig(dim=16, n_layers=1, vocab_size=6400)).state_dict(), tmp_path / "a_16.pth")
    return tmp_path


def test_nothing_that_is_asked_was_learned(world):
    asked = tool_lessons.questions(1, each=7)
    assert asked == tool_lessons.questions(1, each=7) != tool_lessons.questions(2, each=7)
    assert len(asked) == 2 * 3 * 7
    learned = json.dumps(tool_talks(random.Random(1), 400, relations()), ensure_ascii=False)
    assert not any(question.text in learned for question in asked)
    for question in asked:
        assert len({*question.tools}) == len(question.tools), "a tool is listed once"
        if question.kind == "look-up":
            name = next(name for name in table() if name in question.text)
            assert name in list(table())[KNOWN:]
            assert question.answers == (str(table()[name]),)
            assert name not in learned
        if question.kind != "fact":
            assert {"sum": "calculator", "look-up": "look_up"}[question.kind] in question.tools


def test_lessons_are_written_once(world):
    path = world / "x" / "lessons.jsonl"
    tool_lessons.write_lessons(path, 1, talks=20, general=3)
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert sum("tools" in line for line in lines) == 20
    assert len(lines) == 23
    before = path.stat().st_mtime_ns
    tool_lessons.write_lessons(path, 2, talks=1)
    assert path.stat().st_mtime_ns == before


def test_answers_are_counted(world, monkeypatch):
    asked = [
        Question("en", "sum", "What is 2 * 3?", ("6",), ("calculator",)),
        Question("en", "look-up", "How many x?", ("12",), ("look_up",)),
        Question("en", "fact", "Fact?", ("Yes",), ("calculator",)),
        Question("en", "fact", "Fact!", ("Yes",), ("calculator",)),
        Question("zh", "sum", "2 * 3?", ("6",), ("calendar",)),
    ]
    call = with_calls("", [{"name": "calculator", "arguments": {"expression": "2 * 3"}}])
    broken = '<tool_call>\n{"name": \n</tool_call>'
    says = iter([[call, broken, "yes.", call, call], ["It is 6.", "No", "16"]])
    prompts = []

    def run(self, requests):
        prompts.append(list(requests))
        return [type("Said", (), {"text": text}) for text in next(says)]

    monkeypatch.setattr(Engine, "run", run)
    found = tool_lessons.examine(world / "a_16.pth", asked)
    assert found == [
        Asked(True, True, 1, 1),
        Asked(False, True, 1, 0),
        Asked(True, False, 0, 0),
        Asked(False, True, 1, 1),
        Asked(False, True, 1, 0),
    ]
    assert [len(batch) for batch in prompts] == [5, 3]
    shares = tool_lessons.summary(asked, found)
    assert shares["en"] == {"sum": 1, "look-up": 0, "fact": 0.5, "needless": 0.5, "valid": 2 / 3}
    assert (shares["zh"]["sum"], shares["zh"]["valid"]) == (0, 0)
    assert "66.7%" in tool_lessons.table_of({"model": shares})


def test_a_second_call_examines_nothing_again(world, monkeypatch, capsys):
    commands, examined = [], []
    monkeypatch.setattr("sys.argv", ["demo_tools.py", "--seed", "7"])
    monkeypatch.setattr(demo_tools, "OUT", world)
    monkeypatch.setattr(tool_lessons, "TOOLS_OUT", world / "tools")
    monkeypatch.setattr(demo_tools, "make_model", lambda: None)
    monkeypatch.setattr(demo_tools, "run", lambda *command: commands.append(command))
    monkeypatch.setattr(demo_tools, "read_settings", lambda path: {"seconds": 90})
    monkeypatch.setattr(tool_lessons, "EACH", 2)
    monkeypatch.setattr(tool_lessons, "TALKS", 3)

    def examine(weights, asked, with_tools):
        examined.append((weights.name, with_tools))
        return [Asked(True, False, 0, 0)] * len(asked)

    monkeypatch.setattr(tool_lessons, "examine", examine)
    monkeypatch.setattr(tool_lessons, "conversation", lambda weights, texts: "> hi")
    demo_tools.main()
    demo_tools.main()
    assert [with_tools for _, with_tools in examined] == [False, False, True]
    assert "then, with tools      zh      100.0%" in capsys.readouterr().out
    script, *flags = commands[0]
    monkeypatch.setattr("sys.argv", list(commands[0]))
    args = importlib.import_module(script.removesuffix(".py")).get_args()
    assert (args.seed, args.max_seq_len, args.dim, args.resume) == (7, 512, 256, True)
    assert args.data_path.endswith("lessons.jsonl")
    assert flags.count("--out_dir") == 1
