"""Answers that a model generates during its training: sampled by the engine, scored, and turned into training rows."""

import hashlib
import time
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from dataset import collate
from dataset.rl_dataset import RLDataset
from model.inference.request import Request
from model.inference.scheduler import Engine
from model.loss import IGNORE_INDEX
from trainer.evaluation import held_out_loader, sum_over_ranks
from trainer.parallel import plain_model
from trainer.policy_losses import group_advantages, without_signal
from trainer.rewards import Reply, WeighedReward, judge
from trainer.runtime import Runtime

SLOTS = 128  # answers written at once at most
OF_ANSWERS = ("reward", "length", "finished")  # reported values, summed over answers,
OF_GROUPS = ("no_signal", "resampled")  # and over groups, if a group has several answers
Batch = dict[str, Tensor]


class Written(NamedTuple):
    """An answer: its ids including the end token, its text without it, and whether it ended by itself."""

    ids: list[int]
    text: str
    finished: bool


class Group(NamedTuple):
    """The answers to one question, the reward of each rule (answers, rules), and their weighted sums."""

    number: int  # of the problem
    answers: list[Written]
    parts: list[list[float]]
    rewards: list[float]


def sampling_seed(seed: int, step: int, question: int, answer: int, attempt: int = 0) -> int:
    """The seed of one answer, independent of the rank that generates it and of the order: 63 bits of a hash."""
    text = f"{seed},{step},{question},{answer},{attempt}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


class Writer:
    """The engine with the weights being trained: call `refresh` before each generation.

    Args:
        answers: the maximum number of concurrent answers.
        slot_len: maximum length of prompt and answer together, in tokens.
        max_new_tokens: maximum length of an answer.
    """

    def __init__(
        self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, answers: int, slot_len: int, max_new_tokens: int
    ):
        self.limit = max_new_tokens
        self._engine = Engine(
            plain_model(model), tokenizer, slots=min(answers, SLOTS), slot_len=slot_len, token_budget=1024
        )

    def refresh(self, model: nn.Module) -> None:
        self._engine.refresh(plain_model(model))

    def write(self, prompts: Sequence[Sequence[int]], seeds: Sequence[int | None], temperature: float) -> list[Written]:
        """An answer to each prompt, sampled from the whole vocabulary, so that the trainer's log-probabilities, at the
        same temperature, are those of the sampling distribution."""
        answers = self._engine.run(
            Request(prompt=prompt, max_new_tokens=self.limit, temperature=temperature, seed=seed)
            for prompt, seed in zip(prompts, seeds, strict=True)
        )
        return [
            Written(answer.ids[len(prompt) :], answer.text, answer.finish_reason == "stop")
            for answer, prompt in zip(answers, prompts, strict=True)
        ]


class Rollouts:
    """Generates and scores the answers of a step and collates them. A rank's answers depend only on its questions.

    Args:
        dataset: the questions.
        args: seed, temperature, batch_size, accumulation_steps, max_seq_len, max_new_tokens.
        rewards: the rules.
        group_size: answers to each question.
        scale: divide advantages by the standard deviation of the group's rewards.
        resample: how often a question whose answers all have the same reward is replaced by another.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        dataset: RLDataset,
        args,
        rewards: Sequence[WeighedReward],
        group_size: int,
        scale: bool = True,
        resample: int = 0,
    ):
        self.args, self.rewards, self.group_size = args, rewards, group_size
        self.scale, self.resample = scale, resample
        self.dataset = dataset
        asked = args.batch_size * args.accumulation_steps * group_size
        self.writer = Writer(model, tokenizer, asked, args.max_seq_len, args.max_new_tokens)
        self._numbers = dataset.numbers
        groups = OF_GROUPS if group_size > 1 else ()
        self.names = [*OF_ANSWERS, *groups, *(f"reward_{reward.name}" for reward in rewards), "writing_seconds"]

    def write(self, model: nn.Module, questions: Sequence[Batch], step: int) -> tuple[list[Batch], dict[str, float]]:
        """A step's answers.

        Args:
            questions: micro-batches of prompts from the `StepLoader`.

        Returns:
            for each of these a micro-batch of answers, `group_size` rows a question: input_ids, labels, position_ids,
            attention_mask (answers, n) as `collate` makes them, the labels being the answer's tokens, and rewards and
            advantages within the group, (answers,); and sums over this rank's answers by `names`, with how many
            "answers" and "groups" there are.
        """
        started = time.monotonic()
        self.writer.refresh(model)
        asked = [_numbers_in(batch) for batch in questions]
        groups = self._groups([number for numbers in asked for number in numbers], step)
        sums = dict.fromkeys(("answers", "groups", *self.names), 0.0)
        batches, at = [], iter(groups)
        for numbers in asked:
            batches.append(self._rows([self._counted(next(at), sums) for _ in numbers]))
        if self.group_size > 1:
            sums["resampled"] = float(self._resampled)
        sums["writing_seconds"] = time.monotonic() - started
        return batches, sums

    def _groups(self, numbers: list[int], step: int) -> list[Group]:
        """A group of answers to each question; a question whose group gives no signal is replaced by another."""
        groups = self._written(numbers, step, 0)
        self._resampled = 0
        for attempt in range(1, self.resample + 1):
            empty = [i for i, group in enumerate(groups) if len(set(group.rewards)) == 1]
            if not empty:
                break
            drawn = (np.random.default_rng((self.args.seed, step, groups[i].number, attempt)) for i in empty)
            others = [int(generator.choice(self._numbers)) for generator in drawn]
            self._resampled += len(empty)
            for i, group in zip(empty, self._written(others, step, attempt), strict=True):
                groups[i] = group
        return groups

    def _written(self, numbers: list[int], step: int, attempt: int) -> list[Group]:
        size, seed = self.group_size, self.args.seed
        prompts = [self.dataset.prompt(number) for number in numbers]
        seeds = [sampling_seed(seed, step, number, k, attempt) for number in numbers for k in range(size)]
        answers = self.writer.write([p for p in prompts for _ in range(size)], seeds, self.args.temperature)
        groups = []
        for i, number in enumerate(numbers):
            own = answers[i * size : (i + 1) * size]
            parts = [self._judged(number, answer) for answer in own]
            groups.append(Group(number, own, parts, [weighed(values, self.rewards) for values in parts]))
        return groups

    def _judged(self, number: int, answer: Written) -> list[float]:
        return judge(reply_of(self.dataset, number, answer, self.writer.limit), self.rewards)

    def _counted(self, group: Group, sums: dict[str, float]) -> Group:
        sums["answers"] += len(group.answers)
        sums["groups"] += 1
        sums["reward"] += sum(group.rewards)
        sums["length"] += sum(len(answer.ids) for answer in group.answers)
        sums["finished"] += sum(answer.finished for answer in group.answers)
        if self.group_size > 1:
            sums["no_signal"] += float(without_signal(torch.tensor([group.rewards])))
        for i, reward in enumerate(self.rewards):
            sums[f"reward_{reward.name}"] += sum(values[i] for values in group.parts)
        return group

    def _rows(self, groups: Sequence[Group]) -> Batch:
        """A micro-batch; without questions one row of padding, so that the rank takes part in the collective calls."""
        if not groups:
            return collate([_row([], [])]) | {"rewards": torch.zeros(1), "advantages": torch.zeros(1)}
        items = [_row(self.dataset.prompt(group.number), answer.ids) for group in groups for answer in group.answers]
        rewards = torch.tensor([group.rewards for group in groups])
        advantages = group_advantages(rewards, self.scale)
        return collate(items) | {"rewards": rewards.flatten(), "advantages": advantages.flatten()}


def reply_of(dataset: RLDataset, number: int, answer: Written, limit: int) -> Reply:
    """An answer to a problem, in the form that the rules take."""
    problem = dataset.problem(number)
    tokens = answer.ids[:-1] if answer.finished else answer.ids
    return Reply(problem.chat, answer.text, problem.answer, tokens, answer.finished, limit)


def weighed(values: Sequence[float], rewards: Sequence[WeighedReward]) -> float:
    """The weighted sum of the rules' rewards."""
    return sum(reward.weight * value for reward, value in zip(rewards, values, strict=True))


def _numbers_in(batch: Batch) -> list[int]:
    """The numbers of the problems in a micro-batch of prompts; rows of padding have none."""
    return batch["number"][:, 0][batch["attention_mask"].any(1)].tolist()


def _row(prompt: Sequence[int], answer: Sequence[int]) -> Batch:
    return {
        "input_ids": torch.tensor([*prompt, *answer], dtype=torch.int64),
        "labels": torch.tensor([IGNORE_INDEX] * len(prompt) + list(answer), dtype=torch.int64),
        "position_ids": torch.arange(len(prompt) + len(answer)),
    }


def evaluate_answers(
    model: nn.Module, held_out: RLDataset, writer: Writer, rewards: Sequence[WeighedReward], run: Runtime, args
) -> dict[str, float]:
    """Greedy answers to the held-out questions, scored by the rules: means over all of them on all ranks.

    Returns:
        eval_reward, eval_length in tokens, and eval_NAME of each rule.

    Raises:
        EvaluationError: see `sum_over_ranks`.
    """

    def measure() -> list[float]:
        writer.refresh(model)
        loader = held_out_loader(held_out, args.batch_size, run)
        numbers = [number for (batch,) in loader.steps() for number in _numbers_in(batch)]
        answers = writer.write([held_out.prompt(number) for number in numbers], [None] * len(numbers), 0.0)
        sums = [0.0] * (3 + len(rewards))
        for number, answer in zip(numbers, answers, strict=True):
            values = judge(reply_of(held_out, number, answer, writer.limit), rewards)
            for i, value in enumerate([1.0, weighed(values, rewards), len(answer.ids), *values]):
                sums[i] += value
        return sums

    asked, *sums = sum_over_ranks(measure, 3 + len(rewards), model, run)
    names = ("reward", "length", *(reward.name for reward in rewards))
    return {f"eval_{name}": value / max(1, asked) for name, value in zip(names, sums, strict=True)}
