"""The networks: configuration, decoder, generation and chat rendering. Knows nothing of files, ranks or arguments."""

from model.config import LMConfig
from model.model import MiniMindLM

__all__ = ["LMConfig", "MiniMindLM"]
