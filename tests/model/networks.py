"""Small networks for tests, and the independent implementations they are compared with."""

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from model import LMConfig, MiniMindLM

VOCAB = 96
KINDS = {"dense": {"use_moe": False}, "moe": {"use_moe": True}}


def network(seed: int = 0, **settings) -> MiniMindLM:
    """A two-layer network in eval mode, with weights so large that every part affects the logits visibly."""
    shape = {"dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "vocab_size": VOCAB, "max_seq_len": 256}
    model = MiniMindLM(LMConfig(**shape | settings)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            mean = 1.0 if parameter.dim() == 1 else 0.0  # norms
            parameter.copy_(mean + 0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def random_ids(*shape: int, seed: int = 0) -> Tensor:
    """Random ids, special tokens excluded."""
    return torch.randint(3, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_all_close(got: dict[str, Tensor], expected: dict[str, Tensor], **tolerance: float) -> None:
    assert got.keys() == expected.keys()
    for name in got:
        torch.testing.assert_close(
            got[name], expected[name], msg=lambda text, name=name: f"{name}: {text}", **tolerance
        )


class SlowExperts(nn.Module):
    """The mixture of experts by its definition, one token at a time."""

    def __init__(self, state: dict[str, Tensor], config: LMConfig):
        super().__init__()
        self.config = config
        self.weights = nn.ParameterDict({name.replace(".", "/"): value for name, value in state.items()})

    def expert(self, name: str, token: Tensor) -> Tensor:
        w1, w2, w3 = (self.weights[f"{name}/w{n}/weight"] for n in (1, 2, 3))
        gate = w1 @ token
        return w2 @ (gate * torch.sigmoid(gate) * (w3 @ token))

    def of_token(self, token: Tensor) -> Tensor:
        config = self.config
        scores = (self.weights["gate/weight"] @ token).exp()
        scores = scores / scores.sum()
        best = sorted(range(config.n_routed_experts), key=lambda e: -scores[e].item())[: config.num_experts_per_tok]
        scale = sum(scores[e] for e in best) if config.norm_topk_prob and len(best) > 1 else 1.0
        out = sum(scores[e] / scale * self.expert(f"experts/{e}", token) for e in best)
        return out + self.expert("shared_experts", token) if config.n_shared_experts else out

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.of_token(token) for token in x.flatten(0, -2)]).view(x.shape)


class Llama:
    """transformers' Llama with a MiniMind's weights; a mixture of experts is computed by `SlowExperts`.

    transformers rotates the pairs (i, i + head_dim / 2), MiniMind (2i, 2i + 1), so the rows of the query and key
    matrices are reordered.
    """

    NAMES = (
        ("tok_embeddings.", "model.embed_tokens."),
        ("layers.", "model.layers."),
        (".attention_norm.", ".input_layernorm."),
        (".ffn_norm.", ".post_attention_layernorm."),
        (".attention.w", ".self_attn.w"),
        (".wq.", ".q_proj."),
        (".wk.", ".k_proj."),
        (".wv.", ".v_proj."),
        (".wo.", ".o_proj."),
        (".feed_forward.w1.", ".mlp.gate_proj."),
        (".feed_forward.w2.", ".mlp.down_proj."),
        (".feed_forward.w3.", ".mlp.up_proj."),
    )

    def __init__(self, model: MiniMindLM):
        self.config = config = model.config
        self.llama = LlamaForCausalLM(
            LlamaConfig(
                hidden_size=config.dim,
                num_hidden_layers=config.n_layers,
                num_attention_heads=config.n_heads,
                num_key_value_heads=config.n_kv_heads,
                intermediate_size=config.hidden_dim,
                vocab_size=config.vocab_size,
                rms_norm_eps=config.norm_eps,
                max_position_embeddings=config.max_seq_len,
                rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
                tie_word_embeddings=True,
                pad_token_id=0,
                bos_token_id=1,
                eos_token_id=2,
            )
        ).eval()
        state = {name: value.detach().clone() for name, value in model.named_parameters()}
        if config.use_moe:
            for number, layer in enumerate(self.llama.model.layers):
                prefix = f"layers.{number}.feed_forward."
                own = {name.removeprefix(prefix): state.pop(name) for name in [*state] if name.startswith(prefix)}
                layer.mlp = SlowExperts(own, config)
        with torch.no_grad():
            parameters = dict(self.llama.named_parameters())
            for name, value in state.items():
                parameters[self.name_of(name)].copy_(self.in_order_of_llama(name, value))

    def name_of(self, name: str) -> str:
        """MiniMind's parameter name -> the name in this class."""
        if self.config.use_moe and ".feed_forward." in name:
            prefix, own = name.split(".feed_forward.")
            return f"model.{prefix}.mlp.weights.{own.replace('.', '/')}"
        if name == "norm.weight":
            return "model.norm.weight"
        for ours, theirs in self.NAMES:
            name = name.replace(ours, theirs)
        return name

    def in_order_of_llama(self, name: str, value: Tensor) -> Tensor:
        if ".wq." in name or ".wk." in name:
            return value.unflatten(0, (-1, self.config.head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)
        return value

    def gradients_like(self, model: MiniMindLM) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Gradients of `model` and of this Llama, under the same names and with rows in the same order."""
        mine = {name: parameter.grad for name, parameter in self.llama.named_parameters()}
        theirs = {self.name_of(name): self.in_order_of_llama(name, g) for name, g in gradients(model).items()}
        return theirs, mine
