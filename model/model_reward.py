"""A MiniMind with a scalar head: it scores whole answers (a reward model) or each token of one (PPO's critic)."""

from torch import Tensor, nn

from model.config import LMConfig
from model.model import MiniMindLM, MiniMindOutput
from model.segments import last_targets

SCORE = "score."  # the key of the parameter that a language model lacks


class MiniMindReward(MiniMindLM):
    """The decoder and `score.weight` (1, dim), fp32: a score at each requested position.

    `forward` is that of `MiniMindLM`; its `logits` are scores, (positions,), if `logits_to_keep` is a mask.
    """

    def __init__(self, config: LMConfig | None = None):
        super().__init__(config)
        self.score = nn.Linear(self.config.dim, 1, bias=False)
        nn.init.zeros_(self.score.weight)  # it starts by scoring everything 0

    def forward(self, *args, logits_to_keep: Tensor, **others) -> MiniMindOutput:
        """Scores at the positions selected by `logits_to_keep`, (batch, n) bool; see `MiniMindLM.forward`."""
        out = super().forward(*args, logits_to_keep=logits_to_keep, **others)
        out.logits = self.score(out.last_hidden_state).float().squeeze(-1)
        return out


def answer_scores(model: nn.Module, batch: dict[str, Tensor], labels: Tensor) -> tuple[Tensor, Tensor]:
    """One score per sample, read at the last token of its last answer: the `</s>` that closes it.

    Args:
        batch: input_ids, attention_mask, position_ids (rows, n), samples possibly packed.
        labels: (rows, n), -100 outside the answers.

    Returns:
        scores (samples,) fp32, in the order of the rows; the auxiliary loss.
    """
    out = model(**batch, logits_to_keep=last_targets(batch, labels))
    return out.logits, out.aux_loss
