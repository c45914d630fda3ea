"""Talk to a model: fixed questions or your own, answers as they are written, tokens a second.

python eval_model.py --model_mode 1                       asks whether to chat or to run through sample questions
python eval_model.py --prompt "中国的首都是哪里？"           one answer (repeat --prompt for more), no terminal needed
echo "What is the capital of France?" | python eval_model.py
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


def main():
    args = get_args()
    import torch  # after the arguments: --help need not wait for it

    import model as minimind
    from model.chat import fit_history, render_text
    from model.tokenizer import StreamDecoder

    model, tokenizer = load_model(args)
    if not isinstance(model, minimind.MiniMindLM):
        raise UserError(f"{args.out_dir} holds a {type(model).__name__}; --load 1 takes a MiniMind folder")
    pretrained = args.model_mode == 0
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
        started, decoder, answer, count = time.monotonic(), StreamDecoder(tokenizer), "", 0
        print(f"{'' if number == 0 else chr(10)}> {question}")
        for token in model.stream(
            torch.tensor([ids], device=model.device),
            max_new_tokens=args.max_new_tokens,
            temperature=args.temperature,
            top_k=args.top_k,
            top_p=args.top_p,
            repetition_penalty=args.repetition_penalty,
            seed=args.seed,
        ):
            piece = decoder.push(int(token))
            count, answer = count + 1, answer + piece
            if args.stream:
                print(piece, end="", flush=True)
        rest = decoder.flush()
        answer += rest
        print(rest if args.stream else answer)
        print(f"[{count} tokens, {count / (time.monotonic() - started):.1f} tokens/s]", file=sys.stderr)
        turns.append({"role": "assistant", "content": answer})


if __name__ == "__main__":
    launch(main)
