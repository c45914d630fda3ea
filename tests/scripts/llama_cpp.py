"""llama.cpp as the oracle for GGUF files: in fp32, and without the kernel that rounds to fp16."""

from pathlib import Path

import pytest
import torch

from benchmarks.comparison.llama_server import LlamaServer


def serve_gguf(path: Path) -> LlamaServer:
    """To be used in a `with` block; the test skips where llama.cpp is not installed."""
    pytest.importorskip("xllamacpp", reason="xllamacpp is not installed")
    return LlamaServer(path, 256, cache_type="f32", flash_attention=False)


def next_distributions(llama: LlamaServer, prompts: list[list[int]], tokenizer, **settings) -> torch.Tensor:
    """Natural logarithm of the probability of every next token: (prompts, vocab) fp32."""
    size = len(tokenizer)
    letter = [[tokenizer.convert_tokens_to_ids("a"), 1000]]  # it reports nothing of a token that is half a character
    replies = llama.complete(prompts, 1, n_probs=size, logit_bias=letter, **settings)
    theirs = torch.full((len(prompts), size), torch.nan)
    for row, reply in zip(theirs, replies, strict=True):
        for token in reply["completion_probabilities"][0]["top_logprobs"]:  # before the bias
            row[token["id"]] = token["logprob"]
    return theirs
