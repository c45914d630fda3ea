"""Questions about images: asking them, and telling seeing from guessing."""

import math
import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import CLIPImageProcessorPil

from model.images import prepare_chat
from model.model_vlm import MiniMindVLM
from scripts.demo.exam import left_padded
from scripts.demo.scoring import is_right, normalise


@torch.inference_mode()
def look(
    model: MiniMindVLM,
    tokenizer,
    processor: CLIPImageProcessorPil,
    images_path: Path,
    exam: Sequence[dict],
    batch_size: int = 128,
) -> list[str]:
    """Greedy answers to questions about images, `{"image": [name, …], "question"}`."""
    prompts = []
    for question in exam:
        content = [*(images_path / name for name in question["image"]), question["question"]]
        prompts.append(prepare_chat(tokenizer, [{"role": "user", "content": content}], model.config, processor))
    lengths = [prompt.input_ids.size(1) for prompt in prompts]
    by_length = sorted(range(len(exam)), key=lambda i: lengths[i])
    replies = [""] * len(exam)
    for start in range(0, len(exam), batch_size):
        chosen = by_length[start : start + batch_size]
        ids = left_padded([prompts[i].input_ids[0].tolist() for i in chosen])
        real = left_padded([[1] * lengths[i] for i in chosen])
        places = left_padded([prompts[i].images["image_mask"][0].tolist() for i in chosen]).bool()
        pixels = torch.cat([prompts[i].images["pixel_values"] for i in chosen])
        ids, real, places, pixels = (tensor.to(model.device) for tensor in (ids, real, places, pixels))
        written = model.generate(ids, real, image_mask=places, pixel_values=pixels, max_new_tokens=24)[:, ids.size(1) :]
        for i, reply in zip(chosen, tokenizer.batch_decode(written, skip_special_tokens=True), strict=True):
            replies[i] = reply
    return replies


def shuffled(exam: Sequence[dict], seed: int = 0) -> list[dict]:
    """The same questions with images swapped among those of one kind and language."""
    mixed = list(exam)
    for numbers in _groups(exam).values():
        others = random.Random(seed).sample(numbers, len(numbers))
        for number, other in zip(numbers, others, strict=True):
            mixed[number] = exam[number] | {"image": exam[other]["image"]}
    return mixed


def shares(
    exam: Sequence[dict], replies: Sequence[str], blind: Sequence[str]
) -> dict[tuple[str, str], dict[str, float]]:
    """For each (language, kind): the share of `right` answers, of `majority` (always giving the most frequent answer)
    and of `shuffled` (with swapped images), the number `asked`, and `limit`: what `shuffled` may reach by chance, three
    standard deviations above `majority`."""
    result = {}
    for group, numbers in _groups(exam).items():
        asked = len(numbers)
        wanted = Counter(normalise(exam[i]["answers"][0]) for i in numbers)
        majority = wanted.most_common(1)[0][1] / asked
        result[group] = {
            "right": sum(is_right(replies[i], exam[i]["answers"]) for i in numbers) / asked,
            "majority": majority,
            "shuffled": sum(is_right(blind[i], exam[i]["answers"]) for i in numbers) / asked,
            "asked": asked,
            "limit": majority + 3 * math.sqrt(majority * (1 - majority) / asked),
        }
    return result


def _groups(exam: Sequence[dict]) -> dict[tuple[str, str], list[int]]:
    groups = defaultdict(list)
    for number, question in enumerate(exam):
        groups[question["lang"], question["kind"]].append(number)
    return groups
