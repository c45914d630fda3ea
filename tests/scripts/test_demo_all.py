"""scripts/demo_all.py: what it trains, resumes and examines on a first, a second and a changed call."""

import json

import pytest
import torch

from model import LMConfig, MiniMindLM
from model.tokenizer import tokenizer_hash
from scripts import demo_all
from scripts.demo_all import Stage, table
from trainer.weights import architecture, load_tokenizer


@pytest.fixture
def ran():
    """The last flag of every command that was run."""
    return []


@pytest.fixture
def out(tmp_path, monkeypatch, ran):
    """An out/demo with a trained base; a command is noted, and trains for one step."""
    monkeypatch.setattr(demo_all, "OUT", tmp_path)
    monkeypatch.setattr(demo_all, "make_model", lambda: None)
    monkeypatch.setattr(demo_all, "facts", lambda model, tokenizer: 0.5)

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
    """Weights that hold how often they were trained."""
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
    assert "second             1.5  how far                                10.0%   10.0%   50.0%" in shown

    demo_all.main()
    assert ran == ["--resume", "--resume"]
    assert measured == [1, 1, 1, 1]
    assert "in detail" in capsys.readouterr().out

    save(out, "base", 7)
    demo_all.main()
    assert ran == ["--resume", "--resume", "--overwrite"]
    assert measured == [1, 1, 1, 1, 1, 7, 7, 1]


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


def test_the_table():
    stages = (
        Stage("pretraining", (), None, "a", "bits a byte", None, "{:.3f}", answers=False),
        Stage("SFT", (), "a", "b", "facts right", None),
    )
    results = {
        "pretraining": {"minutes": 3.04, "start": 4.5, "end": 0.59},
        "SFT": {"minutes": 4.5, "start": 0.0, "end": 0.9512, "facts": 0.9512},
    }
    assert table(stages, results).splitlines() == [
        "stage          minutes  measure                                start     end   facts",
        "pretraining        3.0  bits a byte                            4.500   0.590       -",
        "SFT                4.5  facts right                             0.0%   95.1%   95.1%",
        "all                7.5",
    ]
