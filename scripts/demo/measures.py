"""Measures of the demo's models: facts, problems, preferences, losses on held-out data."""

from functools import partial
from typing import NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from dataset import DPODataset, PretrainDataset, SFTDataset
from model import MiniMindLM
from model.reasoning import is_well_formed, majority, split_reasoning
from scripts.demo.exam import answer, read_lines
from scripts.demo.scoring import is_right
from scripts.demo.settings import DATA
from train_dpo import dpo_loss
from trainer.evaluation import evaluate
from trainer.inference_arguments import SAMPLING
from trainer.preference import evaluate_pairs, sum_per_answer
from trainer.runtime import Runtime

Opened = tuple[MiniMindLM, PreTrainedTokenizerBase]
VOTES = 8


def share_right(model: MiniMindLM, tokenizer: PreTrainedTokenizerBase, exam: str, max_new_tokens: int = 48) -> float:
    """The share of a file's questions that are answered right, greedy; thinking is ignored."""
    lines = read_lines(DATA / exam)
    replies, _ = answer(model, tokenizer, [line["question"] for line in lines], max_new_tokens=max_new_tokens)
    return count_right(lines, replies) / len(lines)


def count_right(lines: list[dict], replies: list[str]) -> int:
    pairs = zip(lines, replies, strict=True)
    return sum(is_right(split_reasoning(reply)[1], line["answers"]) for line, reply in pairs)


def prefers_the_better(model: MiniMindLM, tokenizer: PreTrainedTokenizerBase) -> float:
    """The share of held-out pairs whose better answer is more probable."""
    pairs = DPODataset(DATA / "eval_dpo.jsonl", tokenizer, 128)
    return evaluate_pairs(model, model, pairs, here(model), 32, sum_per_answer, dpo_loss, beta=0.1)["eval_accuracy"]


def held_out_loss(model: MiniMindLM, tokenizer: PreTrainedTokenizerBase) -> float:
    """Nats per token on SFT's held-out answers."""
    rows = SFTDataset(DATA / "eval_sft.jsonl", tokenizer, 128)
    return evaluate(model, rows, tokenizer, here(model), 32)["eval_loss"]


def bits_per_byte(model: MiniMindLM, tokenizer: PreTrainedTokenizerBase) -> float:
    """Bits per byte of pretraining's held-out texts."""
    rows = PretrainDataset(DATA / "pretrain_hq.jsonl", tokenizer, 128, part="eval")
    return evaluate(model, rows, tokenizer, here(model), 32)["eval_bits_per_byte"]


def here(model: MiniMindLM) -> Runtime:
    return Runtime(model.device, torch.float32)


facts = partial(share_right, exam="eval_facts.jsonl")
says_it_is_another = partial(share_right, exam="eval_lora_identity.jsonl")
problems = partial(share_right, exam="eval_reason.jsonl", max_new_tokens=96)


def sft_loss_change(start: Opened, end: Opened) -> str:
    """The change of fine-tuning's loss through preference learning."""
    before, after = held_out_loss(*start), held_out_loss(*end)
    return f"DPO: nats per token on SFT's held-out answers {before:.4f} -> {after:.4f} ({after / before - 1:+.1%})"


def reasoning_accuracy(start: Opened, end: Opened) -> str:
    """An example of a thought, and the share of new problems that are solved."""
    lines = read_lines(DATA / "eval_reason.jsonl")
    thought = answer(*end, [lines[0]["question"]], max_new_tokens=96)[0][0]
    return f"> {lines[0]['question']}\n{thought}\n\n{solve(*end).describe()}"


class Solved(NamedTuple):
    """Counts of held-out problems: with the right format, right at temperature 0, right by a majority of VOTES."""

    problems: int
    form: int
    greedy: int
    vote: int

    def describe(self) -> str:
        right, by_vote = (with_error(count, self.problems) for count in (self.greedy, self.vote))
        return (
            f"Of {self.problems} new problems: form right {self.form / self.problems:.1%}, "
            f"answer right {right} greedy, {by_vote} by {VOTES} votes"
        )


def with_error(right: int, of: int) -> str:
    """A share with its standard error."""
    share = right / of
    return f"{share:.1%} ± {(share * (1 - share) / of) ** 0.5:.1%}"


def solve(model: MiniMindLM, tokenizer: PreTrainedTokenizerBase) -> Solved:
    """Ask every held-out problem, once greedy and VOTES times with eval_model.py's sampling."""
    lines = read_lines(DATA / "eval_reason.jsonl")
    questions = [line["question"] for line in lines]
    greedy, _ = answer(model, tokenizer, questions, max_new_tokens=96)
    torch.manual_seed(0)
    asked = [question for question in questions for _ in range(VOTES)]
    many, _ = answer(model, tokenizer, asked, 256, **SAMPLING | {"max_new_tokens": 96})
    elected = [majority(many[first : first + VOTES])[0] for first in range(0, len(many), VOTES)]
    form = sum(map(is_well_formed, greedy))
    return Solved(len(lines), form, count_right(lines, greedy), count_right(lines, elected))
