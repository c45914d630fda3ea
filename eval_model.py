"""Chat with a model: sample questions or your own, streamed answers, tokens per second.

python eval_model.py --model_mode 1                       asks whether to chat or to run through sample questions
python eval_model.py --prompt "中国的首都是哪里？"           one answer (repeat --prompt for more), no terminal needed
echo "What is the capital of France?" | python eval_model.py
python eval_model.py --model_mode 3 --votes 8             a reasoning model's most frequent answer of eight
python eval_model.py --votes 8 --verifier reward          the one of eight that a reward model scores best
python eval_model.py --tools calculator,calendar          the model may call these tools and answers with their results
"""

import sys

import trainer.start  # noqa: F401  (first of all: what to do where PyTorch, or a home folder, is missing)

from scripts.tool_use.tool_flags import add_tool_arguments, wants_tools
from trainer.argument_types import BooleanFlag, non_negative_int, positive_int, text
from trainer.arguments import Parser, add_device_argument, add_model_arguments, add_untold_arguments
from trainer.errors import UserError, run_main
from trainer.inference_arguments import (
    add_adapter_argument,
    add_engine_arguments,
    add_sampling_arguments,
    add_stage_arguments,
)
from trainer.talk import questions, read_line, room_for_prompt

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
    add_stage_arguments(parser)
    add_model_arguments(parser)
    add_untold_arguments(parser)
    add_adapter_argument(parser)
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


def check(args) -> None:
    """Refuse flags that contradict each other before anything is loaded."""
    if args.votes > 1 and args.temperature == 0:
        raise UserError(
            f"--votes {args.votes} at --temperature 0 is {args.votes} times the same answer: raise --temperature"
        )
    if args.verifier and args.votes == 1:
        raise UserError("--verifier chooses among several answers: ask for them with --votes 8")
    if wants_tools(args) and (args.votes > 1 or args.model_mode == 0):
        raise UserError("--tools needs a model of chats and one answer to each question: no --votes, no --model_mode 0")


def main():
    args = get_args()
    check(args)
    from scripts.tool_use.conversation import Conversation, open_verifier  # imported late, so that --help is quick
    from scripts.tool_use.open_tools import open_tools
    from trainer.device import pick_device
    from trainer.loading import load_by_flags, open_engine

    with open_tools(args) as tools:
        device = pick_device(args.device)
        model, tokenizer = load_by_flags(args)
        model.to(device)
        room = room_for_prompt(model.config.max_seq_len, args.max_new_tokens)
        verify = open_verifier(args, tokenizer, device) if args.verifier else None
        engine = open_engine(model, tokenizer, args, slots=args.votes)

        samples = SAMPLE_BEGINNINGS if args.model_mode == 0 else SAMPLE_QUESTIONS
        by_hand = not args.prompt and sys.stdin.isatty() and read_line("[0] sample prompts  [1] type your own: ") == "1"
        conversation = Conversation(engine, tokenizer, args, room, by_hand, tools, verify)
        for number, question in enumerate(questions(args.prompt, samples, by_hand)):
            if not by_hand:
                print(f"{chr(10) if number else ''}> {question}")
            conversation.ask(question)


if __name__ == "__main__":
    run_main(main)
