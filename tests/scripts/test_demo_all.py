"""scripts/demo_all.py: its commands, and what it trains, resumes and evaluates in the first and in later calls."""

import json

import pytest
import torch

from dataset import collate
from model import LMConfig, MiniMindLM
from model.tokenizer import tokenizer_hash
from scripts import demo_all
from scripts.demo import first_model
from scripts.demo import measures as demo_measures
from scripts.demo.exam import run as run_by_demo
from scripts.demo.measures import solve
from scripts.demo.settings import DATA, STUDENT
from scripts.demo_all import STAGES, Stage, table
from scripts.make_demo_data import as_jsonl, build, write
from tests.conftest import write_jsonl
from tests.running import run_script
from trainer.errors import UserError
from trainer.preference import DPO_METRICS, dpo_metrics, sum_per_answer
from trainer.weights import architecture, load_tokenizer


@pytest.fixture
def ran():
    """The last flag of every command that was run."""
    return []


@pytest.fixture
def out(tmp_path, monkeypatch, ran):
    """An out/demo with a trained base; a command is recorded, and trains for one step."""
    monkeypatch.setattr("sys.argv", ["demo_all.py"])
    monkeypatch.setattr(demo_all, "OUT", tmp_path)
    monkeypatch.setattr(demo_all, "make_model", lambda: None)
    monkeypatch.setattr(demo_all, "facts_known", lambda name: 0.5)
    monkeypatch.setattr(demo_all, "make_report", lambda out: out / "report.html")

    def run(script, *flags):
        ran.append(flags[-1])
        name, step = flags[0], 1
        if flags[-1] == "--resume" and (tmp_path / f"{name}.json").exists():
            step = json.loads((tmp_path / f"{name}.json").read_text(encoding="utf-8"))["step"]
        save(tmp_path, name, step)

    monkeypatch.setattr(demo_all, "run", run)
    save(tmp_path, "base", 1)
    return tmp_path


def save(folder, name: str, step: int) -> None:
    """Save weights that record how often they were trained."""
    config = LMConfig(dim=16, n_layers=1, n_heads=2, n_kv_heads=1, vocab_size=len(load_tokenizer()))
    model = MiniMindLM(config)
    torch.nn.init.constant_(model.norm.weight, step)
    torch.save(model.state_dict(), folder / f"{name}.pth")
    about = {"config": architecture(config), "tokenizer": tokenizer_hash(load_tokenizer()), "step": step, "seconds": 90}
    (folder / f"{name}.json").write_text(json.dumps(about), encoding="utf-8")


def test_a_second_call_measures_nothing_again_and_a_new_base_trains_anew(out, ran, monkeypatch, capsys):
    measured = []

    def measure(model, tokenizer):
        measured.append(float(model.norm.weight[0].detach()))
        return measured[-1] / 10

    first = Stage("first", (), None, "base", "how far", measure, "{:.1f}", answers=False)
    second = Stage("second", ("x.py", "more"), "base", "more", "how far", measure, detail=lambda *_: "in detail")
    monkeypatch.setattr(demo_all, "STAGES", (first, second))
    demo_all.main()
    assert ran == ["--resume"]
    assert measured == [1, 1, 1, 1]
    shown = capsys.readouterr().out
    assert "in detail" in shown
    assert shown.endswith(f"\nreport: {out / 'report.html'}\n")
    assert "second             1.5  how far                                10.0%   10.0%   50.0%" in shown

    demo_all.main()
    assert ran == ["--resume", "--resume"]
    assert measured == [1, 1, 1, 1]
    assert "in detail" in capsys.readouterr().out

    save(out, "base", 7)
    demo_all.main()
    assert ran == ["--resume", "--resume", "--overwrite"]
    assert measured == [1, 1, 1, 1, 1, 7, 7, 1]


def test_a_stage_is_measured_at_its_start_and_at_its_end(out):
    save(out, "end", 5)
    stage = Stage("one", (), "base", "end", "how far", lambda model, _: float(model.norm.weight[0]), answers=False)
    known = demo_all.examined(stage, {"begins_from": "x"})
    assert (known["start"], known["end"], known["minutes"], known["begins_from"]) == (1.0, 5.0, 1.5, "x")


@pytest.mark.parametrize("ending", ["sys.exit(3)", "os.kill(os.getpid(), signal.SIGTERM)"])
def test_a_script_that_fails_or_is_killed_ends_the_demo(tmp_path, ending):
    script = tmp_path / "script.py"
    script.write_text(f"import os, signal, sys\n{ending}\n")
    with pytest.raises(UserError, match="ended with exit code"):
        run_by_demo(str(script))
    script.write_text("")
    run_by_demo(str(script))


def test_a_training_that_fails_is_gone_on_with(out, ran, monkeypatch):
    stage = Stage("second", ("x.py", "more"), "base", "more", "how far", lambda *_: 0.0)
    monkeypatch.setattr(demo_all, "STAGES", (stage,))
    run = demo_all.run

    def interrupted(*command):
        run(*command)
        raise KeyboardInterrupt

    monkeypatch.setattr(demo_all, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        demo_all.main()
    monkeypatch.setattr(demo_all, "run", run)
    demo_all.main()
    save(out, "base", 7)
    monkeypatch.setattr(demo_all, "run", interrupted)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            demo_all.main()
    assert ran == ["--resume", "--resume", "--overwrite", "--overwrite"]


def test_a_student_learns_anew_from_a_new_teacher(out, ran, monkeypatch):
    stage = Stage("second", ("x.py", "more"), "base", "more", "how far", lambda *_: 0.0, teacher="teacher")
    monkeypatch.setattr(demo_all, "STAGES", (stage,))
    for teacher in (3, 3, 4):
        save(out, "teacher", teacher)
        demo_all.main()
    assert ran == ["--resume", "--resume", "--overwrite"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The demo's data, a few lines of each file."""
    folder = tmp_path_factory.mktemp("demo")
    write(as_jsonl({name: lines[:24] for name, lines in build(42).items()}), folder)
    return folder


def test_every_command_trains_and_every_measure_measures(data, tmp_path, monkeypatch):
    shrunken = (
        "--dim",
        "32",
        "--n_layers",
        "1",
        "--max_steps",
        "1",
        "--epochs",
        "1",
        "--device",
        "cpu",
        "--compile",
        "0",
    )
    for script, name in (("train_pretrain.py", "pretrain_hq"), ("train_full_sft.py", "sft_mini_512")):
        run_script(script, *shrunken, "--out_dir", tmp_path, "--data_path", data / f"{name}.jsonl")
    ends = {"pretrain_256": "pretrain_32", "full_sft_256": "full_sft_32", "pretrain_128": "pretrain_32"}
    ends |= {"full_dist_128": "full_dist_32", "lora/identity_256": "lora/identity_32"}
    ends |= {"rlhf_256": "rlhf_32", "reason_256": "reason_32"}
    monkeypatch.setattr(demo_measures, "DATA", data)
    monkeypatch.setattr(demo_all, "OUT", tmp_path)
    for stage in STAGES:
        if stage.command:
            script, *flags = (ends.get(word, word.replace(str(DATA), str(data))) for word in stage.command)
            run_script(script, *flags, *shrunken, "--out_dir", tmp_path, "--overwrite")
        end = demo_all.opened(ends[stage.end], "full_sft_32")
        assert 0 <= stage.measure(*end) < 20, stage.name
        if stage.detail:
            assert "%" in stage.detail(demo_all.opened(ends[stage.start], "full_sft_32"), end)


@pytest.mark.parametrize(("chosen", "rejected", "prefers"), [("yes " * 20, "no", 0.0), ("no", "yes " * 20, 1.0)])
def test_a_pair_is_preferred_by_the_probability_of_whole_answers(tmp_path, monkeypatch, chosen, rejected, prefers):
    """Not per token, by which the longer answer here would be the more likely one."""

    def evaluate(model, frozen, pairs, run, batch_size, per_answer, loss_function, beta):
        batch = collate([pairs[0]], pairs.max_seq_len)
        labels = batch.pop("labels")
        learned = torch.ones(int((labels[:, 1:] >= 0).sum()))
        ((first, second),) = sum_per_answer(learned, batch, labels).int().tolist()
        each = [-1.0] * first + [-2.0] * second if first > second else [-2.0] * first + [-1.0] * second
        policy = per_answer(torch.tensor(each), batch, labels)
        losses, margins = loss_function(policy, policy, beta)
        measured = dpo_metrics(losses, margins, policy, torch.zeros(len(each)), batch, labels)
        return {f"eval_{name}": value for name, value in zip(DPO_METRICS, measured.tolist(), strict=True)}

    monkeypatch.setattr(demo_measures, "DATA", tmp_path)
    monkeypatch.setattr(demo_measures, "evaluate_pairs", evaluate)
    write_jsonl(tmp_path / "eval_dpo.jsonl", [{"prompt": "Is it?", "chosen": chosen, "rejected": rejected}])
    model = MiniMindLM(LMConfig(dim=16, n_layers=1, n_heads=2))
    assert demo_measures.prefers_the_better(model, load_tokenizer()) == prefers


def test_the_demo_tells_its_minutes_and_keeps_its_shares(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(first_model, "OUT", tmp_path)
    monkeypatch.setattr(first_model, "make_model", lambda: None)
    monkeypatch.setattr(first_model, "show_examination", lambda weights: {"facts/en/all": 0.5})
    for name in ("pretrain_256", "full_sft_256"):
        save(tmp_path, name, 1)
    first_model.run_demo()
    assert "training took 3.0 minutes, this call " in capsys.readouterr().out
    assert json.loads((tmp_path / "accuracy.json").read_text()) == {"facts/en/all": 0.5}


def test_each_stage_is_measured_from_the_weights_it_starts_from_to_those_it_writes():
    """By its own flags and the names that its script gives weights; who only continues text is asked no facts."""
    ends = {"train_dpo.py": "rlhf", "train_lora.py": "lora/identity", "train_pretrain.py": "pretrain"}
    ends |= {"train_distillation.py": "full_dist", "train_distill_reason.py": "reason"}
    starts = {"train_dpo.py": "full_sft", "train_lora.py": "full_sft", "train_distill_reason.py": "rlhf"}
    trained = set()
    for stage in STAGES:
        if stage.command:
            script, *flags = stage.command
            size, start = flags[flags.index("--dim") + 1], starts.get(script)
            if "--from_weight" in flags:
                start = flags[flags.index("--from_weight") + 1]
            assert stage.end == f"{ends[script]}_{size}"
            assert stage.start == (start and f"{start}_{size}")
            assert stage.teacher == (flags[flags.index("--teacher_weight") + 1] if stage.teacher else None)
        assert stage.start is None or stage.start in trained
        assert stage.answers == (not stage.end.startswith("pretrain"))
        trained.add(stage.end)
    first, second, *_ = STAGES
    assert [(stage.command, stage.start, stage.end) for stage in (first, second)] == [
        *(((), None, "pretrain_256"), ((), "pretrain_256", "full_sft_256")),
    ]


def test_the_students_are_a_quarter_of_their_teacher():
    flags = dict(zip(STUDENT[::2], STUDENT[1::2], strict=True))
    sizes = ((256, 8), (int(flags["--dim"]), int(flags["--n_layers"])))
    teacher, student = (
        sum(p.numel() for p in MiniMindLM(LMConfig(dim=dim, n_layers=n_layers)).parameters()) for dim, n_layers in sizes
    )
    assert 0.2 < student / teacher <= 0.25


def test_problems_are_counted_by_form_by_answer_and_by_vote(monkeypatch):
    lines = [{"question": f"{n}?", "answers": [str(n)]} for n in range(4)]
    monkeypatch.setattr(demo_measures, "read_lines", lambda path: lines)
    thought = "<think>\nso\n</think>\n<answer>\n{}\n</answer>"

    def rule(question, sampled, n):
        right = question[:-1]
        if not sampled:  # 0 right, 1 right but without the form, 2 and 3 wrong
            return {"0": thought.format(0), "1": "1"}.get(right, thought.format(9))
        return thought.format(right if n % 8 < (2 if right == "3" else 5) else 9)  # 3 is outvoted

    def answer(model, tokenizer, questions, batch_size=128, max_new_tokens=48, **sampling):
        return [rule(question, bool(sampling), n) for n, question in enumerate(questions)], 0

    monkeypatch.setattr(demo_measures, "answer", answer)
    solved = solve(None, None)
    assert solved == (4, 3, 2, 3)
    assert solved.describe() == (
        "Of 4 new problems: form right 75.0%, answer right 50.0% ± 25.0% greedy, 75.0% ± 21.7% by 8 votes"
    )


@pytest.mark.parametrize(("asked", "shown"), [(4, 4), (10, 10), (25, 9)])
def test_questions_shown_with_their_nearest_are_ten_at_most(monkeypatch, capsys, asked, shown):
    chat = {"conversations": [{"role": "user", "content": "7?"}, {"role": "assistant", "content": "8?"}]}
    monkeypatch.setattr(first_model, "read_lines", lambda path: [chat])
    questions = [{"question": f"{n}?", "answers": [str(n)]} for n in range(asked)]
    first_model.show_nearest(questions, [str(n - n % 2) for n in range(asked)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[2] == "  0?  ->  0  (right)"
    assert sum("  ->  " in line for line in lines) == lines.count("      nearest: 7?") == shown


def test_the_table():
    stages = (
        Stage("pretraining", (), None, "a", "bits per byte", None, "{:.3f}", answers=False),
        Stage("SFT", (), "a", "b", "facts right", None),
    )
    results = {
        "pretraining": {"minutes": 3.04, "start": 4.5, "end": 0.59},
        "SFT": {"minutes": 4.5, "start": 0.0, "end": 0.9512, "facts": 0.9512},
    }
    assert table(stages, results).splitlines() == [
        "stage          minutes  measure                                start     end   facts",
        "pretraining        3.0  bits per byte                          4.500   0.590       -",
        "SFT                4.5  facts right                             0.0%   95.1%   95.1%",
        "all                7.5",
    ]
