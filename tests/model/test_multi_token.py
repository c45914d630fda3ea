"""Multi-token prediction: its loss compared with a slow loop, what it must not affect, and self-drafting."""

import pytest
import torch
import torch.nn.functional as F

from model import LMConfig, MiniMindLM
from model.attention import rope_angles
from model.loss import target_mask
from model.self_speculation import write_with_drafts

SIZES = {"dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 64}


def random_model(**sizes) -> MiniMindLM:
    torch.manual_seed(0)
    model = MiniMindLM(LMConfig(**SIZES | {"mtp_depth": 2} | sizes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.2 * torch.randn_like(parameter) + (parameter.dim() == 1))
    return model


def slow_loss(model: MiniMindLM, ids: torch.Tensor) -> torch.Tensor:
    """Mean over the modules of the summed cross-entropy in one sample (n,), position by position, each recomputed from
    exactly the positions before it."""
    seen = []
    hook = model.norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model(ids[None])
    hook.remove()
    h, total = seen[0][0], 0.0
    first = h
    for k, module in enumerate(model.mtp, start=1):
        places = len(ids) - k  # positions that have a token k further on
        if places < 1:
            break
        rows = h[:places] if module.sequential else first[:places]
        if module.sequential:
            embedded = model.tok_embeddings(ids[k:])
            both = [F.rms_norm(t, (32,), norm.weight, norm.eps) for t, norm in
                    ((rows, module.hidden_norm), (embedded, module.embedding_norm))]  # fmt: skip
            rows = torch.cat(both, 1) @ module.merge.weight.T
        made = []
        for i in range(places):
            rope = rope_angles(torch.arange(i + 1)[None], 8, model.config.rope_theta)
            made.append(module.block(rows[None, : i + 1], rope, None, None, None)[0][0, -1])
        h = torch.stack(made)
        logits = module.norm(h[:-1]) @ model.output.weight.T
        total = total + F.cross_entropy(logits, ids[k + 1 :], reduction="sum")
    return total / len(model.mtp)


@pytest.mark.parametrize("how", ["sequential", "parallel"])
def test_the_loss_is_that_of_a_slow_loop_also_in_packed_rows(how):
    model = random_model(mtp=how).train()
    model.mtp.learn(0.3)
    samples = [torch.randint(0, 64, (n,)) for n in (7, 2, 5, 9)]
    rows = torch.stack([torch.cat(samples[:3]), F.pad(samples[3], (0, 5))])
    positions = torch.stack([torch.cat([torch.arange(7), torch.arange(2), torch.arange(5)]), torch.arange(14)])
    mask = torch.ones_like(rows)
    mask[1, 9:] = 0
    labels = rows.masked_fill((positions == 0) | (mask == 0), -100)
    out = model(rows, attention_mask=mask, position_ids=positions, logits_to_keep=target_mask(labels))
    expected = sum(slow_loss(model, sample) for sample in samples)
    torch.testing.assert_close(out.mtp_loss, 0.3 * expected, atol=1e-4, rtol=1e-5)
    out.mtp_loss.backward()
    assert all(parameter.grad is not None for parameter in model.mtp.parameters())


@pytest.mark.parametrize("how", ["sequential", "parallel"])
def test_what_is_not_trained_neither_runs_nor_has_gradients(how):
    model, ids = random_model(mtp=how).train(), torch.randint(0, 64, (1, 9))
    kept = torch.ones(1, 9, dtype=torch.bool)
    assert model(ids, logits_to_keep=kept).mtp_loss is None
    assert not any(parameter.requires_grad for parameter in model.mtp.parameters())
    model.mtp.learn(0.3)
    assert model(ids, logits_to_keep=kept).mtp_loss > 0
    assert model.eval()(ids, logits_to_keep=kept).mtp_loss is None


def test_the_models_own_logits_are_those_without_modules():
    model, ids = random_model().eval(), torch.randint(0, 64, (1, 9))
    plain = MiniMindLM(LMConfig(**SIZES)).eval()
    plain.load_state_dict({name: value for name, value in model.state_dict().items() if not name.startswith("mtp.")})
    torch.testing.assert_close(model(ids).logits, plain(ids).logits)


VARIANTS = [{}, {"mtp": "parallel"}, {"mtp_depth": 1}, {"attention": "mla"}, {"use_moe": True, "balance": "bias"}]


@pytest.mark.parametrize("sizes", VARIANTS)
def test_a_text_with_drafts_is_the_text_without(sizes):
    model = random_model(**sizes).eval()
    prompt = torch.randint(0, 64, (7,)).tolist()
    alone = model.generate(torch.tensor([prompt]), max_new_tokens=30, eos_token_id=())[0, 7:].tolist()
    text = write_with_drafts(model, prompt, 30)
    assert text.tokens == alone
    assert text.guessed[0] == text.passes - 1
    stopped = write_with_drafts(model, prompt, 30, stop=alone[11])
    assert stopped.tokens == alone[: alone.index(alone[11]) + 1]


@pytest.mark.parametrize("how", ["sequential", "parallel"])
def test_what_was_learned_is_guessed_right(how):
    """A repetitive text is memorised: most drafts are right, and forward passes are saved."""
    model = random_model(mtp=how, n_layers=1).train()
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05) if parameter.dim() == 2 else torch.nn.init.ones_(parameter)
    model.mtp.learn(1.0)
    ids = torch.arange(3, 11).repeat(4)[None]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        out = model(ids, labels=ids, logits_to_keep=target_mask(ids))
        (out.loss + out.mtp_loss / ids.numel()).backward()
        optimizer.step()
        optimizer.zero_grad()
    text = write_with_drafts(model.eval(), list(range(3, 11)), 24)
    assert text.tokens == [*range(3, 11)] * 3
    assert text.right[0] >= 0.7 * text.guessed[0]
    assert text.passes <= 14


def test_a_model_without_modules_has_no_drafts():
    with pytest.raises(ValueError, match="mtp_depth 0"):
        write_with_drafts(MiniMindLM(LMConfig(**SIZES)), [3], 2)
    with pytest.raises(ValueError, match="longer than the model's 16 positions"):
        write_with_drafts(random_model(max_seq_len=16), [3], 14)
