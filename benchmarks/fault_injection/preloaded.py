"""The imports of every training script, for the process that forks them. Nothing here computes, so that no thread is
running when it forks."""

import importlib

import torch

from trainer.weights import load_tokenizer

MODULES = (
    *("matplotlib.figure", "torch._dynamo", "transformers", "benchmarks.fault_injection.striking"),
    *("dataset", "model.model_lora", "model.model_vlm", "trainer.checkpoint", "trainer.chunked", "trainer.data"),
    *("trainer.evaluation", "trainer.parallel", "trainer.preference", "trainer.schedule", "trainer.teacher"),
    "trainer.vision",
)

for name in MODULES:
    importlib.import_module(name)
torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])  # these two import more on first use
load_tokenizer()
