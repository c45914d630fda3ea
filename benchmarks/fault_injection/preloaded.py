"""What every training script imports, for the process that forks them to have it at hand. Nothing here computes, so
that no thread is running when it forks."""

import matplotlib.figure  # noqa: F401
import torch
import torch._dynamo
import transformers  # noqa: F401

from trainer.weights import load_tokenizer

torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])  # these two import more on first use
load_tokenizer()
