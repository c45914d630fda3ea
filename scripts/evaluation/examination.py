"""Asking questions: the harness's prompts, each option's log-likelihood, and the chosen options."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM

from scripts.evaluation.tasks import Exam


@dataclass
class Answer:
    """A model's answer to a question.

    Attributes:
        exam: the exam's name.
        number: the question's number, from 0.
        prompt: the prompt; a list if each option has its own.
        options: the question's options; empty if a text is only to be continued.
        logprobs: each option's summed log-likelihood, in nats.
        target: the number of the right option; for a text to be continued, the continuation.
        greedy: whether greedy decoding gives the first continuation.
        row: identifies the question, whatever the prompt.
    """

    exam: str
    number: int
    prompt: str | list[str]
    options: list[str]
    logprobs: list[float]
    target: int | str
    greedy: bool
    row: str

    @property
    def chosen(self) -> int:
        """The most likely option; of equal ones the first, as in the harness."""
        return int(np.argmax(self.logprobs))

    @property
    def chosen_norm(self) -> int:
        """The option with the largest log-likelihood per character, likewise."""
        return int(np.argmax(np.array(self.logprobs) / [float(len(option)) for option in self.options]))

    @property
    def right(self) -> bool:
        return self.chosen == self.target if self.options else self.greedy

    @property
    def right_norm(self) -> bool:
        return self.chosen_norm == self.target

    def line(self) -> dict:
        """The line for --log_samples."""
        about = {"task": self.exam, "number": self.number, "prompt": self.prompt, "target": self.target}
        chosen = {"chosen": self.chosen, "chosen_norm": self.chosen_norm} if self.options else {}
        return about | {"options": self.options, "logprobs": self.logprobs} | chosen | {"right": self.right}


class Asked(NamedTuple):
    """A question as requests to a model, one for each of its options."""

    exam: Exam
    number: int
    row: dict
    requests: list[Instance]


def worded(
    exams: Iterable[Exam], lm: LM, chat: bool = False, limit: int | None = None, shuffle: int | None = None
) -> list[Asked]:
    """The questions of some exams.

    Args:
        chat: as a chat in the model's layout, with examples as earlier turns; otherwise as plain text.
        limit, shuffle: see `Exam.rows`.
    """
    how = {"apply_chat_template": chat, "chat_template": lm.apply_chat_template if chat else None}
    asked = []
    for exam in exams:
        task = exam.task
        task.set_fewshot_seed(exam.seed)  # every model sees the same examples
        for number, row in enumerate(exam.rows(limit, shuffle)):
            prompt = task.fewshot_context(row, task.config.num_fewshot, fewshot_as_multiturn=chat, **how)
            requests = task.construct_requests(row, prompt, metadata=(exam.name, number, 1), **how)
            asked.append(Asked(exam, number, row, requests if isinstance(requests, list) else [requests]))
    return asked


def ask(asked: Sequence[Asked], lm: LM) -> list[Answer]:
    """A model's answers to questions, which it gets all at once."""
    found = iter(lm.loglikelihood([request for question in asked for request in question.requests]))
    return [_answer(*question, [next(found) for _ in question.requests]) for question in asked]


def _answer(exam: Exam, number: int, row: dict, requests: list[Instance], found: list[tuple[float, bool]]) -> Answer:
    prompts = [request.args[0] for request in requests]
    options, target = [], exam.task.doc_to_target(row)
    if exam.task.OUTPUT_TYPE == "multiple_choice":
        options = exam.task.doc_to_choice(row)
        if exam.task.multiple_input:
            target = exam.task.doc_to_text(row)
        elif isinstance(target, str):
            target = options.index(target)
    prompt = prompts[0] if len(set(prompts)) == 1 else prompts
    logprobs, greedy = zip(*found, strict=True)
    key = hashlib.sha256(json.dumps(row, sort_keys=True, default=str).encode()).hexdigest()
    return Answer(exam.name, number, prompt, options, [*logprobs], target, bool(greedy[0]), key)
