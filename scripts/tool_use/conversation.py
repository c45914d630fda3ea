"""A conversation with a model on this machine, with or without tools: prompts, answers and their history."""

import time
from collections.abc import Callable, Sequence
from functools import partial

from model.chat import fit_history, render_text
from model.inference.request import Request
from model.inference.scheduler import Engine
from model.reasoning import majority
from model.tool_calls import split_calls
from scripts.tool_use.react import act
from scripts.tool_use.registry import Registry
from trainer.errors import UserError
from trainer.inference_arguments import sampling_settings
from trainer.reward_model import load_reward_model, score_chats
from trainer.talk import recent, report_speed, show, stream_texts
from trainer.weights import find_weights

Verifier = Callable[[list[list[dict]]], Sequence[float]]  # a score for each chat


class Conversation:
    """Questions to a model, its answers, and those of them that its next prompt contains.

    Args:
        args: the flags of eval_model.py.
        room: tokens that a prompt may have.
        by_hand: the questions are typed: one that does not fit does not end the run, and Ctrl-C ends only the answer.
        tools: the model may call them; None: none.
        verify: chooses among --votes answers; None: the majority does.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer,
        args,
        room: int,
        by_hand: bool,
        tools: Registry | None = None,
        verify: Verifier | None = None,
    ):
        self.engine, self.tokenizer, self.args, self.room = engine, tokenizer, args, room
        self.by_hand, self.tools, self.verify = by_hand, tools, verify
        self.system = [{"role": "system", "content": args.system}] if args.system else []
        self.turns: list[dict] = []

    def ask(self, question: str) -> None:
        """Print the answer to a question, and keep both.

        Raises:
            UserError: the question does not fit, and it was not typed.
        """
        asked = [*recent(self.turns, self.args.history_cnt), {"role": "user", "content": question}]
        try:
            if self.tools:
                said = act(self._next_turn, asked, self.tools, self.args.max_calls, print_call)
                self.turns = [*asked, *said]
                return
            ids, turns = self._complete(question) if self.args.model_mode == 0 else self._render(asked)
        except ValueError as error:
            if not self.by_hand:
                raise UserError(f"{question[:40]!r}: {error}") from None
            print(error)
            return
        answer = reply(self.engine, ids, self.args, self.by_hand, [*self.system, *turns], self.verify)
        self.turns = [*turns, {"role": "assistant", "content": answer}]

    def _complete(self, text: str) -> tuple[list[int], list[dict]]:
        """The ids of a text that a pretrained model continues; it has no turns.

        Raises:
            ValueError: it does not fit.
        """
        ids = render_text(self.tokenizer, [text])[0][:-1]  # without the </s>
        if len(ids) > self.room:
            raise ValueError(f"the text has {len(ids)} tokens, but only {self.room} fit")
        return ids, []

    def _render(self, turns: list[dict]) -> tuple[list[int], list[dict]]:
        """The prompt's ids, and those of the turns that fit into it."""
        layout = {"open_thinking": self.args.open_thinking} | ({"tools": self.tools.schemas} if self.tools else {})
        return fit_history(self.tokenizer, self.system, turns, self.room, **layout)

    def _next_turn(self, turns: list[dict]) -> dict:
        """The model's next turn, which may call tools."""
        ids, _ = self._render(turns)
        said, calls = split_calls(reply(self.engine, ids, self.args, self.by_hand))
        return {"role": "assistant", "content": said, "tool_calls": calls}


def print_call(call: str, result: str) -> None:
    print(f"[{call} = {result}]")


def reply(
    engine: Engine,
    ids: list[int],
    args,
    by_hand: bool,
    turns: Sequence[dict] = (),
    verify: Verifier | None = None,
) -> str:
    """Generate an answer to a prompt; print it and its speed.

    Args:
        turns: the chat that `ids` render.
        verify: scores chats, and the best is chosen; None: the majority decides.
    """
    reasoning = args.model_mode >= 3 or args.open_thinking
    started, pieces, election = time.monotonic(), [], ""
    try:
        if args.votes == 1:
            texts = stream_texts(engine.stream(Request(prompt=ids, **sampling_settings(args))), pieces)
            show(texts if args.stream else ["".join(texts)], reasoning, args.hide_thinking, args.open_thinking)
            answer = "".join(piece.text for piece in pieces)
        else:
            pieces = sample(engine, ids, args)
            answer, election = choose([written.text for written in pieces], turns, verify)
            show([answer], reasoning, args.hide_thinking, args.open_thinking)
    except KeyboardInterrupt:
        if not by_hand:
            raise
        engine.abandon()  # wherever in a step it was
        print(" [stopped]")  # the answer ends here, the chat continues
        answer = "".join(piece.text for piece in pieces)
    report_speed(pieces, started, election)
    return answer


def sample(engine: Engine, ids: list[int], args) -> list:
    """--votes answers to one prompt, generated together, each with a seed of its own."""
    seeds = [None if args.seed is None else args.seed + n for n in range(args.votes)]
    settings = sampling_settings(args)
    return engine.run(Request(prompt=ids, **settings | {"seed": seed}) for seed in seeds)


def choose(answers: list[str], turns: Sequence[dict], verify: Verifier | None) -> tuple[str, str]:
    """The majority's answer, or the one that `verify` scores best (of equals the first); and how it was chosen."""
    if verify is None:
        answer, votes = majority(answers)
        return answer, f"{votes} of {len(answers)} votes, "
    scores = verify([[*turns, {"role": "assistant", "content": answer}] for answer in answers])
    score, best = max((score, -n) for n, score in enumerate(scores))
    return answers[-best], f"best of {len(answers)} by a score of {score:.3f}, "


def open_verifier(args, tokenizer, device) -> Verifier:
    """The reward model that --verifier names."""
    return partial(score_chats, load_reward_model(find_weights(args.verifier, args), tokenizer).to(device), tokenizer)
