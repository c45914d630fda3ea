"""trainer/chunked.py: a sum in parts, with the gradient of the whole."""

import pytest
import torch

from trainer.chunked import sum_in_chunks


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
