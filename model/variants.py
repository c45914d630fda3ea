"""The parts of a block: the plain decoder's, or the variants that the configuration names."""

from torch import nn

from model.attention import Attention
from model.balanced_moe import BalancedMoE
from model.config import LMConfig
from model.feed_forward import FeedForward, MoEFeedForward
from model.latent_attention import LatentAttention


def make_attention(config: LMConfig, layer: int) -> nn.Module:
    return (LatentAttention if config.attention == "mla" else Attention)(config, layer)


def make_feed_forward(config: LMConfig) -> nn.Module:
    if not config.use_moe:
        return FeedForward(config)
    return (BalancedMoE if config.balance == "bias" else MoEFeedForward)(config)
