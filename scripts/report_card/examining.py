"""The evaluation of each model for a report: in parts, each of which is done only once."""

import functools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from dataset.lm_dataset import split_samples
from eval_model import SAMPLE_BEGINNINGS, SAMPLE_QUESTIONS
from model import MiniMindLM
from model.chat import render_chats, render_text
from model.inference.request import Request
from model.inference.scheduler import Engine
from model.reasoning import split_reasoning
from scripts.demo.exam import answer, read_lines
from scripts.demo.scoring import tally
from scripts.demo.settings import DATA
from scripts.evaluation import require_harness
from scripts.evaluation.likelihoods import Likelihoods, Question
from scripts.evaluation.perplexity import Predicted, predict_texts, read_texts
from scripts.report_card.kept import Kept
from scripts.report_card.stages_found import Found, found_at
from trainer.device import pick_device
from trainer.errors import UserError, print_notice
from trainer.files import file_hash
from trainer.loading import load_for_inference
from trainer.weight_files import read_weights

WINDOW = 512  # tokens that are read at once of a text to predict
LONGEST_ANSWER = 128  # tokens
DEMO_QUESTIONS = (
    "你是谁？",
    "中国的首都是哪里？",
    "Who made you?",
    "What is the chemical symbol of gold?",
    "What is 12 + 30?",
)
DEMO_BEGINNINGS = ("中国的首都是", "The chemical symbol of gold is")


class DemoExam(NamedTuple):
    """Held-out questions of the demo, scored by exact match."""

    title: str
    max_new_tokens: int = 48
    of_stage: str | None = None  # None: of all that chat

    def ask(self, name: str, model: MiniMindLM, tokenizer: PreTrainedTokenizerBase) -> dict:
        """{language: [right, asked]}, greedy; thinking is ignored."""
        lines = read_lines(DATA / name)
        replies, _ = answer(model, tokenizer, [line["question"] for line in lines], max_new_tokens=self.max_new_tokens)
        counts = tally(lines, [split_reasoning(reply)[1] for reply in replies])
        return by_language(counts)


def by_language(counts: dict[tuple[str, str], tuple[int, int]]) -> dict[str, list[int]]:
    """{language: [right, asked]} from a tally."""
    return {lang: [*count] for (lang, kind), count in sorted(counts.items()) if kind == "all"}


DEMO_EXAMS = {
    "eval_facts.jsonl": DemoExam("facts"),
    "eval_identity.jsonl": DemoExam("who it is"),
    "eval_lora_identity.jsonl": DemoExam("who it is now", of_stage="lora"),
    "eval_arithmetic.jsonl": DemoExam("sums"),
    "eval_reason.jsonl": DemoExam("problems", 96, of_stage="reason"),
}


class Part(NamedTuple):
    """A part of a model's evaluation.

    Attributes:
        name: its key in the stored json.
        asked: JSON values; the result is valid as long as they are the same.
        measure: returns the result as JSON values.
    """

    name: str
    asked: object
    measure: Callable[[MiniMindLM, PreTrainedTokenizerBase], dict]


class HeldOut(NamedTuple):
    """The text that every model predicts."""

    title: str
    texts: list[str]


def held_out_text(file: Path | None, stages: Iterable[Found]) -> HeldOut | None:
    """The file that the user names, or for the demo's models their pretraining's held-out text; else None.

    Raises:
        UserError, DataError: as in `read_texts`; there is no text.
    """
    if file is not None:
        texts = list(read_texts(file))
        if not any(texts):
            raise UserError(f"--ppl {file} contains no text")
        return HeldOut(file.name, texts)
    file = DATA / "pretrain_hq.jsonl"
    if not any(found.is_of_the_demo for found in stages) or not file.is_file():
        return None
    texts = list(read_texts(file))
    return HeldOut(f"Held out of {file.name} in pretraining", [texts[i] for i in split_samples("eval", len(texts))])


def predict(texts: list[str], model: MiniMindLM, tokenizer: PreTrainedTokenizerBase) -> Predicted:
    """The same as `scripts/eval_benchmarks.py --ppl`, without the harness."""
    likelihoods = Likelihoods(model, 16)

    def encode(some: list[str]) -> list[list[int]]:
        return [ids[1:-1] for ids in render_text(tokenizer, some)]

    def log_probs(parts: list[tuple[list[int], list[int]]]) -> Iterator[float]:
        for _, (found,) in likelihoods.of([Question(context, [predicted]) for context, predicted in parts]):
            yield found.logprob

    window = min(WINDOW, model.config.max_seq_len)
    return predict_texts(texts, window, tokenizer.bos_token_id, encode, log_probs)


def write_answers(
    questions: tuple[str, ...], chats: bool, model: MiniMindLM, tokenizer: PreTrainedTokenizerBase
) -> dict[str, str]:
    """{question: the model's greedy answer}; a model that does not chat continues the question as a text."""
    turns = [[{"role": "user", "content": question}] for question in questions]
    prompts = [ids for ids, _ in render_chats(tokenizer, turns, add_generation_prompt=True)]
    if not chats:
        prompts = [ids[:-1] for ids in render_text(tokenizer, questions)]
    room = model.config.max_seq_len - max(map(len, prompts))
    if room < 1:
        raise UserError(f"the model takes {model.config.max_seq_len} tokens, too few for a question and an answer")
    requests = [Request(prompt=ids, max_new_tokens=min(LONGEST_ANSWER, room)) for ids in prompts]
    answers = Engine(model, tokenizer, slots=len(questions)).run(requests)
    return {question: answer.text for question, answer in zip(questions, answers, strict=True)}


class Benchmarks:
    """The benchmarks whose files are in a folder, DATA_DIR/NAME/….

    Raises:
        UserError: it is not a folder, has no benchmarks, or the harness is not installed.
    """

    def __init__(self, data_dir: Path, num_fewshot: int, limit: int | None):
        try:
            require_harness()
        except UserError as error:
            raise UserError(f"--data_dir: {error}") from None
        from scripts.evaluation.tasks import BENCHMARKS, FETCHED_ONLY

        names = [name for name in BENCHMARKS if name not in FETCHED_ONLY]
        if not data_dir.is_dir():
            raise UserError(f"--data_dir {data_dir} is not a folder")
        self.names = [name for name in names if (data_dir / name).is_dir()]
        if not self.names:
            raise UserError(f"--data_dir {data_dir} has no folder by the name of a benchmark: {', '.join(names)}")
        self.data_dir, self.num_fewshot, self.limit = data_dir, num_fewshot, limit
        self.exams = functools.cache(self._exams)

    def asked(self, name: str) -> dict:
        """The values that identify an evaluation of a benchmark."""
        folder = self.data_dir / name
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        hashes = {path.relative_to(folder).as_posix(): file_hash(path) for path in files}
        return {"files": hashes, "num_fewshot": self.num_fewshot, "limit": self.limit}

    def _exams(self, name: str) -> list:
        from scripts.evaluation.tasks import open_exams

        return list(open_exams([name], self.data_dir, self.num_fewshot, seed=1234))

    def ask(self, name: str, model: MiniMindLM, tokenizer: PreTrainedTokenizerBase) -> dict:
        """The scores of the benchmark, its groups and its subjects; see `results_of`."""
        from scripts.evaluation.examination import ask, worded
        from scripts.evaluation.harness_model import MiniMindHarness
        from scripts.evaluation.results import results_of

        lm = MiniMindHarness(model, tokenizer)
        return results_of(self.exams(name), ask(worded(self.exams(name), lm, limit=self.limit), lm))


def parts_of(found: Found, held_out: HeldOut | None, benchmarks: Benchmarks | None) -> Iterator[Part]:
    """The parts of a model's evaluation."""

    def parameters(model: MiniMindLM, tokenizer: PreTrainedTokenizerBase) -> dict:
        tensors = read_weights(found.path).state.values() if found.is_adapter else model.parameters()
        return {"parameters": sum(tensor.numel() for tensor in tensors)}

    yield Part("parameters", None, parameters)
    demo = found.is_of_the_demo
    if found.chats:
        questions = DEMO_QUESTIONS if demo else SAMPLE_QUESTIONS
    else:
        questions = DEMO_BEGINNINGS if demo else SAMPLE_BEGINNINGS
    yield Part("answers", [*questions, LONGEST_ANSWER], functools.partial(write_answers, questions, found.chats))
    if held_out:
        yield Part(
            "held out",
            [held_out.texts, WINDOW],
            lambda model, tokenizer: predict(held_out.texts, model, tokenizer)._asdict(),
        )
    for name, exam in DEMO_EXAMS.items() if demo and found.chats else ():
        if exam.of_stage in (None, found.stage) and (DATA / name).is_file():
            yield Part(f"exam {name}", exam_asked(name), functools.partial(exam.ask, name))
    for name in benchmarks.names if benchmarks else ():
        yield Part(f"benchmark {name}", benchmarks.asked(name), functools.partial(benchmarks.ask, name))


def kept_of(found: Found, out_dir: Path, tokenizer: str | None = None) -> Kept:
    """The stored results of a model in a folder.

    Raises:
        UserError: as in `Found.hash`.
    """
    return Kept(out_dir / "report" / f"{found.name}.json", f"{found.hash()} {tokenizer or ''}".strip())


def remember_exam(out_dir: Path, model: str, name: str, counts: dict[str, list[int]]) -> None:
    """Store the results of the demo's own evaluation, so that its report need not repeat it.

    Args:
        name: the name of a file in `DEMO_EXAMS`; counts: as from `DemoExam.ask`.
    """
    kept = kept_of(found_at(out_dir / f"{model}.pth", model), out_dir)
    kept.put(f"exam {name}", exam_asked(name), counts)


def exam_asked(name: str) -> list:
    """The values that identify an evaluation of one of the demo's exams."""
    return [file_hash(DATA / name), DEMO_EXAMS[name].max_new_tokens]


def examine(found: Found, parts: Iterable[Part], kept: Kept, tokenizer: str | None, device: str | None) -> dict:
    """{part: result}; the model is loaded only if a result is missing.

    Raises:
        UserError: the weights cannot be loaded.
    """
    results, opened = {}, None
    for part in parts:
        results[part.name] = kept.get(part.name, part.asked)
        if results[part.name] is not None:
            continue
        if opened is None:
            weights, adapter = (found.base, found.path) if found.is_adapter else (found.path, None)
            model, loaded = load_for_inference(weights, tokenizer, adapter)
            opened = model.to(pick_device(device)), loaded
        print_notice(f"{found.name}: {part.name}")
        results[part.name] = part.measure(*opened)
        kept.put(part.name, part.asked, results[part.name])
    return results
