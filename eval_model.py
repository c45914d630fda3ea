"""Chat with a model: sample questions or your own, streamed answers, tokens per second.

python eval_model.py --model_mode 1                       asks whether to chat or to run through sample questions
python eval_model.py --prompt "中国的首都是哪里？"           one answer (repeat --prompt for more), no terminal needed
echo "What is the capital of France?" | python eval_model.py
python eval_model.py --model_mode 3 --votes 8             a reasoning model's most frequent answer of eight
python eval_model.py --votes 8 --verifier reward          the one of eight that a reward model scores best
python eval_model.py --tools calculator,calendar          the model may call these tools and answers with their results
"""

import sys
import time
from collections.abc import Sequence

import trainer.start  # noqa: F401  (first of all: what to do where PyTorch, or a home folder, is missing)

from scripts.tool_use.tool_flags import add_tool_arguments
from trainer.argument_types import BooleanFlag, non_negative_int, positive_int, text
from trainer.arguments import (
    Parser,
    add_device_argument,
    add_engine_arguments,
    add_model_arguments,
    add_sampling_arguments,
    add_untold_arguments,
    sampling_settings,
)
from trainer.errors import UserError, run_main
from trainer.talk import questions, read_line, recent, report_speed, room_for_prompt, show, stream_texts

SAMPLE_QUESTIONS = (
    "你是谁？",
    "中国的首都是哪里？",
    "水的化学式是什么？",
    "请用三句话介绍秋天。",
    "Who are you?",
    "What is the capital of France?",
    "Why is the sky blue?",
    "What is 12 + 30?",
)
SAMPLE_BEGINNINGS = ("中国的首都是", "一年有十二个", "The capital of France is", "Water is made of")


def get_args():
    parser = Parser(__doc__)
    parser.add_argument(
        "--model_mode",
        type=int,
        choices=range(6),
        default=1,
        help="0 pretrain, 1 full_sft, 2 rlhf, 3 reason, 4 grpo, 5 ppo",
    )
    parser.add_argument(
        "--load",
        type=int,
        choices=(0, 1),
        default=0,
        help="0: our .pth; 1: the transformers folder in --out_dir, also from convert_model.py",
    )
    add_model_arguments(parser)
    add_untold_arguments(parser)
    parser.add_argument("--lora_name", default=None, metavar="NAME", help="LoRA adapter to load: out/lora/NAME_512.pth")
    add_device_argument(parser)
    parser.add_argument("--prompt", type=text, action="append", help="answer this and exit (may be repeated)")
    parser.add_argument("--system", type=text, default=None, help="system prompt (default: MiniMind's own)")
    parser.add_argument(
        "--history_cnt", type=non_negative_int, default=0, help="earlier question-answer pairs kept in the prompt"
    )
    add_sampling_arguments(parser)
    add_engine_arguments(parser)
    parser.add_argument(
        "--stream", action=BooleanFlag, default=True, help="print tokens as they are generated (default: on)"
    )
    parser.add_argument(
        "--votes", type=positive_int, default=1, help="sample this many answers and take a majority vote"
    )
    parser.add_argument("--open_thinking", action=BooleanFlag, help="make a MiniMind-3 think before it answers")
    parser.add_argument(
        "--verifier", metavar="WEIGHTS", help="let this reward model choose among --votes instead of a majority"
    )
    add_tool_arguments(parser)
    parser.add_argument("--hide_thinking", action=BooleanFlag, help="hide a reasoning model's thinking")
    return parser.parse_args()


def reply(engine, ids: list[int], args, by_hand: bool, turns: Sequence[dict] = (), verify=None) -> str:
    """Generate an answer to a prompt; show it and its speed.

    Args:
        turns: what `ids` say, as a chat.
        verify: from chats to a score for each, whose best is chosen; None: the majority decides.
    """
    from model.inference.request import Request
    from model.reasoning import majority

    settings = sampling_settings(args)
    reasoning = args.model_mode >= 3 or args.open_thinking
    started, pieces, election = time.monotonic(), [], ""
    try:
        if args.votes == 1:
            texts = stream_texts(engine.stream(Request(prompt=ids, **settings)), pieces)
            show(texts if args.stream else ["".join(texts)], reasoning, args.hide_thinking, args.open_thinking)
            answer = "".join(piece.text for piece in pieces)
        else:
            seeds = [None if args.seed is None else args.seed + i for i in range(args.votes)]
            pieces = engine.run(Request(prompt=ids, **settings | {"seed": seed}) for seed in seeds)
            if verify is None:
                answer, votes = majority([written.text for written in pieces])
                election = f"{votes} of {args.votes} votes, "
            else:
                answered = [[*turns, {"role": "assistant", "content": written.text}] for written in pieces]
                score, best = max((score, -n) for n, score in enumerate(verify(answered)))  # of equals the first
                answer, election = pieces[-best].text, f"best of {args.votes} by a score of {score:.3f}, "
            show([answer], reasoning, args.hide_thinking, args.open_thinking)
    except KeyboardInterrupt:
        if not by_hand:
            raise
        engine.abandon()  # wherever in a step it was
        print(" [stopped]")  # the answer ends here, the chat continues
        answer = "".join(piece.text for piece in pieces)
    report_speed(pieces, started, election)
    return answer


def open_verifier(args, tokenizer, device):
    """What scores chats by the reward model that --verifier names."""
    from functools import partial

    from trainer.reward_model import load_reward_model, score_chats
    from trainer.weights import find_weights

    return partial(score_chats, load_reward_model(find_weights(args.verifier, args), tokenizer).to(device), tokenizer)


def main():
    args = get_args()
    if args.votes > 1 and args.temperature == 0:
        raise UserError(
            f"--votes {args.votes} at --temperature 0 is {args.votes} times the same answer: raise --temperature"
        )
    if args.verifier and args.votes == 1:
        raise UserError("--verifier chooses among several answers: ask for them with --votes 8")
    from scripts.tool_use.open_tools import open_tools, wants_tools

    if wants_tools(args) and (args.votes > 1 or args.model_mode == 0):
        raise UserError("--tools needs a model of chats and one answer to each question: no --votes, no --model_mode 0")
    with open_tools(args) as tools:
        talk(args, tools)


def talk(args, tools) -> None:
    """Answer one question after another, with what the tools say where there are any."""
    from model.chat import fit_history, render_text  # after the arguments: --help need not wait for it
    from model.tool_calls import split_calls
    from scripts.tool_use.react import act
    from trainer.device import pick_device
    from trainer.loading import load_by_flags, open_engine

    device = pick_device(args.device)
    model, tokenizer = load_by_flags(args)
    model.to(device)
    room = room_for_prompt(model.config.max_seq_len, args.max_new_tokens)
    verify = open_verifier(args, tokenizer, device) if args.verifier else None
    engine = open_engine(model, tokenizer, args, slots=args.votes)
    pretrained = args.model_mode == 0
    samples = SAMPLE_BEGINNINGS if pretrained else SAMPLE_QUESTIONS
    system = [{"role": "system", "content": args.system}] if args.system else []
    turns: list[dict] = []
    layout = {"open_thinking": args.open_thinking} | ({"tools": tools.schemas} if tools else {})

    def ask(talk: list[dict]) -> dict:
        ids, _ = fit_history(tokenizer, system, talk, room, **layout)
        said, calls = split_calls(reply(engine, ids, args, by_hand))
        return {"role": "assistant", "content": said, "tool_calls": calls}

    by_hand = not args.prompt and sys.stdin.isatty() and read_line("[0] sample prompts  [1] type your own: ") == "1"
    for number, question in enumerate(questions(args.prompt, samples, by_hand)):
        if not by_hand:
            print(f"{chr(10) if number else ''}> {question}")
        asked = {"role": "user", "content": question}
        kept = recent(turns, args.history_cnt)
        try:
            if pretrained:
                ids = render_text(tokenizer, [question])[0][:-1]
                if len(ids) > room:
                    raise ValueError(f"the text has {len(ids)} tokens, but only {room} fit")
            elif tools:
                said = act(ask, [*kept, asked], tools, args.max_calls, lambda call, got: print(f"[{call} = {got}]"))
                turns = [*kept, asked, *said]
                continue
            else:
                ids, turns = fit_history(tokenizer, system, [*kept, asked], room, **layout)
        except ValueError as error:
            if not by_hand:
                raise UserError(f"{question[:40]!r}: {error}") from None
            print(error)
            continue
        answer = reply(engine, ids, args, by_hand, [*system, *turns], verify)
        turns = [*turns, {"role": "assistant", "content": answer}]


if __name__ == "__main__":
    run_main(main)
