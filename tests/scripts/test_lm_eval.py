"""lm-evaluation-harness scores a converted folder on a local file with the numbers that we compute ourselves."""

import pytest
import torch
import torch.nn.functional as F

from scripts.formats.transformers_folder import write_folder
from tests.conftest import write_jsonl
from tests.scripts.conversion import make_model

CASES = [
    {"question": "The capital of the green island is", "choices": [" Harbour Town", " a robot", " seven"], "gold": 0},
    {"question": "12 + 30 =", "choices": [" 42", " 24", " apples"], "gold": 0},
    {"question": "小岛上有什么？", "choices": ["一座城市", "老师", "三十"], "gold": 0},
    {"question": "Every question has", "choices": [" an answer", " the sea", " no end"], "gold": 0},
]


def test_lm_eval_scores_the_folder_as_we_do(tiny_tokenizer, tmp_path):
    lm_eval = pytest.importorskip("lm_eval", reason="lm_eval is not installed")
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    model = make_model(len(tiny_tokenizer))
    write_folder(model, tiny_tokenizer, tmp_path / "llama")
    write_jsonl(tmp_path / "cases.jsonl", CASES)
    task = {
        "task": "local_cases",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "cases.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{gold}}",
        "doc_to_choice": "{{choices}}",
        "target_delimiter": "",
    }
    out = lm_eval.simple_evaluate(
        model=HFLM(pretrained=str(tmp_path / "llama"), device="cpu", batch_size=2, dtype="float32"),
        tasks=[task],
        task_manager=TaskManager(),
        log_samples=True,
        bootstrap_iters=0,
    )
    samples = out["samples"]["local_cases"]
    assert len(samples) == len(CASES)
    for sample in samples:
        case = sample["doc"]
        scores = [float(response[0][0]) for response in sample["resps"]]
        assert scores == pytest.approx(
            [log_probability(model, tiny_tokenizer, case["question"], choice) for choice in case["choices"]], abs=1e-3
        )
    right = [max(range(3), key=lambda i: float(s["resps"][i][0][0])) == s["doc"]["gold"] for s in samples]
    assert out["results"]["local_cases"]["acc,none"] == sum(right) / len(right)


@torch.no_grad()
def log_probability(model, tokenizer, question: str, choice: str) -> float:
    """The log-probability of a choice's tokens after the question."""
    n = len(tokenizer.encode(question, add_special_tokens=False))
    ids = torch.tensor([tokenizer.encode(question + choice, add_special_tokens=False)])
    scores = F.log_softmax(model(ids).logits[0, :-1], dim=-1).gather(1, ids[0, 1:, None])[:, 0]
    return float(scores[n - 1 :].sum())
