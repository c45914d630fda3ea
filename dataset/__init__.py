"""The data of a stage: jsonl files checked line by line, tokenised once, packed into rows, batched into steps."""

from dataset.dpo_dataset import DPODataset
from dataset.jsonl import DataError
from dataset.lm_dataset import PretrainDataset, SFTDataset
from dataset.loader import StepLoader, collate
from dataset.vlm_dataset import VLMDataset

__all__ = ["DPODataset", "DataError", "PretrainDataset", "SFTDataset", "StepLoader", "VLMDataset", "collate"]
