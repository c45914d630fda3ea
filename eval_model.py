"""Talk to a model: fixed questions or your own, answers as they are written, tokens a second.

python eval_model.py --model_mode 1                       asks whether to chat or to run through sample questions
python eval_model.py --prompt "中国的首都是哪里？"           one answer (repeat --prompt for more), no terminal needed
echo "What is the capital of France?" | python eval_model.py
python eval_model.py --model_mode 3 --votes 8             a reasoning model's most frequent answer of eight
"""

import argparse
import sys
import time

from trainer.arguments import Switch, add_model_arguments, not_negative, positive
from trainer.errors import UserError, launch

STAGES = ("pretrain", "full_sft", "rlhf", "reason")
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model_mode", type=int, choices=range(4), default=1, help="0 pretrain, 1 full_sft, 2 rlhf, 3 reason"
    )
    parser.add_argument(
        "--load", type=int, choices=(0, 1), default=0, help="0: our .pth; 1: a transformers folder, named by --out_dir"
    )
    add_model_arguments(parser)
    parser.add_argument("--device", default=None, help="cpu, cuda or cuda:N (default: cuda where there is one)")
    parser.add_argument("--prompt", action="append", help="ask this (may be repeated) and end")
    parser.add_argument("--system", default=None, help="system prompt (default: MiniMind's own)")
    parser.add_argument("--history_cnt", type=not_negative, default=0, help="earlier turns the model is shown")
    parser.add_argument("--max_new_tokens", type=positive, default=512)
    parser.add_argument("--temperature", type=float, default=0.85, help="0: always the likeliest token")
    parser.add_argument("--top_p", type=float, default=0.85)
    parser.add_argument("--top_k", type=not_negative, default=0, help="0: no limit")
    parser.add_argument("--repetition_penalty", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=None, help="makes sampling repeatable")
    parser.add_argument("--stream", action=Switch, default=True, help="print while writing (default: on)")
    parser.add_argument("--votes", type=positive, default=1, help="write so many answers, take what most of them say")
    parser.add_argument("--hide_thinking", action=Switch, help="of a reasoning model show the answer alone")
    return parser.parse_args()


def questions(args, pretrained: bool):
    """What to ask: --prompt, or piped lines, or samples, or what a person types until an empty line."""
    if args.prompt:
        yield from args.prompt
    elif not sys.stdin.isatty():
        yield from (line.strip() for line in sys.stdin if line.strip())
    elif input("[0] automatic  [1] by hand: ").strip() != "1":
        yield from SAMPLE_BEGINNINGS if pretrained else SAMPLE_QUESTIONS
    else:
        while text := input("\n> ").strip():
            yield text


def load_model(args):
    """Model and tokenizer that the flags name."""
    from transformers import AutoModelForCausalLM

    from trainer.runtime import pick_device
    from trainer.weights import config_of, load_tokenizer, load_weights, read_settings, weights_path

    device = pick_device(args.device)
    if args.load == 1:
        tokenizer = load_tokenizer(args.tokenizer or args.out_dir)
        return AutoModelForCausalLM.from_pretrained(args.out_dir, local_files_only=True).to(device).eval(), tokenizer
    tokenizer = load_tokenizer(args.tokenizer)
    path = weights_path(args, STAGES[args.model_mode])
    config = None if read_settings(path) else config_of(args, tokenizer)
    if config and path.is_file():
        print(f"{path} has no json beside it: assuming --dim, --n_layers and {tokenizer.name_or_path}", file=sys.stderr)
    return load_weights(path, config, tokenizer).to(device).eval(), tokenizer


def pieces_of(stream, decoder, written: list[int]):
    """The text of each token as it comes; its id goes to `written`."""
    for token in stream:
        written.append(int(token))
        yield decoder.push(written[-1])
    yield decoder.flush()


def show(pieces, reasoning: bool, hide_thinking: bool) -> None:
    """Print an answer as its pieces come; of a reasoning model thinking and answer apart."""
    from model.reasoning import parts_of

    shown = ""
    for part, text in parts_of(pieces) if reasoning else (("", piece) for piece in pieces):
        if part == "thinking" and hide_thinking:
            continue
        if part != shown and not hide_thinking:
            print(f"{chr(10) if shown else ''}[{part}]")
        shown = part
        print(text, end="", flush=True)
    print()


def main():
    args = get_args()
    if args.votes > 1 and args.temperature == 0:
        raise UserError(f"--votes {args.votes} at --temperature 0 is {args.votes} times the same answer: raise it")
    import torch  # after the arguments: --help need not wait for it

    import model as minimind
    from model.chat import fit_history, render_text
    from model.reasoning import majority
    from model.tokenizer import StreamDecoder

    model, tokenizer = load_model(args)
    if not isinstance(model, minimind.MiniMindLM):
        raise UserError(f"{args.out_dir} holds a {type(model).__name__}; --load 1 takes a MiniMind folder")
    pretrained, reasoning = args.model_mode == 0, args.model_mode == 3
    names = ("max_new_tokens", "temperature", "top_k", "top_p", "repetition_penalty", "seed")
    settings = {name: getattr(args, name) for name in names}
    system = [{"role": "system", "content": args.system}] if args.system else []
    turns: list[dict[str, str]] = []
    for number, question in enumerate(questions(args, pretrained)):
        if pretrained:
            ids = render_text(tokenizer, [question])[0][:-1]
        else:
            turns = turns[len(turns) - 2 * args.history_cnt :] if args.history_cnt else []
            turns.append({"role": "user", "content": question})
            room = model.config.max_seq_len - args.max_new_tokens
            ids, turns = fit_history(tokenizer, system, turns, room)
        print(f"{'' if number == 0 else chr(10)}> {question}")
        started, written, election = time.monotonic(), [], ""
        prompt = torch.tensor([ids] * args.votes, device=model.device)
        if args.votes == 1:
            pieces = pieces_of(model.stream(prompt, **settings), StreamDecoder(tokenizer), written)
            show(pieces if args.stream else ["".join(pieces)], reasoning, args.hide_thinking)
            answer = tokenizer.decode(written, skip_special_tokens=True)
        else:
            answers = model.generate(prompt, **settings)[:, len(ids) :]
            written = answers[answers != model.config.pad_token_id]
            answer, votes = majority(tokenizer.batch_decode(answers, skip_special_tokens=True))
            show([answer], reasoning, args.hide_thinking)
            election = f"{votes} of {args.votes} votes, "
        seconds = time.monotonic() - started
        print(f"[{election}{len(written)} tokens, {len(written) / seconds:.1f} tokens/s]", file=sys.stderr)
        turns.append({"role": "assistant", "content": answer})


if __name__ == "__main__":
    launch(main)
