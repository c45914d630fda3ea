"""A LoRA adapter as a peft folder, and back.

A peft folder has one of two forms. For a MiniMind folder from `save_pretrained`, the layers keep their names. For the
Llama or Qwen2-MoE of `convert_model.py to-transformers`, they have that architecture's names, and the conversion of a
matrix W is applied to B, whose rows are those of W's update B A. Both conversions are exact. A MiniMind-3's layers have
the same names everywhere.
"""

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from model import LMConfig
from model.model_lora import LoRASettings
from model.weight_layouts import OUR_NAME, THEIR_NAME, half_split, interleaved
from trainer.errors import UserError

WEIGHTS, SETTINGS = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."


def to_peft_state(adapter: Mapping[str, Tensor], config: LMConfig, as_llama: bool) -> dict[str, Tensor]:
    """An adapter's state dict under peft's names.

    Raises:
        UserError: `as_llama` with an adapter on a routed expert: transformers keeps all experts in one tensor.
    """
    if as_llama and config.variant:
        raise UserError(f"a Llama has no {config.variant}: use --layout minimind")
    state = {}
    for key, value in adapter.items():
        layer, _, side = key.removesuffix(".weight").rpartition(".lora.")
        if as_llama:
            if ".experts." in layer:
                raise UserError(
                    f"{layer}: a Qwen2-MoE keeps all experts in one tensor, which peft cannot adapt; "
                    "--layout minimind keeps them apart"
                )
            if config.generation == 2:
                if side == "B":
                    value = _as_theirs(layer, value, config)
                layer = "model." + ".".join(THEIR_NAME.get(part, part) for part in layer.split("."))
        state[f"{PREFIX}{layer}.lora_{side}.weight"] = value.contiguous()
    return state


def to_our_state(state: Mapping[str, Tensor], config: LMConfig) -> dict[str, Tensor]:
    """The inverse of `to_peft_state`, fp32, for either form.

    Raises:
        UserError: a tensor that is not part of a plain LoRA on a MiniMind's layers.
    """
    adapter = {}
    for key, value in state.items():
        layer, _, side = key.removeprefix(PREFIX).removesuffix(".weight").rpartition(".lora_")
        if side not in ("A", "B"):
            raise UserError(f"{key} is not an A or B of a plain LoRA, and a MiniMind adapter has nothing else")
        value = value.float()
        if layer.startswith("model.") and config.generation == 2:
            layer = ".".join(OUR_NAME.get(part, part) for part in layer.removeprefix("model.").split("."))
            if side == "B":
                value = _as_ours(layer, value, config)
        adapter[f"{layer}.lora.{side}.weight"] = value.contiguous()
    return adapter


def _as_theirs(layer: str, b: Tensor, config: LMConfig) -> Tensor:
    """B of one of our layers, (out, r), for the layer of the other architecture: see transformers_folder.py."""
    if layer.endswith((".wq", ".wk")):
        return half_split(b, config.n_heads if layer.endswith(".wq") else config.n_kv_heads)
    return 2 * b if layer.endswith(".shared_experts.w2") else b


def _as_ours(layer: str, b: Tensor, config: LMConfig) -> Tensor:
    if layer.endswith((".wq", ".wk")):
        return interleaved(b, config.n_heads if layer.endswith(".wq") else config.n_kv_heads)
    return b / 2 if layer.endswith(".shared_experts.w2") else b


def write_folder(
    adapter: Mapping[str, Tensor], settings: LoRASettings, config: LMConfig, as_llama: bool, base: str, folder: Path
) -> None:
    """Write a folder that `PeftModel.from_pretrained` loads."""
    from peft import LoraConfig

    state = to_peft_state(adapter, config, as_llama)
    targets = [THEIR_NAME.get(name, name) for name in settings.targets] if as_llama else list(settings.targets)
    about = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        target_modules=targets,
        lora_dropout=0.0,
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
        inference_mode=True,
    )
    folder.mkdir(parents=True, exist_ok=True)
    about.save_pretrained(str(folder))
    (folder / WEIGHTS).write_bytes(save(state, metadata={"format": "pt"}))


def read_folder(folder: Path, config: LMConfig) -> tuple[dict[str, Tensor], dict]:
    """The adapter in a peft folder, and its settings (alpha).

    Raises:
        UserError: the folder does not exist, is damaged, or has a kind of adapter that MiniMind lacks.
    """
    if not (folder / SETTINGS).is_file() or not (folder / WEIGHTS).is_file():
        raise UserError(f"{folder} holds no {SETTINGS} and {WEIGHTS}: it is not an adapter that peft saved")
    try:
        about = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
        state = load_file(folder / WEIGHTS)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{folder} cannot be read: {' '.join(str(error).split())[:200]}") from None
    if not isinstance(about, dict):
        raise UserError(f"{folder / SETTINGS} is not a JSON object: it is damaged")
    if about.get("peft_type") != "LORA":
        raise UserError(f"{folder} is a {about.get('peft_type')} adapter, but MiniMind needs LORA")
    for name in ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "fan_in_fan_out"):
        if about.get(name):
            raise UserError(f"{folder} was made with {name}, which MiniMind adapters do not support")
    alpha = about.get("lora_alpha")
    if not isinstance(alpha, int | float) or not alpha > 0:
        raise UserError(f"{folder / SETTINGS}: its lora_alpha is {alpha!r}, not a number above 0")
    return to_our_state(state, config), {"alpha": alpha}
