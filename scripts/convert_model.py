"""Convert a model: to and from `transformers`, to GGUF for llama.cpp and Ollama, an adapter merged into its base.

python scripts/convert_model.py to-transformers out/full_sft_512.pth FOLDER [--lora out/lora/NAME_512.pth]
python scripts/convert_model.py from-transformers FOLDER out/mine_512.pth
python scripts/convert_model.py to-gguf out/full_sft_512.pth minimind.gguf --dtype q8_0
python scripts/convert_model.py merge-lora out/full_sft_512.pth out/lora/NAME_512.pth out/merged_512.pth
python scripts/convert_model.py to-peft out/full_sft_512.pth out/lora/NAME_512.pth FOLDER [--layout minimind]
python scripts/convert_model.py from-peft FOLDER out/full_sft_512.pth out/lora/mine_512.pth

Sizes come from the json beside the weights; for a downloaded .pth, which has none, from its tensors and the flags.
"""

import argparse
import shutil
from pathlib import Path

import _repo  # noqa: F401  (lets `python scripts/convert_model.py` find the packages)

from trainer.argument_types import BooleanFlag, positive_float, positive_int
from trainer.arguments import Parser
from trainer.errors import UserError, run_main

DTYPES = ("f32", "f16", "bf16", "q8_0", "q4_0")
LAYOUTS = ("llama", "minimind")


def get_args():
    parser = Parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, about: str, *paths: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=about, description=about)
        for path in paths:
            sub.add_argument(path, type=Path, metavar=path.upper())
        sub.add_argument("--tokenizer", default=None, metavar="DIR", help="tokenizer folder (default: the model's own)")
        sub.add_argument("--overwrite", action=BooleanFlag, help="replace existing output")
        return sub

    def add_sizes(sub: argparse.ArgumentParser) -> None:
        group = sub.add_argument_group("sizes", "needed for a .pth without a json, unless its tensors imply it")
        for name in ("dim", "n_layers", "n_heads", "n_kv_heads", "num_experts_per_tok", "max_seq_len"):
            group.add_argument(f"--{name}", type=positive_int)
        group.add_argument("--use_moe", action=BooleanFlag, default=None)
        group.add_argument("--rope_theta", type=positive_float)
        group.add_argument("--inference_rope_scaling", action=BooleanFlag, default=None, help="MiniMind-3's YaRN")

    sub = command("to-transformers", "a folder that transformers loads as Llama or Qwen2-MoE", "weights", "folder")
    sub.add_argument("--lora", type=Path, metavar="ADAPTER", help="LoRA adapter to merge")
    add_sizes(sub)
    command("from-transformers", "a .pth from such a folder, also after further training", "folder", "out")
    sub = command("to-gguf", "a GGUF file for llama.cpp, and a Modelfile for Ollama", "weights", "out")
    sub.add_argument("--dtype", choices=DTYPES, default="f16", help="precision of the matrices (default: f16)")
    add_sizes(sub)
    add_sizes(command("merge-lora", "the .pth of base and adapter merged", "weights", "adapter", "out"))
    sub = command("to-peft", "a peft folder from an adapter", "weights", "adapter", "folder")
    sub.add_argument("--layout", choices=LAYOUTS, default="llama", help="layout, as in to-transformers, "
                     "or a MiniMind folder from save_pretrained (default: llama)")  # fmt: skip
    add_sizes(sub)
    add_sizes(command("from-peft", "a .pth from a peft adapter folder in either layout", "folder", "weights", "out"))
    return parser.parse_args()


def load(args, lora: Path | None = None):
    """The model and tokenizer that the command line names, with any adapter merged."""
    from trainer.loading import load_for_inference

    names = ("dim", "n_layers", "n_heads", "n_kv_heads", "num_experts_per_tok", "max_seq_len", "use_moe", "rope_theta")
    names = (*names, "inference_rope_scaling")
    sizes = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if lora is not None:
        check_adapter_name(lora)
    return load_for_inference(args.weights, args.tokenizer, lora, **sizes)


def check_adapter_name(adapter: Path) -> None:
    from trainer.weight_files import is_file_name

    if not is_file_name(adapter.name):
        raise UserError(f"{adapter}: an adapter is a .pth file, in out/lora/")


def save(model, tokenizer, out: Path, about: dict) -> None:
    """Save a .pth and the json beside it."""
    from model.tokenizer import tokenizer_hash
    from trainer.architecture import architecture, positions
    from trainer.files import save_json, save_tensors

    config = architecture(model.config) | positions(model.config)
    written = {"sha256": save_tensors({name: value.float() for name, value in model.state_dict().items()}, out)}
    save_json({"config": config, "tokenizer": tokenizer_hash(tokenizer)} | about | written, out.with_suffix(".json"))


def check_targets(args, suffix: str, beside: str) -> None:
    """Refuse to replace existing output, or to write a file under a misleading name."""
    if args.out.suffix != suffix:
        raise UserError(f"{args.out}: {args.command} writes a {suffix} file")
    for path in (args.out, args.out.with_suffix(beside)):
        if path.exists() and not args.overwrite:
            raise UserError(f"{path} already exists: choose another name, or use --overwrite")


def to_transformers(args) -> None:
    from scripts.formats.transformers_folder import check_equal, write_folder
    from trainer.files import real_place, require_utf8

    if args.folder.exists() and not args.folder.is_dir():
        raise UserError(f"{args.folder} is a file, but to-transformers writes a folder")
    if (args.folder / "config.json").exists() and not args.overwrite:
        raise UserError(f"{args.folder} already contains a model: choose another name, or use --overwrite")
    place = real_place(args.folder)  # where a link leads to: files are moved within a disk only
    require_utf8(place, "the folder")
    model, tokenizer = load(args, args.lora)
    new = place.with_name(f".{place.name}.new")
    try:
        write_folder(model, tokenizer, new)
        targets = {file: args.folder / file.name for file in new.iterdir()}
        if not args.overwrite and (there := [str(target) for target in targets.values() if target.exists()]):
            raise UserError(f"{', '.join(there)} already exists: choose another folder, or use --overwrite")
        difference = check_equal(model, new)
        args.folder.mkdir(parents=True, exist_ok=True)
        for file, target in targets.items():
            shutil.move(file, real_place(target))
    except OSError as error:
        raise UserError(f"cannot write {args.folder}: {error.strerror or error}") from None
    finally:
        shutil.rmtree(new, ignore_errors=True)
    print(f"{args.folder}: transformers loads it, its logits within {difference:.1e} of MiniMind's")
    print(f"vllm serve {args.folder} --max-model-len {min(model.config.max_seq_len, 8192)}")


def from_transformers(args) -> None:
    from scripts.formats.transformers_folder import check_equal
    from trainer.folder_layouts import require_folder
    from trainer.loading import load_for_inference

    check_targets(args, ".pth", ".json")
    model, tokenizer = load_for_inference(require_folder(args.folder), args.tokenizer)
    difference = check_equal(model, args.folder)
    save(model, tokenizer, args.out, {"stage": "converted", "data_path": str(args.folder)})
    size = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    print(f"{args.out}: {size:.1f} M parameters, logits within {difference:.1e} of transformers'")


def to_gguf(args) -> None:
    from scripts.formats.gguf_file import modelfile, write_gguf
    from trainer.files import replacing

    check_targets(args, ".gguf", ".Modelfile")
    beside = args.out.with_suffix(".Modelfile")
    model, tokenizer = load(args)
    with replacing(args.out) as temporary:
        write_gguf(model, tokenizer, temporary, args.dtype, args.out.stem)
    with replacing(beside) as temporary:
        temporary.write_text(modelfile(args.out, tokenizer, model.config.max_seq_len), encoding="utf-8")
    print(f"{args.out}: {args.out.stat().st_size / 1e6:.1f} MB, for llama.cpp")
    print(f"ollama create {args.out.stem} -f {beside}")


def merge_adapter(args) -> None:
    from trainer.weights import read_settings

    check_targets(args, ".pth", ".json")
    model, tokenizer = load(args, args.adapter)
    base = {k: v for k, v in (read_settings(args.weights) or {}).items() if k not in ("config", "tokenizer")}
    save(model, tokenizer, args.out, base | {"merged": str(args.adapter)})
    print(f"{args.out}: {args.weights} with {args.adapter} merged in")


def to_peft(args) -> None:
    from model.model_lora import lora_state_dict
    from scripts.formats.peft_folder import SETTINGS, write_folder
    from trainer.weights import load_adapter

    if (args.folder / SETTINGS).exists() and not args.overwrite:
        raise UserError(f"{args.folder} already contains an adapter: choose another name, or use --overwrite")
    check_adapter_name(args.adapter)
    model, _ = load(args)
    settings = load_adapter(args.adapter, model)
    as_llama = args.layout == "llama"
    write_folder(lora_state_dict(model), settings, model.config, as_llama, args.weights.name, args.folder)
    base = "to-transformers makes" if as_llama else "save_pretrained writes"
    print(f"{args.folder}: for peft, on the model that {base}")


def from_peft(args) -> None:
    from model.model_lora import attach_lora, base_hash, lora_state_dict
    from scripts.formats.peft_folder import read_folder
    from trainer.files import save_json, save_tensors

    check_targets(args, ".pth", ".json")
    model, _ = load(args)
    base = {"base": args.weights.name, "base_hash": base_hash(model)}
    state, about = read_folder(args.folder, model.config)
    try:
        settings = attach_lora(model, state, about)
    except ValueError as error:
        raise UserError(f"{args.folder}: {error}") from None
    written = {"data_path": str(args.folder), "sha256": save_tensors(lora_state_dict(model), args.out)}
    save_json(settings._asdict() | base | written, args.out.with_suffix(".json"))
    print(f"{args.out}: rank {settings.rank} on {', '.join(settings.targets)}, for {args.weights}")


def main():
    args = get_args()
    from transformers.utils import logging

    logging.disable_progress_bar()  # for a load of less than a second
    {
        "to-transformers": to_transformers,
        "from-transformers": from_transformers,
        "to-gguf": to_gguf,
        "merge-lora": merge_adapter,
        "to-peft": to_peft,
        "from-peft": from_peft,
    }[args.command](args)


if __name__ == "__main__":
    run_main(main)
