"""Reading a file of weights, whichever tool wrote it."""

import re
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file

from model.weight_layouts import Recognised, recognise
from trainer.errors import UserError
from trainer.files import load_tensors

SUFFIXES = (".pth", ".pt", ".bin", ".ckpt", ".safetensors")
WHOLE = ("model", "pytorch_model")  # transformers' names for the weights of a folder
NO_WEIGHTS = (  # by how a file begins
    (b"version https://git-lfs", "is a Git LFS pointer, not the file itself: run `git lfs pull`"),
    (b"GGUF", "is a GGUF for llama.cpp: use the .pth that it was converted from"),
    (b"<", "is a web page, not the file itself: download it again"),
)


def is_file_name(name: str) -> bool:
    """Whether the value of a WEIGHTS flag is a file name."""
    return name.endswith(SUFFIXES)


def read_content(path: Path) -> object:
    """The content of a file: tensors, and plain values around them. No code in it is executed.

    Raises:
        UserError: missing, damaged, or another kind of file; the message says what it looks like.
    """
    if not path.is_file():
        raise UserError(f"{path} is missing")
    with open(path, "rb") as file:
        begins = file.read(64)
    for mark, words in NO_WEIGHTS:
        if begins.startswith(mark):
            raise UserError(f"{path} {words}")
    if path.suffix != ".safetensors" and begins[8:10] != b'{"':  # a safetensors by another name begins like this
        return load_tensors(path)
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is truncated or not a safetensors file ({error})") from None


def read_weights(path: Path, n_heads: int = 8, n_kv_heads: int = 2, generation: int | None = None) -> Recognised:
    """The parameters in a file, fp32, under MiniMind's names; see `recognise`.

    Args:
        n_heads, n_kv_heads: of the model that they are for (default: MiniMind2's).
        generation: of that model, for an adapter; None: recognised by the content.

    Raises:
        UserError: as in `read_content`; or the file is not a MiniMind, or only a part of one.
    """
    if re.search(r"-\d{5}-of-\d{5}$", path.stem) or (path.stem in WHOLE and (path.parent / "config.json").is_file()):
        raise UserError(
            f"{path} belongs to a transformers folder, whose config.json has its sizes: name the folder, "
            f"{path.parent}, or convert it to a .pth with convert_model.py from-transformers {path.parent} out/NAME.pth"
        )
    try:
        return recognise(read_content(path), n_heads, n_kv_heads, generation)
    except ValueError as error:
        raise UserError(f"{path} {error}") from None
