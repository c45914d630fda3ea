"""Black-box distillation: ask a larger model behind any OpenAI-compatible endpoint, and keep its answers to train on.

    python scripts/collect_teacher_answers.py questions.jsonl dataset/answers.jsonl --model NAME
        --base_url http://127.0.0.1:8998/v1 --concurrency 16

A question is a line {"question": "…"}, or {"conversations": […]}, of which everything up to the last user turn is sent;
"system" beside either is its system prompt. Other keys of a line are counted by name.
Each answer is written as soon as it arrives, as a line to fine-tune on, so that Ctrl-C loses none, and a second run
asks only the questions without an answer. When all are answered, the lines are in the order of the questions.
--thinking keeps a reasoning model's thoughts, in the form that train_distill_reason.py learns.

The address is --base_url or the environment's OPENAI_BASE_URL, or else OpenAI's own; the key --api_key or the
environment's OPENAI_API_KEY; most local servers need none.
"""

import asyncio
import hashlib
import json
import os
import signal
import sys
from collections import Counter, defaultdict, deque
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import _repo  # noqa: F401  (lets `python scripts/collect_teacher_answers.py` find the packages)

from scripts.serving.client import explain_failure, open_client
from trainer.argument_types import BooleanFlag, non_negative_int, positive_float, positive_int, text
from trainer.arguments import Parser
from trainer.errors import UserError, print_notice, run_main

Chat = list[dict]  # of turns, as dataset/records.py has them


class NoAnswer(Exception):
    """The endpoint's answer cannot be trained on; the message says why."""


def get_args():
    parser = Parser(__doc__)
    parser.add_argument("questions", type=Path, help="jsonl of questions")
    parser.add_argument("answers", type=Path, help="jsonl to write, or to continue")
    parser.add_argument("--model", type=text, required=True, help="the teacher's model name at the endpoint")
    parser.add_argument(
        "--base_url",
        default=os.environ.get("OPENAI_BASE_URL") or "https://api.openai.com/v1",
        help="base URL of the endpoint (default: OPENAI_BASE_URL, or OpenAI's own)",
    )
    parser.add_argument("--api_key", default=None, help="default: OPENAI_API_KEY from the environment")
    parser.add_argument("--system", type=text, default=None, help="system prompt for chats that have none")
    parser.add_argument("--temperature", type=float, default=None, help="default: the endpoint's own")
    parser.add_argument(
        "--max_tokens",
        type=positive_int,
        default=None,
        help="maximum answer length in tokens (default: the endpoint's own)",
    )
    parser.add_argument("--thinking", action=BooleanFlag, help="keep the thinking of a reasoning model, in tags")
    parser.add_argument("--concurrency", type=positive_int, default=8, help="concurrent requests")
    parser.add_argument(
        "--retries", type=non_negative_int, default=6, help="attempts per question, with exponential backoff"
    )
    parser.add_argument(
        "--give_up_after",
        type=positive_int,
        default=10,
        help="stop after this many failed questions in a row",
    )
    parser.add_argument("--timeout", type=positive_float, default=300, help="seconds to wait for an answer")
    parser.add_argument("--skip_bad_lines", action=BooleanFlag, help="count and report bad lines instead of stopping")
    return parser.parse_args()


def chat_key(chat: Chat) -> bytes:
    """A key that identifies a question."""
    return hashlib.sha256(json.dumps(chat).encode()).digest()[:16]


class AnswerFile:
    """The file of answers: `{"conversations": [question…, answer], "model": NAME, "thinking": BOOL}` lines.

    Args:
        made_by: the fields that are the same in every line: the model's name and whether thinking is kept.
        questions: the number of times that each question is asked, by its key.

    Attributes:
        answered: the number of answers to each question in the file, by its key.

    Raises (on construction):
        UserError: it is not writable, another run writes to it, or a line in it is not this model's answer to one of
            these questions in this form.
    """

    def __init__(self, path: Path, made_by: dict[str, str | bool], questions: Counter[bytes]):
        self.path = path
        self.made_by = made_by
        self.answered: Counter[bytes] = Counter()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(path, "a+b", buffering=0)  # noqa: SIM115 - open, and locked, as long as the object lives
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}") from None
        self._lock = self._locked()
        for number, (key, _, made_by_same) in enumerate(self._lines(), 1):
            self.answered[key] += 1
            if not made_by_same or self.answered[key] > questions[key]:
                raise UserError(
                    f"{path}, line {number} is not an answer by {made_by['model']} to one of these questions: "
                    "nothing was changed; give another file, or the questions and the --model, --system, --thinking "
                    "it was made with"
                )

    def _locked(self):
        """The lock that keeps a second run from writing to the file; None on a file system without locks."""
        from dataset.locks import lock

        place = self.path.resolve()  # by whatever name the file is opened
        try:
            held = lock(place.with_name(f".{place.name}.lock"), wait=False)
        except OSError:
            return None
        if held is None:
            raise UserError(f"{self.path}: another run is writing to it")
        return held

    def _lines(self) -> Iterator[tuple[bytes, bytes, bool]]:
        """Each line's key, its bytes, and whether it has this run's settings; the key is empty for a foreign line."""
        self._file.seek(0)
        for line in self._file.readlines():
            try:
                record = json.loads(line)
                yield chat_key(record.pop("conversations")[:-1]), line, record == self.made_by
            except (ValueError, KeyError, TypeError, AttributeError):
                yield b"", line, False

    def add(self, chat: Chat, answer: str) -> None:
        """Append an answer.

        Raises:
            UserError: it could not be written; the file is unchanged.
        """
        turns = [*chat, {"role": "assistant", "content": answer}]
        line = json.dumps({"conversations": turns, **self.made_by}, ensure_ascii=False).encode() + b"\n"
        size = os.fstat(self._file.fileno()).st_size
        try:
            if self._file.write(line) != len(line):
                raise OSError("no space left on the device")
        except OSError as error:
            self._file.truncate(size)
            raise UserError(
                f"cannot write {self.path}: {error.strerror or error}; free some space and run again"
            ) from None
        self.answered[chat_key(chat)] += 1

    def sort(self, questions: Iterator[Chat]) -> None:
        """Sort the lines in the order of the questions; lines whose question no longer exists come last."""
        from trainer.files import replacing

        lines: dict[bytes, deque[bytes]] = defaultdict(deque)
        for key, line, _ in self._lines():
            lines[key].append(line)
        self._file.close()  # Windows replaces no open file
        with replacing(self.path) as temporary, open(temporary, "wb") as file:
            for key in map(chat_key, questions):
                if lines[key]:
                    file.write(lines[key].popleft())
            for rest in lines.values():
                file.writelines(rest)


async def ask_all(
    pending: Iterator[Chat],
    ask: Callable[[Chat], Awaitable[str]],
    answers: AnswerFile,
    concurrency: int,
    give_up_after: int,
    progress,
) -> str | None:
    """Ask every question, several at once; an answer is written as soon as it arrives.

    The first Ctrl-C (or SIGTERM) lets running requests finish, a second one does not.

    Args:
        give_up_after: stop after this many questions in a row without an answer.

    Returns:
        the reason for stopping early, or None.
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
                if isinstance(error, hopeless) or failed_in_a_row >= give_up_after:
                    reason = (
                        f"{failed_in_a_row} question(s) in a row got no answer (--give_up_after {give_up_after}), "
                        f"the last: {error}"
                    )

    def stop() -> None:
        nonlocal reason
        if reason is not None:
            for task in tasks:
                task.cancel()
        reason = "interrupted"
        progress.write("finishing the requests in progress (again: stop at once)", file=sys.stderr)

    loop = asyncio.get_running_loop()
    tasks = [asyncio.create_task(worker()) for _ in range(concurrency)]
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in before:  # the loop's own add_signal_handler is Unix's alone
        signal.signal(number, lambda *_: loop.call_soon_threadsafe(stop))
    ended = await asyncio.gather(*tasks, return_exceptions=True)
    for number, handler in before.items():
        signal.signal(number, handler)
    for done in ended:
        if isinstance(done, Exception):
            raise done
    return reason


def parse_text(content) -> str:
    """The text of a message; the client may return any type that an endpoint sends.

    Raises:
        NoAnswer: it is not text, or contains a lone surrogate, which UTF-8 cannot encode.
    """
    if not isinstance(content, str | None):
        raise NoAnswer(f"it is not text but {str(content)[:60]}")
    try:
        return (content or "").encode().decode().strip()
    except UnicodeEncodeError:
        raise NoAnswer("it contains a lone surrogate (half a character)") from None


def extract_answer(completion, thinking: bool) -> str:
    """The text of a chat completion to train on.

    Raises:
        NoAnswer: there is none, or it is cut off.
    """
    from model.reasoning import is_well_formed, with_thought

    try:
        choice = completion.choices[0]
        message, ended = choice.message, getattr(choice, "finish_reason", None)
        answer = parse_text(message.content)
    except (AttributeError, LookupError, TypeError):  # the client takes whatever comes for a completion
        raise NoAnswer("the endpoint sent no choices (does its address end in /v1?)") from None
    if ended == "length":
        raise NoAnswer("cut off at the token limit (--max_tokens raises it)")
    if not answer:
        raise NoAnswer("it is empty")
    if thinking and not is_well_formed(answer):
        thought = parse_text(getattr(message, "reasoning_content", None))
        if not thought:
            raise NoAnswer("it has no reasoning_content")
        try:
            answer = with_thought(thought, answer)
        except ValueError as fault:
            raise NoAnswer(str(fault)) from None
    return answer


def main():
    args = get_args()
    import openai  # imported late, so that --help is quick
    from tqdm import tqdm

    from dataset.jsonl import JsonlReader, named_counts
    from dataset.records import parse_question

    api_key = args.api_key or os.environ.get("OPENAI_API_KEY") or "none"
    patience = {"max_retries": args.retries, "timeout": args.timeout}
    client = open_client(args.base_url, api_key, asynchronous=True, **patience)
    made_by = {"model": args.model, "thinking": args.thinking}

    reader = JsonlReader(args.questions, parse_question, args.skip_bad_lines)

    def questions() -> Iterator[Chat]:
        for chat in reader:
            has_system = chat[0]["role"] == "system"
            yield chat if has_system or not args.system else [{"role": "system", "content": args.system}, *chat]

    asked = Counter(map(chat_key, questions()))  # also shows a bad line before the first question is asked
    if reader.ignored:
        print_notice(f"{args.questions}: ignored keys: {named_counts(reader.ignored)}")
    if reader.bad_lines:
        print_notice(f"{args.questions}: {reader.bad_lines:,} bad lines skipped, the first: {reader.bad_reports[0]}")
    answers = AnswerFile(args.answers, made_by, asked)
    found = answers.answered.total()

    def pending() -> Iterator[Chat]:
        there = answers.answered.copy()
        for chat in questions():
            there[chat_key(chat)] -= 1
            if there[chat_key(chat)] < 0:
                yield chat

    given = {"temperature": args.temperature, "max_tokens": args.max_tokens}
    settings = {name: value for name, value in given.items() if value is not None}

    async def run(progress) -> str | None:
        async with client:

            async def ask(chat: Chat) -> str:
                sent = [{"role": turn["role"], "content": turn["content"]} for turn in chat]  # a weight is for learning
                try:
                    completion = await client.chat.completions.create(model=args.model, messages=sent, **settings)
                except openai.APIConnectionError as error:
                    raise NoAnswer(explain_failure(error, args.base_url)) from None
                except ValueError as error:  # the client reads as JSON whatever calls itself so
                    raise NoAnswer(f"the endpoint did not send JSON ({error})") from None
                return extract_answer(completion, args.thinking)

            return await ask_all(pending(), ask, answers, args.concurrency, args.give_up_after, progress)

    with tqdm(total=asked.total(), initial=found, unit="answer", disable=None) as progress:
        reason = asyncio.run(run(progress))
    total, written = asked.total(), answers.answered.total()
    print(f"{args.answers}: {written} of {total} questions are answered, {written - found} of them now")
    if reason == "interrupted":
        sys.exit(130)
    if reason:
        raise UserError(f"{reason}; run the same command to continue")
    answers.sort(questions())
    if written < total:
        raise UserError(f"{total - written} questions got no answer (see above); run the same command to retry them")


if __name__ == "__main__":
    run_main(main)
