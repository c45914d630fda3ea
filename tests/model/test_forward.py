"""model/model.py: forward and gradients, compared with transformers' Llama, a slow loop, and formulas by hand."""

import copy
import math
import os
import shutil

import pytest
import torch
from torch import nn

from model import LMConfig, MiniMindLM
from model.attention import Attention
from model.feed_forward import FeedForward, MoEFeedForward, load_balancing_loss
from model.loss import next_token_loss, target_mask
from model.norm import RMSNorm
from tests.model.networks import KINDS, VOCAB, Llama, assert_all_close, gradients, network, random_ids

CLOSE = {"rtol": 1e-4, "atol": 1e-5}
EXPERTS = {
    "two of four": {},
    "one of two, none shared": {"num_experts_per_tok": 1, "n_routed_experts": 2, "n_shared_experts": False},
    "weights not renormalised": {"norm_topk_prob": False},
    "all of them": {"num_experts_per_tok": 4},
}


@pytest.mark.parametrize("flash_attn", [True, False])
def test_dense_logits_loss_and_gradients_are_llamas(flash_attn):
    model = network(flash_attn=flash_attn, n_layers=3).train()
    assert_like_llama(model, random_ids(2, 12))


@pytest.mark.parametrize("name", EXPERTS)
def test_moe_logits_loss_and_gradients_are_those_of_a_loop_over_tokens(name):
    model = network(use_moe=True, aux_loss_alpha=0.0, **EXPERTS[name]).train()
    assert_like_llama(model, random_ids(2, 12))


def assert_like_llama(model, ids):
    oracle = Llama(model)
    labels = ids.clone()
    labels[0, :5] = -100
    labels[1, -1] = -100
    ours = model(ids, labels=labels)
    theirs = oracle.llama(ids, labels=labels)
    torch.testing.assert_close(ours.logits, theirs.logits, **CLOSE)
    torch.testing.assert_close(ours.loss, theirs.loss)
    ours.loss.backward()
    theirs.loss.backward()
    got, expected = oracle.gradients_like(model)
    assert all(gradient.abs().max() > 1e-4 for gradient in expected.values()), "each parameter must take part"
    assert_all_close(got, expected, **CLOSE)


@pytest.mark.parametrize("use_moe", KINDS.values(), ids=KINDS)
def test_attention_by_hand_equals_fused_attention(use_moe):
    fused, by_hand = network(**use_moe).train(), network(**use_moe, flash_attn=False).train()
    ids = random_ids(2, 11)
    padding = torch.ones_like(ids)
    padding[0, :4] = 0
    positions = torch.tensor([0, 1, 2, 0, 1, 0, 1, 2, 3, 4, 0])
    for arguments in ({}, {"attention_mask": padding}, {"position_ids": positions[None]}):
        outs = [model(ids, **arguments, labels=ids) for model in (fused, by_hand)]
        torch.testing.assert_close(outs[0].logits, outs[1].logits, **CLOSE)
        for model, out in zip((fused, by_hand), outs, strict=True):
            model.zero_grad()
            out.loss.backward()
        assert_all_close(gradients(fused), gradients(by_hand), **CLOSE)
        with torch.no_grad():
            outs = [model(ids, **arguments, use_cache=True) for model in (fused, by_hand)]
            torch.testing.assert_close(outs[0].logits, outs[1].logits, **CLOSE)
            more = [
                model(random_ids(2, n), past_key_values=out.past_key_values).logits
                for n in (1, 3)
                for model, out in zip((fused, by_hand), outs, strict=True)
            ]
        torch.testing.assert_close(more[0], more[1], **CLOSE)
        torch.testing.assert_close(more[2], more[3], **CLOSE)


def test_rms_norm_by_its_formula_in_fp32():
    norm = RMSNorm(4, eps=0.5)
    norm.weight.data = torch.tensor([1.0, 2.0, 3.0, -1.0])
    x = [3.0, -1.0, 2.0, 4.0]
    rms = math.sqrt(sum(value**2 for value in x) / 4 + 0.5)
    expected = torch.tensor([value / rms * weight for value, weight in zip(x, [1, 2, 3, -1], strict=True)])
    torch.testing.assert_close(norm(torch.tensor(x)), expected)
    # squares that half precision cannot hold: 300 ** 2 is beyond float16
    large = torch.tensor([300.0, -300.0, 300.0, 300.0])
    norm = RMSNorm(4, eps=1e-5).half()
    assert norm(large.half()).tolist() == [1, -1, 1, 1]


# ----------------------------------------------------------------------------------------- balance of the experts


def balance_by_hand(scores, chosen, non_padding, per_row):
    """Auxiliary loss without alpha, in plain Python: sum over experts of share * experts * mean probability."""
    rows = range(len(scores))
    groups = [[row] for row in rows] if per_row else [list(rows)]
    losses = []
    for group in groups:
        tokens = [(scores[r][t], chosen[r][t]) for r in group for t in range(len(scores[r])) if non_padding[r][t]]
        if not tokens:
            continue
        experts, k = len(tokens[0][0]), len(tokens[0][1])
        loss = 0.0
        for expert in range(experts):
            share = sum(picked.count(expert) for _, picked in tokens) / (len(tokens) * k)
            mean = sum(probabilities[expert] for probabilities, _ in tokens) / len(tokens)
            loss += share * experts * mean
        losses.append(loss)
    return sum(losses) / len(losses)


@pytest.mark.parametrize("per_row", [True, False])
def test_balancing_loss_by_hand_without_padding_and_with_it(per_row):
    generator = torch.Generator().manual_seed(0)
    probabilities = torch.randn(4, 6, 5, generator=generator).mul(2).softmax(-1)
    chosen = probabilities.topk(2).indices
    non_padding = torch.tensor(
        [[1] * 6, [0, 0, 1, 1, 1, 1], [1, 0, 0, 0, 0, 0], [0] * 6]
    ).bool()  # the last row is empty
    for mask in (torch.ones_like(non_padding), non_padding):
        got = load_balancing_loss(probabilities, chosen, mask, per_row).item()
        expected = balance_by_hand(probabilities.tolist(), chosen.tolist(), mask.tolist(), per_row)
        assert got == pytest.approx(expected, abs=1e-6)
    nothing = load_balancing_loss(probabilities, chosen, torch.zeros_like(non_padding), per_row)
    assert nothing.item() == 0


@pytest.mark.parametrize("seq_aux", [True, False])
def test_the_models_auxiliary_loss_is_alpha_times_the_sum_over_layers(seq_aux):
    model = network(use_moe=True, seq_aux=seq_aux, aux_loss_alpha=0.3).train()
    ids = random_ids(3, 7)
    mask = torch.tensor([[1] * 7, [0, 0, 0, 1, 1, 1, 1], [1, 1, 0, 0, 0, 0, 0]])
    heard = []
    for layer in model.layers:
        layer.feed_forward.gate.register_forward_hook(lambda gate, args, out: heard.append(out.detach().view(3, 7, 4)))
    out = model(ids, mask, labels=ids.masked_fill(mask == 0, -100))
    expected = 0.3 * sum(
        balance_by_hand(scores.tolist(), scores.topk(2).indices.tolist(), mask.tolist(), seq_aux) for scores in heard
    )
    assert len(heard) == 2
    assert out.aux_loss.item() == pytest.approx(expected, abs=1e-5)
    assert model(ids, mask).aux_loss.item() == out.aux_loss.item(), "labels or not"
    labels = ids.masked_fill(mask == 0, -100)
    cross_entropy = next_token_loss(out.logits, labels) / (labels[:, 1:] != -100).sum()
    torch.testing.assert_close(out.loss, cross_entropy + out.aux_loss)
    out.aux_loss.backward()
    assert all(layer.feed_forward.gate.weight.grad.abs().max() > 0 for layer in model.layers)
    assert model.eval()(ids, mask, labels=labels).aux_loss == 0


def test_the_auxiliary_loss_of_a_dense_model_is_zero():
    assert network().train()(random_ids(1, 4)).aux_loss == 0


def test_an_expert_without_a_token_gets_a_zero_gradient():
    model = network(use_moe=True).train()
    scores = []
    model.layers[0].feed_forward.gate.register_forward_hook(lambda gate, args, out: scores.append(out))
    model(random_ids(1, 2), labels=random_ids(1, 2)).loss.backward()
    idle = {0, 1, 2, 3} - set(scores[-1].topk(2).indices.flatten().tolist())
    assert idle, "the test needs an expert that nobody chose"
    for expert in idle:
        for parameter in model.layers[0].feed_forward.experts[expert].parameters():
            assert parameter.grad.abs().max() == 0
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_training_of_moe_with_more_tokens_than_it_can_count(dtype):
    """70,400 tokens, nearly all for the same two experts: float16 ends at 65,504, bfloat16 counts exactly to 256."""
    model = network(use_moe=True, seq_aux=False, n_layers=1, dim=16, n_heads=2, n_kv_heads=1).train()
    with torch.no_grad():
        model.layers[0].ffn_norm.weight.fill_(1)
        model.tok_embeddings.weight[:, 0] = 3  # a direction that all tokens share, and that two experts prefer
        model.layers[0].feed_forward.gate.weight[:2, 0] = 3
    ids = random_ids(2200, 32)
    gate = model.layers[0].feed_forward.gate
    counts = []
    gate.register_forward_hook(lambda g, a, out: counts.append(out.topk(2)[1].flatten().bincount(minlength=4).max()))
    results = {}
    for precision in (torch.float32, dtype):
        model.zero_grad()
        with torch.autocast("cpu", precision, enabled=precision != torch.float32):
            out = model(ids, labels=ids)
        (out.loss * 2**14).backward()  # scaled, as in training, so that float16 can represent the small ones
        results[precision] = (out.loss, out.aux_loss, {n: g / 2**14 for n, g in gradients(model).items()})
    assert min(counts) > 65_504
    (loss, aux, grads), (loss16, aux16, grads16) = results.values()
    assert aux16.dtype == loss16.dtype == torch.float32
    torch.testing.assert_close(aux16, aux, rtol=2e-3, atol=0)
    torch.testing.assert_close(loss16, loss, rtol=5e-3, atol=0)
    for name in grads:
        difference = (grads16[name] - grads[name]).norm() / grads[name].norm().clamp(min=1e-3)
        assert difference < 0.05, f"{name}: {difference:.3f} off"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("use_moe", KINDS.values(), ids=KINDS)
def test_a_model_in_half_precision_reads_and_writes(use_moe, dtype):
    exact = network(**use_moe)
    ids = random_ids(2, 9)
    expected = exact(ids).logits.softmax(-1)
    half = copy.deepcopy(exact).to(dtype)
    out = half(ids, use_cache=True)
    assert out.logits.dtype == dtype
    assert (out.logits.float().softmax(-1) - expected).abs().mean() < 0.02
    assert half.generate(ids, max_new_tokens=3, eos_token_id=()).shape == (2, 12)


# ------------------------------------------------------------------------------------------------- arguments and loss


def test_labels_are_shifted_inside_and_ignored_at_minus_100():
    model = network()
    ids = random_ids(2, 6)
    labels = ids.clone()
    labels[0] = torch.tensor([5, -100, 7, -100, -100, 9])
    logits = model(ids).logits.double().log_softmax(-1)
    trained = [(row, place) for row in range(2) for place in range(1, 6) if labels[row, place] != -100]
    terms = [-logits[row, place - 1, labels[row, place]] for row, place in trained]
    assert len(terms) == 7
    assert model(ids, labels=labels).loss.item() == pytest.approx((sum(terms) / 7).item(), abs=1e-6)
    assert next_token_loss(model(ids).logits, labels).item() == pytest.approx(sum(terms).item(), abs=1e-5)
    assert model(ids).loss is None
    assert model(ids, labels=torch.full_like(ids, -100)).loss == 0, "nothing to learn is no 0 / 0"


def test_the_loss_is_taken_in_fp32():
    logits = (torch.randn(1, 50, VOCAB, generator=torch.Generator().manual_seed(0)) * 8).bfloat16()
    labels = random_ids(1, 50)
    exact = torch.nn.functional.cross_entropy(logits[0, :-1].double(), labels[0, 1:], reduction="sum")
    assert next_token_loss(logits, labels).item() == pytest.approx(exact.item(), rel=1e-6)


def test_logits_to_keep():
    model = network()
    ids = random_ids(2, 6)
    logits = model(ids).logits
    torch.testing.assert_close(model(ids, logits_to_keep=2).logits, logits[:, -2:])
    torch.testing.assert_close(model(ids, logits_to_keep=0).logits, logits)
    wanted = torch.tensor([[0, 1, 0, 0, 1, 1], [0, 0, 0, 0, 0, 1]]).bool()
    picked = model(ids, logits_to_keep=wanted).logits
    torch.testing.assert_close(picked, torch.stack([logits[0, 1], logits[0, 4], logits[0, 5], logits[1, 5]]))


def test_logits_where_something_is_learned_give_the_same_loss_and_gradients():
    model = network(use_moe=True).train()
    ids = random_ids(3, 7)
    labels = ids.clone()
    labels[0] = -100
    labels[1, :4] = -100
    assert target_mask(labels).sum(1).tolist() == [0, 3, 6]
    results = []
    for keep in (0, target_mask(labels)):
        model.zero_grad()
        out = model(ids, labels=labels, logits_to_keep=keep)
        out.loss.backward()
        results.append((out.loss, next_token_loss(out.logits, labels), gradients(model)))
    assert out.logits.shape == (9, VOCAB)
    torch.testing.assert_close(results[0][:2], results[1][:2])
    assert_all_close(results[0][2], results[1][2], **CLOSE)


def test_the_output_is_a_transformers_output():
    out = network(use_moe=True).train()(random_ids(1, 3), labels=random_ids(1, 3), use_cache=True)
    assert set(out.keys()) == {"loss", "logits", "cache", "aux_loss", "last_hidden_state"}
    assert out.past_key_values is out.cache
    assert out[0] is out.loss
    assert out["logits"] is out.logits is out.to_tuple()[1]
    assert network()(random_ids(1, 3)).past_key_values is None


@pytest.mark.parametrize("compiled", [False, True])
def test_positions_beyond_max_seq_len_raise(compiled):
    torch.compiler.reset()
    model = network(max_seq_len=8)
    call = torch.compile(model, backend="eager") if compiled else model
    ids = random_ids(1, 8)
    cache = call(ids, use_cache=True).past_key_values
    assert cache.length == 8
    for reason, arguments in {
        "position 8": {"input_ids": random_ids(1, 9)},
        "position 11": {"input_ids": ids, "position_ids": torch.arange(4, 12)[None]},
        "position 9": {"input_ids": random_ids(1, 2), "past_key_values": cache},
        "position 10": {"input_ids": random_ids(1, 12), "attention_mask": torch.tensor([[0] + [1] * 11])},
    }.items():
        with pytest.raises(ValueError, match=f"{reason} is beyond the model's max_seq_len of 8"):
            call(**arguments)
    padded = torch.tensor([[0] * 4 + [1] * 8])
    torch.testing.assert_close(call(random_ids(1, 12), padded).logits[:, 4:], model(random_ids(1, 12)[:, 4:]).logits)


def test_an_attention_mask_of_another_length_is_refused():
    with pytest.raises(ValueError, match="must have 4"):
        network()(random_ids(1, 4), torch.ones(1, 5))
    with pytest.raises(ValueError, match="must have 4"):
        network()(random_ids(1, 4), torch.ones(1, 1, 4, 4))


# ------------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("use_moe", KINDS.values(), ids=KINDS)
def test_gradient_checkpointing_gives_the_same_gradients(use_moe):
    ids = random_ids(2, 9)
    results, calls = [], []
    for checkpointing in (False, True):
        model = network(**use_moe, dropout=0.1).train()
        model.gradient_checkpointing = checkpointing
        seen = []
        model.layers[0].ffn_norm.register_forward_hook(lambda *_, seen=seen: seen.append(1))
        torch.manual_seed(0)
        model(ids, labels=ids).loss.backward()
        results.append(gradients(model))
        calls.append(len(seen))
    assert calls == [1, 2], "the blocks are computed again in the backward pass"
    assert_all_close(results[1], results[0], rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")  # under a name that only newer versions have
def test_gradient_checkpointing_is_switched_as_transformers_does():
    model = network()
    model.gradient_checkpointing_enable()
    assert model.gradient_checkpointing
    model.gradient_checkpointing_disable()
    assert not model.gradient_checkpointing


@pytest.mark.parametrize("flash_attn", [True, False])
def test_dropout_is_for_training_only(flash_attn):
    plain, model = network(), network(dropout=0.5, flash_attn=flash_attn)
    ids = random_ids(2, 9)
    torch.testing.assert_close(model(ids).logits, plain(ids).logits, **CLOSE)
    model.train()
    assert (model(ids).logits - model(ids).logits).abs().max() > 0.1
    for layer in model.layers:  # with residual dropout off, only the attention weights' dropout is left
        layer.dropout.p = 0.0
    model.dropout.p = 0.0
    assert (model(ids).logits - model(ids).logits).abs().max() > 0.1
    for layer in model.layers:
        layer.attention.dropout = 0.0
    torch.testing.assert_close(model(ids).logits, plain(ids).logits, **CLOSE)


def test_attention_weights_of_a_packed_row_are_dropped_too():
    model = network(dropout=0.5).train()
    for part in (model, *model.layers):
        part.dropout.p = 0.0
    ids, position_ids = random_ids(2, 9), torch.arange(9).remainder(5)[None]
    first, second = (model(ids, position_ids=position_ids).logits for _ in range(2))
    assert (first - second).abs().max() > 0.1


# experts are not compiled: dense blocks are left to the real compiler
@pytest.mark.parametrize(("kind", "backend"), [("dense", "inductor"), ("moe", "aot_eager")])
def test_compiled_blocks_give_the_same_loss_and_gradients(kind, backend):
    if backend == "inductor" and not (os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")):
        backend = "aot_eager"
    torch.compiler.reset()
    ids = random_ids(2, 16)
    arguments = {"attention_mask": torch.ones_like(ids), "position_ids": torch.arange(16).remainder(7)[None]}
    eager = network(**KINDS[kind], n_layers=1).train()
    compiled = copy.deepcopy(eager)
    for block in compiled.layers:
        block.compile(backend=backend)
    losses = [model(ids, **arguments, labels=ids).loss for model in (eager, compiled)]
    torch.testing.assert_close(*losses)
    for loss in losses:
        loss.backward()
    with torch.compiler.set_stance("fail_on_recompile"):  # samples of other lengths must not cause a recompilation
        compiled(ids, arguments["attention_mask"], torch.arange(16).remainder(5)[None], ids)
    assert eager.state_dict().keys() == compiled.state_dict().keys()
    assert_all_close(gradients(compiled), gradients(eager), **CLOSE)


@pytest.mark.parametrize("use_moe", KINDS.values(), ids=KINDS)
def test_a_deep_copy_is_a_model_of_its_own(use_moe):
    model = network(**use_moe)
    ids = random_ids(1, 5)
    before = model(ids).logits
    twin = copy.deepcopy(model)
    assert twin.output.weight is twin.tok_embeddings.weight
    torch.testing.assert_close(twin(ids).logits, before, rtol=0, atol=0)
    twin.load_state_dict(network(seed=1, **use_moe).state_dict())
    assert (twin(ids).logits - before).abs().max() > 0.1
    torch.testing.assert_close(model(ids).logits, before, rtol=0, atol=0)


def test_a_new_model_starts_near_the_uniform_guess_and_scales_down_what_adds_up():
    torch.manual_seed(0)
    model = MiniMindLM(LMConfig(dim=64, n_layers=8, n_heads=4, vocab_size=VOCAB, use_moe=True)).eval()
    ids = random_ids(4, 32)
    assert model(ids, labels=ids).loss.item() == pytest.approx(math.log(VOCAB), rel=0.05)
    std = {name: p.std().item() for name, p in model.named_parameters()}
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            assert (parameter == 1).all(), name
        else:
            residual = name.endswith(("wo.weight", "w2.weight"))
            assert std[name] == pytest.approx(0.02 / 4 if residual else 0.02, rel=0.2), name


def test_no_module_keeps_a_table_or_a_mask():
    model = network(use_moe=True)
    assert not list(model.buffers())
    assert model.state_dict().keys() - {"output.weight"} == dict(model.named_parameters()).keys()
    kinds = {type(module) for module in model.modules()}
    assert {Attention, FeedForward, MoEFeedForward, RMSNorm, nn.Embedding} <= kinds
