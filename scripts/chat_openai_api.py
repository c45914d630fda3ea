"""Chat in a terminal with any OpenAI-compatible server: scripts/serve_openai_api.py, llama.cpp, Ollama, vLLM, a cloud.

python scripts/chat_openai_api.py                                          the server of this project, on this machine
python scripts/chat_openai_api.py --base_url http://host:8000/v1 --model NAME --api_key KEY
python scripts/chat_openai_api.py --tools calculator,calendar              the model may call these, run on this machine

/reset clears the conversation, /system TEXT sets another system prompt, /help lists the rest. Ctrl-C stops an
answer, Ctrl-D ends the chat.
"""

import contextlib
import os
import sys
from collections.abc import Iterator

import _repo  # noqa: F401  (lets `python scripts/chat_openai_api.py` find the packages)

from scripts.serving.client import answer_parts, explain_failure, models_at, open_client
from scripts.tool_use.open_tools import open_tools
from scripts.tool_use.tool_flags import add_tool_arguments
from trainer.argument_types import BooleanFlag, non_negative_int, positive_int, seed, text
from trainer.arguments import Parser
from trainer.errors import UserError, run_main
from trainer.talk import piped_lines, recent, typed_line

HELP = """/reset          clear the conversation
/system TEXT    set the system prompt and clear the conversation; without TEXT: show it
/system -       back to the server's own system prompt
/help           show this list
/exit           end (or Ctrl-D); Ctrl-C stops an answer"""
DIM, PLAIN = "\033[2m", "\033[0m"
UNPRINTABLE = {
    code: None for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"
}  # would steer a terminal


def get_args():
    parser = Parser(__doc__)
    parser.add_argument(
        "--base_url", default="http://127.0.0.1:8998/v1", help="base URL of the API (default: %(default)s)"
    )
    parser.add_argument("--api_key", default=None, help="default: OPENAI_API_KEY from the environment, if set")
    parser.add_argument("--model", type=text, default=None, help="model name (default: the server's first)")
    parser.add_argument("--system", type=text, default=None, help="system prompt (default: the server's own)")
    parser.add_argument(
        "--history_cnt", type=non_negative_int, default=None, help="earlier turns sent along (default: all)"
    )
    parser.add_argument(
        "--max_tokens", type=positive_int, default=None, help="maximum answer length in tokens (default: the server's)"
    )
    parser.add_argument("--temperature", type=float, default=None)
    parser.add_argument("--top_p", type=float, default=None)
    parser.add_argument("--seed", type=seed, default=None, help="makes sampling reproducible")
    parser.add_argument(
        "--stream", action=BooleanFlag, default=True, help="print tokens as they are generated (default: on)"
    )
    add_tool_arguments(parser)
    parser.add_argument("--hide_thinking", action=BooleanFlag, help="hide a reasoning model's thinking")
    return parser.parse_args()


class Chat:
    """A conversation with a server: its history, and how to continue it."""

    def __init__(self, client, args, tools=None):
        self.client = client
        self.args = args
        self.model = args.model
        self.system = args.system
        self.turns: list[dict] = []
        self.tools = tools

    def ask(self, question: str) -> Iterator[tuple[str, str]]:
        """Yield ("thinking" | "answer", text) as it comes; the answer so far is added to the history, even if the
        caller stops early."""
        messages = self._messages(question)
        asked = messages[-1]
        answer = ""
        try:
            with contextlib.closing(self._answer(messages)) as parts:
                for part, text in parts:
                    answer += text if part == "answer" else ""
                    yield part, text
        finally:
            if answer:
                self.turns += [asked, {"role": "assistant", "content": answer}]

    def act(self, question: str) -> None:
        """Answer a question with the help of tools, and show everything; all turns are added to the history."""
        from scripts.tool_use.react import act  # only here, as it brings PyTorch with it

        messages = self._messages(question)

        def ask(talk: list[dict]) -> dict:
            calls: list[dict] = []
            said: list[str] = []
            with contextlib.closing(self._answer(talk, calls=calls, tools=self.tools.schemas)) as parts:
                show(_noted(parts, said), self.args.hide_thinking)
            return {"role": "assistant", "content": "".join(said) or None} | ({"tool_calls": calls} if calls else {})

        def tell(call: str, result: str) -> None:
            print(f"[{call} = {result}]".translate(UNPRINTABLE))

        said = act(ask, messages, self.tools, self.args.max_calls, tell)
        self.turns += [messages[-1], *said]

    def _messages(self, question: str) -> list[dict]:
        earlier = self.turns if self.args.history_cnt is None else recent(self.turns, self.args.history_cnt)
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, *earlier, {"role": "user", "content": question}]

    def _answer(self, messages: list[dict], **more) -> Iterator[tuple[str, str]]:
        wishes = {name: getattr(self.args, name) for name in ("max_tokens", "temperature", "top_p", "seed")} | more
        return answer_parts(self.client, self.model, messages, self.args.stream, **wishes)


def _noted(parts: Iterator[tuple[str, str]], said: list[str]) -> Iterator[tuple[str, str]]:
    """Yield the parts of an answer, and append their text, thinking excepted, to `said`."""
    for part, words in parts:
        if part == "answer":
            said.append(words)
        yield part, words


def obey(command: str, chat: Chat) -> bool:
    """Run a line that begins with a slash as a command; False: it is not a command but a message."""
    name, _, rest = command.partition(" ")
    if name == "/reset":
        chat.turns.clear()
        print("forgotten")
    elif name == "/system":
        if rest := rest.strip():
            chat.system = None if rest == "-" else rest
            chat.turns.clear()
        print(f"system prompt: {chat.system or 'default of the server'}")
    elif name == "/help":
        print(HELP)
    elif name[1:].isalpha() and not rest:
        print(f"{name} is not a command; /help lists them")
    else:
        return False
    return True


def show(parts: Iterator[tuple[str, str]], hide_thinking: bool) -> None:
    """Print an answer as it comes, with thinking dim on a terminal, or under a heading elsewhere."""
    terminal = sys.stdout.isatty()
    marks = {"thinking": DIM, "answer": PLAIN} if terminal else {"thinking": "[thinking]\n", "answer": "[answer]\n"}
    shown = "answer"
    try:
        for part, text in parts:
            if part == "thinking" and hide_thinking:
                continue
            if part != shown:
                print(("\n" if part == "answer" else "") + marks[part], end="")
                shown = part
            print(text.translate(UNPRINTABLE), end="", flush=True)
    finally:
        print(PLAIN if terminal and shown == "thinking" else "")


def lines() -> Iterator[str]:
    """Typed or piped lines, until the input ends or a line is /exit.

    Raises:
        UserError: the piped input is not UTF-8.
    """
    for line in typed_lines() if sys.stdin.isatty() else piped_lines():
        if line == "/exit":
            return
        yield line


def typed_lines() -> Iterator[str]:
    """Typed lines, until Ctrl-D. Ctrl-C only clears the line."""
    while True:
        try:
            if line := typed_line("> "):
                yield line
        except EOFError:
            return
        except KeyboardInterrupt:
            print("\n(Ctrl-D or /exit ends)")
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)


def main():
    args = get_args()
    with open_tools(args) as tools:
        talk(args, tools)


def talk(args, tools) -> None:
    """Send typed or piped lines, and show the answers."""
    import openai  # imported late, so that --help is quick

    with contextlib.suppress(ImportError):  # arrow keys in input(); Windows has its own
        import readline  # noqa: F401

    api_key = args.api_key or os.environ.get("OPENAI_API_KEY") or "none"
    client = open_client(args.base_url, api_key)
    chat = Chat(client, args, tools)
    if not chat.model:
        chat.model = next(iter(models_at(client)), None)
    if not chat.model:
        raise UserError(f"{args.base_url} lists no models: give one with --model")
    print(f"{chat.model} at {args.base_url}; /help for help", file=sys.stderr)
    for line in lines():
        if line.startswith("/") and obey(line, chat):
            continue
        try:
            if chat.tools:
                chat.act(line)
                continue
            with contextlib.closing(chat.ask(line)) as parts:
                show(parts, args.hide_thinking)
        except KeyboardInterrupt:
            print("(stopped)")
        except (openai.APIError, UserError) as error:
            why = explain_failure(error, args.base_url) if isinstance(error, openai.APIError) else str(error)
            print(f"error: {why.translate(UNPRINTABLE)}", file=sys.stderr)


if __name__ == "__main__":
    run_main(main)
