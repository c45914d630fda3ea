"""Our harness model and the harness's own `hf` model, on the exported folder, agree question by question."""

import random
import re
import shutil

import lm_eval
import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from scripts.evaluation.examination import ask, worded
from scripts.evaluation.harness_model import MiniMindHarness
from scripts.evaluation.tasks import open_exams
from scripts.formats.transformers_folder import write_folder
from tests.conftest import SENTENCES
from tests.scripts.conversion import make_model, save_model
from tests.scripts.test_serve_openai_api import Started
from trainer.weights import SHIPPED_TOKENIZER, load_tokenizer

LIMIT = 2  # questions of each of the 7 subjects in ../shared


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


@pytest.fixture(scope="module", params=["Dense", "MoE"])
def both(request, tokenizer, tmp_path_factory):
    """Our model and theirs, with the same weights."""
    folder = tmp_path_factory.mktemp(request.param)
    return pair(make_model(len(tokenizer), use_moe=request.param == "MoE", max_seq_len=2048), tokenizer, folder)


def pair(model, tokenizer, folder) -> tuple[MiniMindHarness, HFLM]:
    write_folder(model, tokenizer, folder)
    theirs = HFLM(str(folder), device="cpu", dtype="float32", batch_size=4)
    return MiniMindHarness(model, tokenizer, batch_size=4), theirs


def requests(method: str, arguments: list[tuple]) -> list[Instance]:
    return [Instance(method, {}, these, number) for number, these in enumerate(arguments)]


def assert_alike(ours: list[tuple[float, bool]], theirs: list[tuple[float, bool]]) -> None:
    assert [logprob for logprob, _ in ours] == pytest.approx([logprob for logprob, _ in theirs], abs=1e-3)
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]


@pytest.mark.parametrize(("shots", "chat"), [(0, False), (5, False), (0, True), (2, True)])
def test_every_question_of_cmmlu_is_answered_alike(both, shared, shots, chat):
    ours, theirs = both
    answers = ask(worded(open_exams(["cmmlu"], shared / "data", shots, 7), ours, chat, LIMIT), ours)
    exams = list(open_exams(["cmmlu"], shared / "data", shots, 7))
    for exam in exams:
        exam.task.set_fewshot_seed(exam.seed)
    harness = lm_eval.evaluate(  # not simple_evaluate, which first collects information on the machine
        theirs,
        {"tasks": {exam.task.config.task: exam.task for exam in exams}},
        limit=LIMIT,
        bootstrap_iters=0,
        apply_chat_template=chat,
        fewshot_as_multiturn=chat,
    )
    samples = [sample for exam in exams for sample in harness["samples"][exam.task.config.task]]
    assert len(answers) == len(samples) == 7 * LIMIT
    for answer, sample in zip(answers, samples, strict=True):
        assert answer.prompt == sample["arguments"][0][0]
        assert answer.logprobs == pytest.approx([float(option[0][0]) for option in sample["resps"]], abs=1e-3)
        assert (answer.right, answer.right_norm) == (sample["acc"], sample["acc_norm"])
    for exam in exams:
        right = [answer.right for answer in answers if answer.exam == exam.name]
        assert harness["results"][exam.task.config.task]["acc,none"] == pytest.approx(sum(right) / len(right))


def test_a_text_without_a_context_and_one_with_spaces_at_its_end_are_read_alike(both):
    asked = requests(
        "loglikelihood", [("", "你好"), ("", "<s>你好"), ("The sea ", "is"), ("<s>user\n", "你好"), ("a", " b")]
    )
    assert_alike(*(lm.loglikelihood(asked, disable_tqdm=True) for lm in both))


def test_texts_are_weighed_alike_in_rolling_windows(both):
    ours, theirs = both
    asked = requests("loglikelihood_rolling", [(" ".join(SENTENCES * n),) for n in (1, 12)])
    found = [lm.loglikelihood_rolling(asked, disable_tqdm=True) for lm in (ours, theirs)]
    assert found[0] == pytest.approx(found[1], abs=1e-2)


def test_greedy_answers_are_alike(both):
    until = {"until": ["\n\n"], "max_gen_toks": 12, "do_sample": False}
    asked = requests("generate_until", [(sentence[:20], until) for sentence in SENTENCES])
    ours, theirs = (lm.generate_until(asked, disable_tqdm=True) for lm in both)
    assert ours == theirs


@pytest.mark.parametrize("silent", [True, False, None])
def test_how_far_it_is_shows_where_nobody_wants_it_silent(both, capsys, silent):
    """None: no progress bar, as the harness asks."""
    ours, how = both[0], {} if silent is None else {"disable_tqdm": silent}
    ours.loglikelihood(requests("loglikelihood", [("The", " sea"), ("The", " sky")]), **how)
    ours.generate_until(requests("generate_until", [("The", {"until": ["."], "max_gen_toks": 2})]), **how)
    shown = re.findall(r"([\w-]+): 100%.* (\d)/", capsys.readouterr().err)
    assert shown == ([] if silent else [("log-likelihoods", "2"), ("answers", "1")])


@pytest.mark.parametrize("shots", [0, 5])
def test_what_is_too_long_is_cut_alike(tokenizer, shared, tmp_path, shots):
    ours, theirs = pair(make_model(len(tokenizer), max_seq_len=128), tokenizer, tmp_path)
    draw = random.Random(0)
    texts = ["".join(draw.choice(SENTENCES) for _ in range(9)) for _ in range(4)]
    asked = worded(open_exams(["cmmlu"], shared / "data", shots, 0), ours, limit=1)
    some = [request for question in asked for request in question.requests]
    some += requests("loglikelihood", [(text, option) for text in texts for option in (" A", " a longer one")])
    assert_alike(*(lm.loglikelihood(some, disable_tqdm=True) for lm in (ours, theirs)))


def test_our_server_chooses_alike_through_local_completions(tokenizer, shared, tmp_path):
    pytest.importorskip("tenacity", reason="lm_eval[api] is not installed")
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    model = make_model(len(tokenizer), max_seq_len=2048)
    save_model(model, tokenizer, tmp_path / "full_sft_64.pth")
    folder = shutil.copytree(SHIPPED_TOKENIZER, tmp_path / "tokenizer")
    ours = MiniMindHarness(model, tokenizer, batch_size=4)
    exams = list(open_exams(["cmmlu"], shared / "data", 0, 0))[:2]
    answers = ask(worded(exams, ours, limit=3), ours)
    server = Started("--out_dir", tmp_path, "--dim", "64", "--n_layers", "2", "--device", "cpu")
    try:
        remote = LocalCompletionsAPI(
            base_url=f"{server.address}/v1/completions",
            model="minimind",
            tokenizer=str(folder),
            tokenizer_backend="huggingface",
            max_length=2048,
        )
        theirs = ask(worded(exams, ours, limit=3), remote)
    finally:
        server.stop()
    assert [answer.chosen for answer in answers] == [answer.chosen for answer in theirs]
    for answer, other in zip(answers, theirs, strict=True):
        assert answer.logprobs == pytest.approx(other.logprobs, abs=1e-3)


def test_an_adapter_is_merged_and_a_vlm_is_asked_by_its_language_half(tokenizer, clip_dir):
    from model.model_lora import apply_lora
    from model.model_vlm import MiniMindVLM, VLMConfig

    asked = requests("loglikelihood", [(SENTENCES[0], " and"), (SENTENCES[4], "好")])
    vlm = MiniMindVLM(VLMConfig(dim=64, n_layers=2, vocab_size=len(tokenizer), image_token_id=34), str(clip_dir)).eval()
    adapted = make_model(len(tokenizer))
    apply_lora(adapted, rank=2)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora" in name:
                parameter.normal_(std=0.2)
    for model in (vlm, adapted):
        found = MiniMindHarness(model, tokenizer).loglikelihood(asked, disable_tqdm=True)
        for (logprob, _), request in zip(found, asked, strict=True):
            texts = (request.args[0], "".join(request.args))
            context, whole = (tokenizer.encode(text, add_special_tokens=False) for text in texts)
            with torch.no_grad():
                logprobs = model(torch.tensor([whole])).logits[0].log_softmax(-1)
            places = range(len(context), len(whole))
            assert logprob == pytest.approx(sum(float(logprobs[i - 1, whole[i]]) for i in places), abs=1e-3)
