"""Low-rank adaptation, from scratch: train a small update to some matrices and keep the model itself frozen.

LoRA (Hu et al. 2021, arXiv:2106.09685): in place of W0 x a layer computes

    h = W0 x + (alpha / r) B A x,    A (r, in) from N(0, 0.02), B (out, r) zero

with W0 frozen, so training starts exactly at the base and updates r (in + out) parameters per matrix. An adapter is
only those A and B, under the names `layers.N.attention.wq.lora.A.weight`. Merging adds it to the base's matrices.
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
    """An adapter's hyperparameters: its rank, the alpha of alpha / r, and the names of the layers it adapts."""

    rank: int
    alpha: float
    targets: tuple[str, ...]


class LoRA(nn.Module):
    """The update B A x."""

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
    """A Linear with a LoRA update; replaces `base` and shares its weight.

    `lora` is the update, None once merged; then this is a plain Linear, in its state dict too.
    `active` False leaves the update out.
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
        """(out, in), the equivalent single matrix: the weight plus the update, if there is one."""
        return self.weight if self.lora is None or not self.active else self.weight + self._delta(self.lora)

    @torch.no_grad()
    def merge(self) -> None:
        """Add the update to the weight."""
        self.weight += self._delta(self.lora)
        self._merged, self.lora = (self.lora,), None

    @torch.no_grad()
    def unmerge(self) -> None:
        """Subtract the update from the weight again."""
        (lora,), self._merged = self._merged, None
        self.lora = lora.to(self.weight.device, self.weight.dtype)
        self.weight -= self._delta(self.lora)

    def _delta(self, lora: LoRA) -> Tensor:
        """(alpha / r) B A, (out, in), the product in fp32."""
        product = lora.B.weight.float() @ lora.A.weight.float()
        return (self.alpha / self.rank * product).to(self.weight.dtype)

    def plain(self) -> nn.Linear:
        """A Linear with this weight, without the update."""
        base = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        base.weight, base.bias = self.weight, self.bias
        return base


# ------------------------------------------------------------------------------------------------- put on, take off


def apply_lora(
    model: nn.Module, rank: int = 16, alpha: float | None = None, targets: Iterable[str] | None = None
) -> LoRASettings:
    """Add LoRA to Linears of the model's blocks, and freeze everything else.

    A is drawn from torch's global generator: ranks with the same seed start out equal.

    Args:
        alpha: None = rank, i.e. a factor of 1.
        targets: names of Linears (`wq, wk, wv, wo, w1, w2, w3`, in a MiniMind-3 `q_proj, …, down_proj`), including
            every expert's; None = all square ones, as in MiniMind2: here `wq` and `wo`.

    Raises:
        ValueError: no such Linear, a rank below 1, alpha not above 0, or the model already has an adapter.
    """
    settings = LoRASettings(rank, rank if alpha is None else alpha, tuple(targets or square_projections(model)))
    if rank < 1 or not settings.alpha > 0:
        raise ValueError(f"a LoRA needs a rank of at least 1 and an alpha above 0, not {rank} and {alpha}")
    if lora_layers(model):
        raise ValueError("the model already has a LoRA adapter: remove it with remove_lora first")
    linears = block_linears(model, settings.targets)
    model.requires_grad_(False)
    for name, layer in linears.items():
        model.set_submodule(name, LoRALinear(layer, rank, settings.alpha))
    return settings


def square_projections(model: nn.Module) -> tuple[str, ...]:
    """Names of the square Linears in the model's blocks."""
    linears = block_linears(model).items()
    return tuple(dict.fromkeys(_last(name) for name, layer in linears if layer.in_features == layer.out_features))


def block_linears(model: nn.Module, targets: Iterable[str] | None = None) -> dict[str, nn.Linear]:
    """The Linears of the model's blocks by their full name, all or those whose last name is one of `targets`.

    Raises:
        ValueError: a target that is not the name of a Linear.
    """
    prefix = next(name for name, module in model.named_modules() if module is model.layers)  # by the generation
    modules = model.layers.named_modules(prefix=prefix)
    linears = {name: layer for name, layer in modules if isinstance(layer, nn.Linear) and ".lora." not in name}
    names = dict.fromkeys(_last(name) for name in linears)
    unknown = [target for target in targets or () if target not in names]
    if unknown:
        raise ValueError(f"no Linear of the model's blocks is named {', '.join(unknown)}; use {', '.join(names)}")
    return {name: layer for name, layer in linears.items() if targets is None or _last(name) in targets}


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """The layers with LoRA, merged or not, by name."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, LoRALinear)}


def remove_lora(model: nn.Module) -> None:
    """Restore plain Linears with their current weights: the base's, or the merged ones."""
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
    """Add the updates to the weights: as fast as the base, with an ordinary state dict.

    Raises:
        ValueError: no adapter, or it is already merged.
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
        raise ValueError("the model has no merged LoRA adapter to unmerge")
    for layer in layers:
        layer.unmerge()


def _unmerged(model: nn.Module) -> dict[str, LoRALinear]:
    layers = lora_layers(model)
    if not layers:
        raise ValueError("the model has no LoRA adapter: add one with apply_lora or load_lora")
    if any(layer.lora is None for layer in layers.values()):
        raise ValueError("the LoRA adapter is merged into the weights: call unmerge_lora first")
    return layers


# ------------------------------------------------------------------------------------------------------- as a file


def is_lora(key: str) -> bool:
    """Whether a state dict's key belongs to an adapter."""
    return key.endswith((".lora.A.weight", ".lora.B.weight"))


def lora_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The adapter's weights only: `layers.N.….lora.A.weight` (r, in) and `.B.weight` (out, r).

    Raises:
        ValueError: no adapter, or it is merged.
    """
    _unmerged(model)
    return {key: value for key, value in model.state_dict().items() if is_lora(key)}


def lora_settings(model: nn.Module) -> LoRASettings:
    """The hyperparameters of the model's adapter.

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
    """Save the adapter, and a json beside it with `rank, alpha, targets, base_hash` and further `facts`.

    Raises:
        ValueError: no adapter, or it is merged.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({key: value.float().cpu() for key, value in lora_state_dict(model).items()}, path)
    about = lora_settings(model)._asdict() | {"base_hash": base_hash(model)} | facts
    path.with_suffix(".json").write_text(json.dumps(about, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def load_lora(model: nn.Module, path: str | Path) -> LoRASettings:
    """Load an adapter file into the model, with the alpha from the json beside it; see `attach_lora`."""
    path = Path(path)
    beside = path.with_suffix(".json")
    about = json.loads(beside.read_text(encoding="utf-8")) if beside.is_file() else {}
    return attach_lora(model, torch.load(path, map_location="cpu", weights_only=True), about)


@torch.no_grad()
def attach_lora(model: nn.Module, state: Mapping[str, Tensor], about: Mapping) -> LoRASettings:
    """Add an adapter to the model, or load it into the one from `apply_lora`; the tensors determine rank and targets.

    A rejected adapter leaves the model unchanged.

    Args:
        state: an adapter's state dict.
        about: the content of its json, if any: `alpha` (default: the rank), and the `base` it was trained on, whose
            `base_hash` must be this model's.

    Raises:
        ValueError: not an adapter, or one for another base, rank or targets; the message names both sides.
    """
    strange = [key for key, value in state.items() if not is_lora(key) or value.dim() != 2]
    if strange or not state:
        raise ValueError(f"this is not a LoRA adapter: it has {strange[0] if strange else 'no tensors'}")
    key, first = next(iter(state.items()))
    rank = first.size(0) if key.endswith("A.weight") else first.size(1)
    linears = block_linears(model, sorted({_last(key.rpartition(".lora.")[0]) for key in state}))
    found = LoRASettings(rank, about.get("alpha", rank), tuple(dict.fromkeys(map(_last, linears))))

    has = {key: tuple(value.shape) for key, value in state.items()}
    fits = {}
    for name, layer in linears.items():
        fits[f"{name}.lora.A.weight"] = (rank, layer.in_features)
        fits[f"{name}.lora.B.weight"] = (layer.out_features, rank)
    for key in sorted(has.keys() | fits.keys()):
        if has.get(key) != fits.get(key):
            raise ValueError(
                f"the adapter is for another base: its {key} is {has.get(key, 'missing')}, "
                f"but this model takes {fits.get(key, 'none')}"
            )
    if "base_hash" in about and about["base_hash"] != (actual := base_hash(model)):
        raise ValueError(
            f"the adapter was trained on {about.get('base', 'a base')} with weights {about['base_hash']}, "
            f"but this model's are {actual}: load that base"
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
