"""trainer/chunked.py: a loss in chunks, with the gradient of the whole."""

import pytest
import torch
import torch.nn.functional as F

from trainer.chunked import sum_in_chunks, sum_over_rows


@pytest.mark.parametrize("sizes", [[1, 1, 1, 1, 1], [2, 0, 3], [5], [0, 5, 0]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_value_and_gradient_are_those_of_the_whole(sizes, dtype):
    torch.manual_seed(0)
    weights = torch.randn(5, 7).split(sizes)
    seen = {}

    def loss_of(part, number):
        seen[number] = len(part)
        return (part.float().softmax(-1) * weights[number]).sum()

    x = torch.randn(5, 7)
    whole, parts = (x.clone().requires_grad_() for _ in range(2))
    expected = (whole.to(dtype).float().softmax(-1) * torch.cat(weights)).sum()
    (expected * 3).backward()
    total = sum_in_chunks(loss_of, parts.to(dtype), sizes)
    (total * 3).backward()
    assert total.dtype == torch.float32
    assert total.item() == pytest.approx(expected.item(), abs=1e-5)
    torch.testing.assert_close(parts.grad, whole.grad, rtol=0, atol=1e-6 if dtype == torch.float32 else 2e-2)
    assert seen == {number: size for number, size in enumerate(sizes) if size}


def test_sizes_must_fit():
    with pytest.raises(ValueError, match="parts of 4 tokens for 5"):
        sum_in_chunks(lambda part, number: part.sum(), torch.zeros(5, 2), [2, 2])


def test_a_loss_of_a_few_rows_at_a_time_is_the_loss_of_all_rows(monkeypatch):
    """Compared with torch's kl_div over all target tokens at once."""
    monkeypatch.setattr("trainer.chunked.TOKENS_AT_ONCE", 20)
    torch.manual_seed(0)
    ids = torch.randint(0, 64, (5, 9))
    labels = torch.where(torch.rand(5, 9) < 0.6, ids, -100)
    labels[4] = -100  # a row of padding, which is left out
    mask = labels[:, 1:] != -100
    batch = {"taught": torch.randn(5, 9, 64), "input_ids": ids}
    student = torch.randn(int(mask.sum()), 64, requires_grad=True)
    asked = []

    def loss(student, taught, targets):
        kl = F.kl_div(F.log_softmax(student, -1), F.softmax(taught, -1), reduction="sum")
        return kl + F.cross_entropy(student, targets, reduction="sum")

    def loss_of(logits, batch, labels):
        asked.append(len(logits))
        mask = labels[:, 1:] != -100
        return loss(logits, batch["taught"][:, :-1][mask], batch["input_ids"][:, 1:][mask])

    total = sum_over_rows(loss_of, student, batch, labels)
    (gradient,) = torch.autograd.grad(total, student)
    assert asked == [int(mask[:2].sum()), int(mask[2:4].sum())]
    expected = loss(student, batch["taught"][:, :-1][mask], ids[:, 1:][mask])
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, student)[0])
