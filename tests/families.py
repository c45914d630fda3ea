"""Small tokenizers of other model families: trained on SENTENCES, with the special tokens of each family."""

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tests.conftest import SENTENCES

FAMILIES = {  # special tokens, which come last, and their roles
    "gpt2": (["<|endoftext|>"], dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")),
    "llama3": (
        ["<|begin_of_text|>", "<|end_of_text|>"],
        {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"},
    ),
    "qwen": (
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
    ),
    "qwen with bos": (
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
    ),
}


def byte_level(special: list[str], vocab_size: int = 400) -> Tokenizer:
    """A byte-level BPE with its special tokens as the last entries."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(SENTENCES, trainer)
    backend.add_special_tokens([AddedToken(token, special=True) for token in special])
    return backend


def family(name: str) -> PreTrainedTokenizerFast:
    """The tokenizer of one of FAMILIES."""
    special, roles = FAMILIES[name]
    return PreTrainedTokenizerFast(tokenizer_object=byte_level(special), **roles)


def with_llama_3s_pattern(special_tags: bool = False) -> PreTrainedTokenizerFast:
    """Splits text as Llama 3 does, which keeps punctuation and the line breaks after it together.

    Args:
        special_tags: <think> and </think> are special tokens.
    """
    backend = Tokenizer(models.BPE())
    pattern = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    cuts = [pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Sequence(cuts), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(["<think>\nWhy?\n</think>\n<answer>\nSo.\n</answer>"] * 9, trainer)
    special, roles = FAMILIES["llama3"]
    special = [*special, "<think>", "</think>"] if special_tags else special
    backend.add_special_tokens([AddedToken(token, special=True) for token in special])
    return PreTrainedTokenizerFast(tokenizer_object=backend, **roles)


def unigram() -> PreTrainedTokenizerFast:
    """A unigram tokenizer, like T5's."""
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(vocab_size=400, special_tokens=special, unk_token="<unk>", show_progress=False)
    backend.train_from_iterator(SENTENCES, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def bpe_of_characters() -> PreTrainedTokenizerFast:
    """A BPE of characters with byte fallback, like Llama 2's."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "▁a"]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocabulary, [("▁", "a")], unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
