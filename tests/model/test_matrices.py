"""model/inference/matrices.py and compiled_step.py: every kernel multiplies by the weights that it represents."""

import copy
import shutil

import pytest
import torch

from model.inference import matrices
from model.inference.decoder import Decoder, Span
from model.inference.matrices import ROW_CLASSES, Embedding, Kernels, Matrix, candidates, fastest_kernels, fixed_kernels
from model.quantization import quantize_weights, round_trip
from tests.model.networks import network, random_ids

CPU = torch.device("cpu")
PRECISIONS = (torch.float32, torch.bfloat16, "int8", "int4")
EVERY = [(precision, kernel) for precision in PRECISIONS for kernel in candidates(precision, CPU)]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, "int8": 1e-2, "int4": 1e-2}


def weight_and_input(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows)
    return torch.randn(48, 64, generator=generator), torch.randn(rows, 64, generator=generator)


def meant(weight: torch.Tensor, precision) -> torch.Tensor:
    """The weights that a precision represents."""
    return round_trip(weight, {"int8": 8, "int4": 4}[precision]) if isinstance(precision, str) else weight


@pytest.mark.parametrize("rows", [1, 2, 16, 17, 33])
@pytest.mark.parametrize(("precision", "kernel"), EVERY, ids=[f"{p} {k.name}" for p, k in EVERY])
def test_a_kernel_multiplies_by_the_weights(precision, kernel, rows):
    weight, x = weight_and_input(rows)
    out = kernel.multiply(x, *kernel.keep(weight)).float()
    right = x @ meant(weight, precision).T
    assert out.shape == (rows, 48)
    assert (out - right).norm() < TOLERANCE[precision] * right.norm()


def test_each_class_of_rows_has_its_kernel():
    names = ("one", "few", "many")
    kernels = Kernels(tuple(candidates(torch.float32, CPU)[-1]._replace(name=name) for name in names))
    assert [kernels.for_rows(rows).name for rows in (1, 2, 16, 17, 256, 257, 9999)] == [
        *("one", "few", "few", "many", "many", "many", "many")
    ]


def test_the_fastest_is_chosen_for_each_number_of_rows(monkeypatch):
    """With a clock that the kernels advance: one is slow with one row, the other with many."""
    now = [0.0]
    plain = candidates(torch.float32, CPU)[-1]

    def costs(one: float, more: float):
        def multiply(x, weight):
            now[0] += one if len(x) == 1 else more
            return x @ weight.T

        return multiply

    first, second = (
        plain._replace(name="first", multiply=costs(1, 3)),
        plain._replace(name="second", multiply=costs(2, 2)),
    )
    monkeypatch.setattr(matrices, "candidates", lambda precision, device: [first, second])
    monkeypatch.setattr(matrices.time, "perf_counter", lambda: now[0])
    chosen = fastest_kernels(torch.float32, CPU, [(8, 4), (4, 8)])
    assert [kernel.name for kernel in chosen.by_class] == ["first", "second", "second"]
    assert {kernel.name for kernel in fixed_kernels(torch.float32, CPU).by_class} == {"first"}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_matrix_takes_other_values_in_place(precision):
    old, x = weight_and_input(3)
    new = old.flip(0) * 2
    kernels = Kernels((candidates(precision, CPU)[0], *[candidates(precision, CPU)[-1]] * (len(ROW_CLASSES) - 1)))
    matrix, embedding = Matrix(old, kernels), Embedding(old, precision)
    kept = [part for parts in matrix.kept.values() for part in parts]
    matrix.copy_(new)
    embedding.copy_(new)
    assert all(a is b for a, b in zip(kept, [p for parts in matrix.kept.values() for p in parts], strict=True))
    for rows in (1, 3):  # by both kernels
        right = x[:rows] @ meant(new, precision).T
        assert (matrix(x[:rows]).float() - right).norm() < TOLERANCE[precision] * right.norm()
    by_row = meant(new, "int8" if precision == "int4" else precision)[[5, 0]]
    torch.testing.assert_close(embedding(torch.tensor([5, 0])), by_row, atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("kind", [{}, {"use_moe": True}], ids=["dense", "moe"])
@pytest.mark.parametrize(("precision", "bits"), [("int8", 8), ("int4", 4)])
def test_the_engine_in_few_bits_is_the_model_with_rounded_weights(kind, precision, bits):
    model, ids = network(**kind), random_ids(1, 30)
    rounded = copy.deepcopy(model)
    quantize_weights(rounded, bits)
    with torch.no_grad():
        right, exact = rounded(ids).logits[0], model(ids).logits[0]
    for fixed in (True, False):
        decoder = Decoder(model, 1, 64, precision, deterministic=fixed)
        out = decoder.logits(decoder.read([Span(0, 0, ids[0].tolist())]))
        assert (out - right).norm() < 0.25 * (exact - right).norm() + 0.01 * right.norm()


def test_int4_refuses_a_model_that_it_cannot_divide():
    with pytest.raises(ValueError, match="multiples of 32 weights"):
        Decoder(network(dim=40, n_heads=2), 1, 16, "int4")


# ------------------------------------------------------------------------------------------------ the compiled step

has_compiler = pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler here")


@has_compiler
@pytest.mark.parametrize("precision", [torch.float32, "int4"])
def test_a_compiled_step_predicts_as_the_eager_pass(precision, monkeypatch):
    """At several lengths, in any slot, and after a refresh, without compiling again."""
    times = iter([1.0, 2.0])  # faster than the eager pass
    monkeypatch.setattr("model.inference.decoder.best_time", lambda run: next(times))
    model, other = network(seed=1), network(seed=2)
    ids = random_ids(1, 40)[0].tolist()
    compiled = Decoder(model, 3, 64, precision, compile=True)
    assert compiled.compiled
    eager = Decoder(model, 3, 64, precision)
    tolerance = {"atol": 1e-4, "rtol": 1e-4} if precision == torch.float32 else {"atol": 0.05, "rtol": 0.05}
    for slot, network_now in ((0, model), (2, model), (1, other)):
        if network_now is other:
            compiled.refresh(other)
            eager.refresh(other)
        for decoder in (compiled, eager):
            decoder.read([Span(slot, 0, ids[:5])])
        for place in range(5, 40):
            span = [Span(slot, place, [ids[place]])]
            torch.testing.assert_close(compiled.predict(span, [0]), eager.predict(span, [0]), **tolerance)


def test_without_a_compiler_the_eager_pass_is_used(monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch, "compile", broken)
    assert not Decoder(network(), 1, 64, compile=True).compiled


def test_a_step_that_is_not_faster_is_not_used(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda step, **_: step)
    times = iter([2.0, 1.0])
    monkeypatch.setattr("model.inference.decoder.best_time", lambda run: next(times))
    assert not Decoder(network(), 1, 64, compile=True).compiled


@pytest.mark.parametrize("kind", [{"use_moe": True}], ids=["moe"])
def test_a_mixture_of_experts_has_no_compiled_step(kind):
    assert not Decoder(network(**kind), 1, 64, compile=True).compiled
