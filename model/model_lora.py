"""Low-rank adaptation, from scratch: learn a small correction to some matrices and leave the model itself alone.

LoRA (Hu et al. 2021, arXiv:2106.09685): in place of W0 x a layer computes

    h = W0 x + (alpha / r) B A x,    A (r, in) from N(0, 0.02), B (out, r) zero

with W0 frozen, so training starts at the base exactly and touches r (in + out) numbers a matrix. An adapter is those A
and B alone, under the names `layers.N.attention.wq.lora.A.weight`. Merged, it is the base's own matrices, changed.
"""

import contextlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.fingerprint import hash_weights


class LoRASettings(NamedTuple):
    """What an adapter is beside its numbers: its rank, the alpha of alpha / r, and the names of the layers it is in."""

    rank: int
    alpha: float
    targets: tuple[str, ...]


class LoRA(nn.Module):
    """The correction B A x."""

    def __init__(self, in_features: int, out_features: int, rank: int, **factory):
        super().__init__()
        self.A = nn.Linear(in_features, rank, bias=False, **factory)
        self.B = nn.Linear(rank, out_features, bias=False, **factory)
        nn.init.normal_(self.A.weight, std=0.02)
        nn.init.zeros_(self.B.weight)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out)."""
        return self.B(self.A(x))


class LoRALinear(nn.Linear):
    """A Linear with a correction beside it; takes the place of `base` and holds its very weight.

    `lora` is the correction, None once it is merged; then this is a plain Linear, by its state dict too.
    `active` False leaves the correction out.
    """

    def __init__(self, base: nn.Linear, rank: int, alpha: float):
        super().__init__(base.in_features, base.out_features, base.bias is not None, device="meta")
        self.weight, self.bias = base.weight, base.bias
        factory = {"device": base.weight.device, "dtype": base.weight.dtype}
        self.lora: LoRA | None = LoRA(base.in_features, base.out_features, rank, **factory)
        self.rank, self.alpha = rank, alpha
        self.active = True
        self._merged: tuple[LoRA] | None = None  # in a tuple, which hides it from state_dict and parameters

    def forward(self, x: Tensor) -> Tensor:
        h = F.linear(x, self.weight, self.bias)
        if self.lora is not None and self.active:
            h = h + self.alpha / self.rank * self.lora(x)
        return h

    def effective_weight(self) -> Tensor:
        """(out, in), the one matrix that does the same: the weight, with the correction where there is one."""
        return self.weight if self.lora is None or not self.active else self.weight + self._delta(self.lora)

    @torch.no_grad()
    def merge(self) -> None:
        """Add the correction to the weight."""
        self.weight += self._delta(self.lora)
        self._merged, self.lora = (self.lora,), None

    @torch.no_grad()
    def unmerge(self) -> None:
        """Take the correction out of the weight again."""
        (lora,), self._merged = self._merged, None
        self.lora = lora.to(self.weight.device, self.weight.dtype)
        self.weight -= self._delta(self.lora)

    def _delta(self, lora: LoRA) -> Tensor:
        """(alpha / r) B A, (out, in), the product in fp32."""
        product = lora.B.weight.float() @ lora.A.weight.float()
        return (self.alpha / self.rank * product).to(self.weight.dtype)

    def plain(self) -> nn.Linear:
        """A Linear with this weight, without the correction."""
        base = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        base.weight, base.bias = self.weight, self.bias
        return base


# ------------------------------------------------------------------------------------------------- put on, take off


def apply_lora(
    model: nn.Module, rank: int = 16, alpha: float | None = None, targets: Iterable[str] | None = None
) -> LoRASettings:
    """Give layers of the model's blocks a correction, and freeze everything else.

    A is drawn from torch's global generator: ranks that share a seed begin alike.

    Args:
        alpha: None = rank, that is a factor of 1.
        targets: names of Linears (`wq, wk, wv, wo, w1, w2, w3`), every expert's included; None = each square one,
            as in MiniMind2, which here is `wq` and `wo`.

    Raises:
        ValueError: no such Linear, a rank below 1, alpha not above 0, or the model has an adapter already.
    """
    settings = LoRASettings(rank, rank if alpha is None else alpha, tuple(targets or square_projections(model)))
    if rank < 1 or not settings.alpha > 0:
        raise ValueError(f"a LoRA has a rank from 1 on and an alpha above 0, not {rank} and {alpha}")
    if lora_layers(model):
        raise ValueError("the model has a LoRA adapter already: take it off with remove_lora first")
    linears = _linears(model, settings.targets)
    model.requires_grad_(False)
    for name, layer in linears.items():
        model.set_submodule(name, LoRALinear(layer, rank, settings.alpha))
    return settings


def square_projections(model: nn.Module) -> tuple[str, ...]:
    """Names of the Linears in the model's blocks that have as many outputs as inputs."""
    linears = _linears(model).items()
    return tuple(dict.fromkeys(_last(name) for name, layer in linears if layer.in_features == layer.out_features))


def _linears(model: nn.Module, targets: Iterable[str] | None = None) -> dict[str, nn.Linear]:
    """The Linears of the model's blocks by their full name, all or those whose last name is one of `targets`.

    Raises:
        ValueError: a target that no Linear has for a name.
    """
    modules = model.layers.named_modules(prefix="layers")
    linears = {name: layer for name, layer in modules if isinstance(layer, nn.Linear) and ".lora." not in name}
    names = dict.fromkeys(_last(name) for name in linears)
    unknown = [target for target in targets or () if target not in names]
    if unknown:
        raise ValueError(f"no Linear of the model's blocks is named {', '.join(unknown)}; there are {', '.join(names)}")
    return {name: layer for name, layer in linears.items() if targets is None or _last(name) in targets}


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """The layers that have a correction, merged or not, by name."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, LoRALinear)}


def remove_lora(model: nn.Module) -> None:
    """Put the plain Linears back, as they are: the base's weights, or the merged ones."""
    for name, layer in lora_layers(model).items():
        model.set_submodule(name, layer.plain())


@contextlib.contextmanager
def lora_off(model: nn.Module) -> Iterator[None]:
    """Inside, the model is its base, bit for bit.

    Raises:
        ValueError: the adapter is merged.
    """
    layers = _unmerged(model).values()
    try:
        for layer in layers:
            layer.active = False
        yield
    finally:
        for layer in layers:
            layer.active = True


def merge_lora(model: nn.Module) -> None:
    """Add the corrections to the weights: as fast as the base, and its state dict is an ordinary one.

    Raises:
        ValueError: no adapter, or it is merged already.
    """
    for layer in _unmerged(model).values():
        layer.merge()


def unmerge_lora(model: nn.Module) -> None:
    """The inverse of `merge_lora`, up to rounding.

    Raises:
        ValueError: the adapter is not merged.
    """
    layers = lora_layers(model).values()
    if not layers or any(layer.lora is not None for layer in layers):
        raise ValueError("there is no merged LoRA adapter to take out of the weights")
    for layer in layers:
        layer.unmerge()


def _unmerged(model: nn.Module) -> dict[str, LoRALinear]:
    layers = lora_layers(model)
    if not layers:
        raise ValueError("the model has no LoRA adapter: apply_lora or load_lora gives it one")
    if any(layer.lora is None for layer in layers.values()):
        raise ValueError("the LoRA adapter is merged into the weights: unmerge_lora first")
    return layers


# ------------------------------------------------------------------------------------------------------- as a file


def is_lora(key: str) -> bool:
    """Whether a state dict's key belongs to an adapter."""
    return key.endswith((".lora.A.weight", ".lora.B.weight"))


def lora_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The adapter alone: `layers.N.….lora.A.weight` (r, in) and `.B.weight` (out, r).

    Raises:
        ValueError: no adapter, or it is merged.
    """
    _unmerged(model)
    return {key: value for key, value in model.state_dict().items() if is_lora(key)}


def lora_settings(model: nn.Module) -> LoRASettings:
    """What the model's adapter was made with.

    Raises:
        ValueError: it has none.
    """
    layers = lora_layers(model)
    if not layers:
        raise ValueError("the model has no LoRA adapter")
    first = next(iter(layers.values()))
    return LoRASettings(first.rank, first.alpha, tuple(dict.fromkeys(map(_last, layers))))


def base_hash(model: nn.Module) -> str:
    """The fingerprint of the weights under an adapter, if there is one.

    Raises:
        ValueError: the adapter is merged into them.
    """
    if lora_layers(model):
        _unmerged(model)
    return hash_weights({key: value for key, value in model.state_dict().items() if not is_lora(key)})


def save_lora(model: nn.Module, path: str | Path, **facts) -> None:
    """Write the adapter, and a json beside it with `rank, alpha, targets, base_hash` and what else `facts` says.

    Raises:
        ValueError: no adapter, or it is merged.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({key: value.float().cpu() for key, value in lora_state_dict(model).items()}, path)
    about = lora_settings(model)._asdict() | {"base_hash": base_hash(model)} | facts
    path.with_suffix(".json").write_text(json.dumps(about, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def load_lora(model: nn.Module, path: str | Path) -> LoRASettings:
    """Give the model the adapter in a file, with the alpha that the json beside it names; see `attach_lora`."""
    path = Path(path)
    beside = path.with_suffix(".json")
    about = json.loads(beside.read_text(encoding="utf-8")) if beside.is_file() else {}
    return attach_lora(model, torch.load(path, map_location="cpu", weights_only=True), about)


@torch.no_grad()
def attach_lora(model: nn.Module, state: Mapping[str, Tensor], about: Mapping) -> LoRASettings:
    """Give the model an adapter, or fill the one that `apply_lora` gave it; rank and targets are those of the tensors.

    A refused adapter leaves the model as it was.

    Args:
        state: an adapter's state dict.
        about: what its json says, where there is one: `alpha` (else the rank), and the `base` it was trained on, whose
            `base_hash` must be this model's.

    Raises:
        ValueError: no adapter, or one for another base, rank or targets; the message names both sides.
    """
    strange = [key for key, value in state.items() if not is_lora(key) or value.dim() != 2]
    if strange or not state:
        raise ValueError(f"this is no LoRA adapter: it has {strange[0] if strange else 'nothing'}")
    key, first = next(iter(state.items()))
    rank = first.size(0) if key.endswith("A.weight") else first.size(1)
    linears = _linears(model, sorted({_last(key.rpartition(".lora.")[0]) for key in state}))
    found = LoRASettings(rank, about.get("alpha", rank), tuple(dict.fromkeys(map(_last, linears))))

    has = {key: tuple(value.shape) for key, value in state.items()}
    fits = {}
    for name, layer in linears.items():
        fits[f"{name}.lora.A.weight"] = (rank, layer.in_features)
        fits[f"{name}.lora.B.weight"] = (layer.out_features, rank)
    for key in sorted(has.keys() | fits.keys()):
        if has.get(key) != fits.get(key):
            raise ValueError(
                f"the adapter is for another base: its {key} is {has.get(key, 'absent')}, "
                f"and this model takes {fits.get(key, 'none')}"
            )
    if "base_hash" in about and about["base_hash"] != (actual := base_hash(model)):
        raise ValueError(
            f"the adapter was trained on {about.get('base', 'a base')} with weights {about['base_hash']}, "
            f"and this model's are {actual}: load that base"
        )
    if not lora_layers(model):
        apply_lora(model, *found)
    elif (made := lora_settings(model)) != found:
        raise ValueError(f"the adapter has {_words(found)}, but the model was prepared for {_words(made)}")
    for name, layer in _unmerged(model).items():
        for side in ("A", "B"):
            getattr(layer.lora, side).weight.copy_(state[f"{name}.lora.{side}.weight"])
    return found


def _words(settings: LoRASettings) -> str:
    return f"rank {settings.rank}, alpha {settings.alpha} on {', '.join(settings.targets)}"
