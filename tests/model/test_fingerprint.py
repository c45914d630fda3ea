"""model/fingerprint.py: equal for equal names and numbers, and only then."""

import torch

from model.fingerprint import hash_weights

STATE = {"a": torch.tensor([1.0, 2.0, 3.0, 4.0]), "b": torch.tensor([5.0])}


def test_the_same_names_and_numbers_in_whatever_order_type_and_layout():
    expected = hash_weights(STATE)
    assert len(expected) == 16
    assert int(expected, 16) >= 0
    assert hash_weights(dict(reversed(STATE.items()))) == expected
    assert hash_weights({name: value.bfloat16() for name, value in STATE.items()}) == expected
    apart = torch.stack([STATE["a"], STATE["a"]], 1)[:, 0].requires_grad_()
    assert not apart.is_contiguous()
    assert hash_weights(STATE | {"a": apart}) == expected


def test_another_name_or_number_is_told_apart():
    a, b = STATE.values()
    others = (
        *({"b": a, "a": b}, {"a": a, "c": b}, {"a": a}, {"a": torch.cat([a, b])}),
        *(STATE | {"b": -b}, STATE | {"b": torch.nextafter(b, 2 * b)}, STATE | {"c": b[:0]}),
    )
    assert len({hash_weights(state) for state in (STATE, *others)}) == 1 + len(others)
