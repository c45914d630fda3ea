"""The networks: configuration, decoder, generation and chat rendering. Knows nothing of files, ranks or arguments."""

from model.config import LMConfig
from model.minimind3 import MiniMind3Config, MiniMind3LM
from model.model import MiniMindLM

GENERATIONS = {2: (LMConfig, MiniMindLM), 3: (MiniMind3Config, MiniMind3LM)}


def build_model(config: LMConfig) -> MiniMindLM:
    """A language model of the configuration's generation, with random weights."""
    return GENERATIONS[config.generation][1](config)


__all__ = ["GENERATIONS", "LMConfig", "MiniMind3Config", "MiniMind3LM", "MiniMindLM", "build_model"]
