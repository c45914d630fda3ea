"""Black-box distillation: ask a larger model behind any OpenAI-compatible endpoint, keep its answers to learn from.

    python scripts/collect_teacher_answers.py questions.jsonl dataset/answers.jsonl --model NAME
        --base_url http://127.0.0.1:8998/v1 --concurrency 16

A question is a line {"question": "…"}, or {"conversations": […]}, of which everything up to the last user turn is sent.
An answer is written the moment it comes, as a line to fine-tune on, so that Ctrl-C loses none, and a second run asks
only what has no answer yet. When all have one, the lines stand in the order of the questions. --thinking keeps what a
reasoning model thought, in the form that train_distill_reason.py learns.

The key is --api_key or the environment's OPENAI_API_KEY; local servers mostly want none.
"""

import asyncio
import fcntl
import hashlib
import json
import os
import signal
import sys
from collections import Counter, defaultdict, deque
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import _repo  # noqa: F401  (lets `python scripts/collect_teacher_answers.py` find the rooms)

from scripts.remote_chat import check_address
from trainer.arguments import Parser, Switch, above_zero, not_negative, positive
from trainer.errors import UserError, launch

GIVE_UP_AFTER = 10  # questions without an answer, one after the other: then it is not the questions

Chat = list[dict[str, str]]


class NoAnswer(Exception):
    """The endpoint answered, but with nothing to learn from; the message says why."""


def get_args():
    parser = Parser(__doc__)
    parser.add_argument("questions", type=Path, help="jsonl of questions")
    parser.add_argument("answers", type=Path, help="jsonl to write, or to go on with")
    parser.add_argument("--model", required=True, help="the teacher's name at the endpoint")
    parser.add_argument("--base_url", default=None, help="of the endpoint (default: OPENAI_BASE_URL, or OpenAI's own)")
    parser.add_argument("--api_key", default=None, help="default: the environment's OPENAI_API_KEY")
    parser.add_argument("--system", default=None, help="system prompt for chats that have none")
    parser.add_argument("--temperature", type=float, default=None, help="default: the endpoint's own")
    parser.add_argument("--max_tokens", type=positive, default=None, help="of an answer (default: the endpoint's own)")
    parser.add_argument("--thinking", action=Switch, help="keep the thinking of a reasoning model, in tags")
    parser.add_argument("--concurrency", type=positive, default=8, help="questions asked at once")
    parser.add_argument("--retries", type=not_negative, default=6, help="of a question, waiting longer each time")
    parser.add_argument("--timeout", type=above_zero, default=300, help="seconds to wait for an answer")
    parser.add_argument("--skip_bad_lines", action=Switch, help="count and report bad lines instead of stopping")
    return parser.parse_args()


def key_of(chat: Chat) -> bytes:
    """Tells one question from another."""
    return hashlib.sha256(json.dumps(chat).encode()).digest()[:16]


class AnswerFile:
    """The file of answers: `{"conversations": [question…, answer], "model": NAME}` lines.

    Attributes:
        answered: how often each question, by its key, has an answer there.

    Raises (on construction):
        UserError: it cannot be written, another run writes to it, or it holds a line that is no answer of this model
            to these questions.
    """

    def __init__(self, path: Path, model: str, questions: Counter[bytes]):
        self.path = path
        self.model = model
        self.answered: Counter[bytes] = Counter()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(path, "a+b", buffering=0)  # noqa: SIM115 - open, and locked, as long as the object lives
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}") from None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{path}: another run is writing to it") from None
        for number, (key, _, line_model) in enumerate(self._lines(), 1):
            self.answered[key] += 1
            if line_model != model or self.answered[key] > questions[key]:
                raise UserError(
                    f"{path}, line {number} is no answer of {model} to one of these questions: nothing was changed; "
                    "name another file, or the questions and the --model, --system it was made with"
                )

    def _lines(self) -> Iterator[tuple[bytes, bytes, str | None]]:
        """The key, the bytes and the model of each line; no key where the line is none of ours."""
        self._file.seek(0)
        for line in self._file.readlines():
            try:
                record = json.loads(line)
                yield key_of(record["conversations"][:-1]), line, record["model"]
            except (ValueError, KeyError, TypeError):
                yield b"", line, None

    def add(self, chat: Chat, answer: str) -> None:
        """Append an answer.

        Raises:
            UserError: it could not be written; the file is as it was.
        """
        turns = [*chat, {"role": "assistant", "content": answer}]
        line = json.dumps({"conversations": turns, "model": self.model}, ensure_ascii=False).encode() + b"\n"
        size = os.fstat(self._file.fileno()).st_size
        try:
            if self._file.write(line) != len(line):
                raise OSError("no space left on the device")
        except OSError as error:
            os.truncate(self.path, size)
            raise UserError(f"cannot write {self.path}: {error.strerror or error}; make room and start again") from None
        self.answered[key_of(chat)] += 1

    def sort(self, questions: Iterator[Chat]) -> None:
        """Put the lines into the order of the questions."""
        from trainer.files import replacing

        lines: dict[bytes, deque[bytes]] = defaultdict(deque)
        for key, line, _ in self._lines():
            lines[key].append(line)
        with replacing(self.path) as temporary, open(temporary, "wb") as file:
            for key in map(key_of, questions):
                if lines[key]:
                    file.write(lines[key].popleft())


async def ask_all(
    pending: Iterator[Chat], ask: Callable[[Chat], Awaitable[str]], answers: AnswerFile, concurrency: int, progress
) -> str | None:
    """Ask every question, some at once; an answer is written the moment it comes.

    The first Ctrl-C (or SIGTERM) lets those that are being asked finish, a second one does not.

    Returns:
        why it stopped before the end, or None.
    """
    import openai

    hopeless = (openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError)
    reason: str | None = None
    failed_in_a_row = 0

    async def worker() -> None:
        nonlocal reason, failed_in_a_row
        while reason is None and (chat := next(pending, None)) is not None:
            try:
                answers.add(chat, await ask(chat))
                failed_in_a_row = 0
                progress.update()
            except (openai.OpenAIError, NoAnswer) as error:
                failed_in_a_row += 1
                progress.write(f"no answer to {chat[-1]['content'][:60]!r}: {error}", file=sys.stderr)
                if isinstance(error, hopeless) or failed_in_a_row >= GIVE_UP_AFTER:
                    reason = f"{failed_in_a_row} question(s) in a row got no answer, the last: {error}"

    def on_signal() -> None:
        nonlocal reason
        if reason is not None:
            for task in tasks:
                task.cancel()
        reason = "interrupted"
        progress.write("finishing the questions that are being asked (again: stop at once)", file=sys.stderr)

    loop = asyncio.get_running_loop()
    tasks = [asyncio.create_task(worker()) for _ in range(concurrency)]
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, on_signal)
    for done in await asyncio.gather(*tasks, return_exceptions=True):
        if isinstance(done, Exception):
            raise done
    return reason


def answer_of(completion, thinking: bool) -> str:
    """The text to learn from a chat completion.

    Raises:
        NoAnswer: there is none, or it is cut off.
    """
    from model.reasoning import is_well_formed

    if not getattr(completion, "choices", None) or completion.choices[0].message is None:
        raise NoAnswer("the endpoint sent no choices (does its address end in /v1?)")
    choice = completion.choices[0]
    answer = (choice.message.content or "").strip()
    if choice.finish_reason == "length":
        raise NoAnswer("cut off at the token limit (--max_tokens raises it)")
    if not answer:
        raise NoAnswer("it is empty")
    if thinking and not is_well_formed(answer):
        thought = (getattr(choice.message, "reasoning_content", None) or "").strip()
        answer = f"<think>\n{thought}\n</think>\n<answer>\n{answer}\n</answer>"
        if not is_well_formed(answer):
            raise NoAnswer("no reasoning_content came with it" if not thought else "its thinking holds tags")
    return answer


def main():
    args = get_args()
    import openai  # after the arguments: --help need not wait for it
    from tqdm import tqdm

    from dataset.jsonl import JsonlReader
    from dataset.records import question_of

    api_key = args.api_key or os.environ.get("OPENAI_API_KEY") or "none"
    check_address(args.base_url, api_key)

    def questions() -> Iterator[Chat]:
        for chat in JsonlReader(args.questions, question_of, args.skip_bad_lines):
            has_system = chat[0]["role"] == "system"
            yield chat if has_system or not args.system else [{"role": "system", "content": args.system}, *chat]

    asked = Counter(map(key_of, questions()))  # also shows every bad line before the first question is asked
    answers = AnswerFile(args.answers, args.model, asked)
    found = answers.answered.total()

    def pending() -> Iterator[Chat]:
        there = answers.answered.copy()
        for chat in questions():
            there[key_of(chat)] -= 1
            if there[key_of(chat)] < 0:
                yield chat

    given = {"temperature": args.temperature, "max_tokens": args.max_tokens}
    settings = {name: value for name, value in given.items() if value is not None}

    async def run(progress) -> str | None:
        async with openai.AsyncOpenAI(
            base_url=args.base_url,
            api_key=api_key,
            max_retries=args.retries,
            timeout=args.timeout,
        ) as client:

            async def ask(chat: Chat) -> str:
                completion = await client.chat.completions.create(model=args.model, messages=chat, **settings)
                return answer_of(completion, args.thinking)

            return await ask_all(pending(), ask, answers, args.concurrency, progress)

    with tqdm(total=asked.total(), initial=found, unit="answer", disable=None) as progress:
        reason = asyncio.run(run(progress))
    total, written = asked.total(), answers.answered.total()
    print(f"{args.answers}: {written} of {total} questions are answered, {written - found} of them now")
    if reason == "interrupted":
        sys.exit(130)
    if reason:
        raise UserError(f"{reason}; the same command goes on from here")
    answers.sort(questions())
    if written < total:
        raise UserError(f"{total - written} questions got no answer (see above); the same command asks them again")


if __name__ == "__main__":
    launch(main)
