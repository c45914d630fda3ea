"""The two networks of PPO in one module: the policy, and the critic, which estimates the value of each position."""

from torch import Tensor

from model.config import LMConfig
from model.model import MiniMindLM, MiniMindOutput
from model.model_reward import MiniMindReward

CRITIC = "critic."  # the keys of the parameters that the policy alone lacks


class ActorCritic(MiniMindLM):
    """A MiniMind, whose parameters keep their names, and a `critic` of the same size beside it.

    `forward` gives the policy's output, and the critic's values at the same positions, (positions,) fp32.
    """

    def __init__(self, config: LMConfig | None = None):
        super().__init__(config)
        self.critic = MiniMindReward(self.config)

    def forward(self, *args, logits_to_keep: Tensor, **others) -> tuple[MiniMindOutput, Tensor]:
        """See `MiniMindLM.forward`; `logits_to_keep`: (batch, n) bool."""
        out = super().forward(*args, logits_to_keep=logits_to_keep, **others)
        judged = self.critic(*args, logits_to_keep=logits_to_keep, **others)
        out.aux_loss = out.aux_loss + judged.aux_loss
        return out, judged.logits

    def copy_policy_to_critic(self) -> None:
        """Initialise the critic from the policy; its values are 0 then."""
        policy = {key: value for key, value in self.state_dict().items() if not key.startswith(CRITIC)}
        self.critic.load_state_dict(policy, strict=False)  # all but the head, which the policy does not have
