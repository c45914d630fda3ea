r"""Train the tokenizer: a byte-level BPE of 6,400 entries, from any jsonl files in the project's formats.

The shipped one was made by

    python scripts/make_demo_data.py
    python scripts/train_tokenizer.py --overwrite --data_path ../shared/data/*.jsonl \
        dataset/demo/pretrain_hq.jsonl dataset/demo/sft_mini_512.jsonl dataset/demo/r1_mix_1024.jsonl

A tenth of the texts is held out (by a hash of the text, so that no text is on both sides); characters per token are
measured there. With --only_measure an existing tokenizer is verified and measured:

    python scripts/train_tokenizer.py --only_measure --data_path ../shared/data/*.jsonl
"""

import hashlib
import shutil
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import _repo  # noqa: F401  (lets `python scripts/train_tokenizer.py` find the packages)
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from dataset.jsonl import BadRecord, Ignored, JsonlReader, named_counts
from dataset.records import parse_chat, parse_image_chat, parse_pair, parse_text
from dataset.shapes import recognise_shape
from model.chat import render_chat
from model.chat_template import CHAT_TEMPLATE
from model.tokenizer import token_bytes
from model.tokenizer_check import check_round_trips, check_tokenizer
from trainer.argument_types import BooleanFlag, positive_int
from trainer.arguments import Parser
from trainer.errors import UserError, print_notice, run_main
from trainer.files import require_utf8
from trainer.weights import SHIPPED_TOKENIZER, load_tokenizer

SPECIAL = ("<unk>", "<s>", "</s>")
TAGS = ("<think>", "</think>", "<answer>", "</answer>", "<image>")


def stream_texts(record: dict, ignored: Ignored) -> list[str]:
    """The texts in a line of any of the project's formats.

    Raises:
        BadRecord: it has none of these formats.
    """
    if "text" in record:
        return [parse_text(record, ignored)]
    if "chosen" in record and "rejected" in record:
        chats = parse_pair(record, ignored)
    elif "image" in record:
        chats = (parse_image_chat(record, ignored)[1],)
    elif "conversations" in record:
        chats = (parse_chat(record, ignored),)
    else:
        shape = recognise_shape(record)
        raise BadRecord(
            'neither "text" nor "conversations" nor "chosen" and "rejected"' + (f" (this is {shape})" if shape else "")
        )
    return [turn["content"] for chat in chats for turn in chat]


def is_held_out_text(text: str, share: float) -> bool:
    """Whether a text is held out for measuring; the same text always falls on the same side."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") < share * 2**32


def texts_in(paths: list[Path], share: float, kept_aside: bool) -> Iterator[tuple[Path, str]]:
    """Stream (file, text) for the training texts, or for the held-out ones."""
    for path in paths:
        reader = JsonlReader(path, stream_texts)
        for texts in reader:
            for text in texts:
                if is_held_out_text(text, share) == kept_aside:
                    yield path, text
        if reader.ignored and kept_aside:  # reported once: the held-out texts are read in every call, and last
            print_notice(f"{path}: ignored keys: {named_counts(reader.ignored)}")


def train(texts: Iterator[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE (Sennrich et al. 2016, arXiv:1508.07909) with single digits, so that sums can be learned."""
    tokenizer = Tokenizer(models.BPE())
    digits, bytes_ = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, bytes_])
    tokenizer.decoder = decoders.ByteLevel()
    reserved = [AddedToken(token, special=True, normalized=False) for token in SPECIAL]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(TAGS),
        special_tokens=reserved,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=sys.stderr.isatty(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in TAGS])
    return tokenizer


def verify(tokenizer: PreTrainedTokenizerFast) -> None:
    """Check the properties that the project relies on.

    Raises:
        UserError: one of them does not hold; the message says which.
    """
    ids = tokenizer.convert_tokens_to_ids(list(SPECIAL))
    if ids != [0, 1, 2]:
        raise UserError(f"the ids of {', '.join(SPECIAL)} are {ids}, not 0, 1 and 2")
    try:
        check_tokenizer(tokenizer)
        check_round_trips(tokenizer, [*map(chr, range(0x80, 0x800, 7))], token_bytes(tokenizer))
    except ValueError as error:
        raise UserError(str(error)) from error
    chat = [{"role": "user", "content": "你好, world"}, {"role": "assistant", "content": "Hi 🙂"}]
    if tokenizer.apply_chat_template(chat, tokenize=True, return_dict=False) != render_chat(tokenizer, chat)[0]:
        raise UserError("its chat template renders a chat differently from model/chat.py")


def detect_kind(path: Path, text: str) -> str | None:
    """'Chinese', 'English' or 'Chinese medical': the classes whose characters per token are reported."""
    chinese = sum("\u4e00" <= char <= "\u9fff" for char in text)
    if chinese > 0.3 * len(text):
        return "Chinese medical" if "medical" in path.name else "Chinese"
    return "English" if text.isascii() else None


def characters_per_token(tokenizer: PreTrainedTokenizerFast, texts: Iterator[tuple[Path, str]]) -> dict[str, float]:
    """Characters per token for each kind of text."""
    characters, tokens = defaultdict(int), defaultdict(int)
    for path, text in texts:
        if kind := detect_kind(path, text):
            characters[kind] += len(text)
            tokens[kind] += len(tokenizer.encode(text, add_special_tokens=False))
    return {kind: characters[kind] / tokens[kind] for kind in sorted(characters)}


def save(tokenizer: Tokenizer, folder: Path) -> None:
    """Write the folder that `AutoTokenizer` loads; an earlier one is kept until the new one is complete and verified.

    Raises:
        UserError: it cannot be written; see `verify`.
    """
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        pad_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=8192,
        padding_side="left",  # a model continues at the end of each row
    )
    new = folder.with_name(f".{folder.name}.new")
    try:
        fast.save_pretrained(new)
        verify(load_tokenizer(new))
        folder.mkdir(parents=True, exist_ok=True)
        for file in new.iterdir():
            file.replace(folder / file.name)
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(new, ignore_errors=True)


def main():
    parser = Parser(__doc__)
    parser.add_argument("--data_path", type=Path, nargs="+", required=True, help="jsonl files")
    parser.add_argument("--out_dir", type=Path, default=SHIPPED_TOKENIZER)
    parser.add_argument("--vocab_size", type=positive_int, default=6400)
    parser.add_argument("--holdout", type=float, default=0.1, help="fraction of texts held out for measuring")
    parser.add_argument("--overwrite", action=BooleanFlag, help="replace the tokenizer in --out_dir")
    parser.add_argument(
        "--only_measure", action=BooleanFlag, help="do not train: verify and measure the tokenizer in --out_dir"
    )
    args = parser.parse_args()
    folder = args.out_dir.resolve()
    require_utf8(folder, "--out_dir")
    if not 0 <= args.holdout < 1:
        raise UserError(f"--holdout must be from 0 to below 1, not {args.holdout}")
    if args.vocab_size < 256 + len(SPECIAL) + len(TAGS):
        raise UserError(f"--vocab_size {args.vocab_size} is too small for the 256 bytes and {len(SPECIAL + TAGS)} tags")

    if not args.only_measure:
        if (folder / "tokenizer.json").exists() and not args.overwrite:
            raise UserError(f"{folder} already has a tokenizer that models depend on: use --overwrite to replace it")
        save(train((text for _, text in texts_in(args.data_path, args.holdout, False)), args.vocab_size), folder)
    tokenizer = load_tokenizer(folder)
    verify(tokenizer)
    print(f"{len(tokenizer)} entries in {folder}; round trips, special ids and chat template verified")
    for kind, value in characters_per_token(tokenizer, texts_in(args.data_path, args.holdout, True)).items():
        print(f"{kind:<16} {value:.3f} characters per token, on held-out texts")


if __name__ == "__main__":
    run_main(main)
