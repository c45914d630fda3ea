"""The backends of a chat page, and running answers; nothing here depends on Streamlit.

Streamlit runs the page's script again at every click, so an answer is generated in its own thread, and each run of the
script shows its current state.
"""

import base64
import queue
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path

from scripts.serving.client import answer_parts, models_at, open_client

UNWATCHED = 20.0  # seconds after which an answer that no page shows is not worth writing on
AT_ONCE = 4  # answers that a model writes at the same time, each for another page


class Answer:
    """A model's answer to a question; generation begins at once.

    Attributes:
        thinking, text: the parts so far.
        raw: the model's own text, including tags, for the chat's history.
        error: the error that ended it, or None.
        stopped: whether the user stopped it.
        tokens, seconds: number of tokens and their time; a server does not report the number.
    """

    def __init__(self, parts: Iterator[tuple[str, str]]):
        self.thinking, self.text, self.raw = "", "", ""
        self.error: str | None = None
        self.stopped = False
        self.tokens, self.seconds = 0, 0.0
        self._watched = time.monotonic()
        self._ended = threading.Event()
        threading.Thread(target=self._write, args=(parts,), daemon=True).start()

    def _write(self, parts: Iterator[tuple[str, str]]) -> None:
        started = time.monotonic()
        try:
            for part, text in parts:
                if self._ended.is_set():
                    return
                if time.monotonic() - self._watched > UNWATCHED:
                    return self.stop()
                if part == "thinking":
                    self.thinking += text
                elif part == "answer":
                    self.text += text
                else:
                    self.raw += text
                    self.tokens += part == "token"
                self.seconds = time.monotonic() - started
        except Exception as error:  # whatever it is, the page must report it and continue
            self.error = getattr(error, "message", None) or str(error) or type(error).__name__
        finally:
            parts.close()
            self._ended.set()

    @property
    def ended(self) -> bool:
        return self._ended.is_set()

    def stop(self) -> None:
        """Stop generating, and keep the text so far."""
        if not self.ended:
            self.stopped = True
            self._ended.set()

    def watch(self, seconds: float) -> None:
        """Wait until it has ended, at most this long."""
        self._watched = time.monotonic()
        self._ended.wait(seconds)


class LocalModel:
    """A model in this process.

    Args:
        model, tokenizer: the loaded ones.
        processor: the image processor of its vision tower; None if it has none.
        pretrained: it only continues texts, and is prompted with only the question.
    """

    def __init__(self, model, tokenizer, processor=None, pretrained: bool = False):
        from model.inference.scheduler import Engine
        from model.inference.thread import EngineThread
        from model.template_chat import lays_out_thinking

        self.model, self.tokenizer, self.processor, self.pretrained = model, tokenizer, processor, pretrained
        self.opens_thoughts = not pretrained and processor is None and lays_out_thinking(tokenizer)
        self._thread = EngineThread(Engine(model, tokenizer, slots=AT_ONCE))
        weakref.finalize(self, self._thread.close)

    def parts(self, system: list[dict], turns: Sequence[dict], sampling: dict) -> Iterator[tuple[str, str]]:
        """Yield ("thinking" | "answer", text) to show, and ("token" | "raw", text) with the model's own text.

        Args:
            system: the system turn, or empty for the default one.
            turns: the chat so far, ending with a question; content is a string, or a list of images (their bytes) and
                strings.
            wishes: settings of an engine's `Request`; `open_thinking`: the answer begins with a thought.

        Raises:
            ValueError: the question does not fit, an image cannot be read, or a setting is out of range.
            RuntimeError: the engine failed.
        """
        from model.inference.request import Request
        from model.reasoning import THOUGHT_BEGUN, ReasoningStream

        sampling = dict(sampling)
        thinking = {"open_thinking": True} if sampling.pop("open_thinking", False) else {}
        room = self.model.config.max_seq_len - sampling["max_new_tokens"]
        ids, seen = self._prompt(system, list(turns), room, **thinking)
        pieces, reader = queue.SimpleQueue(), ReasoningStream()
        if thinking:
            reader.push(THOUGHT_BEGUN)
        answer = self._thread.submit(Request(prompt=ids, embeddings=seen, **sampling), pieces.put)
        try:
            ended = None
            while ended is None:
                _, _, ended = piece = pieces.get()
                yield "token", piece.text
                yield from reader.push(piece.text)
            yield from reader.flush()
        finally:
            self._thread.cancel(answer)
        if ended == "error":
            raise RuntimeError("the engine failed; see the terminal")

    def _prompt(self, system: list[dict], turns: list[dict], room: int, **thinking):
        """The prompt's ids, and its embeddings if it contains images, else None."""
        from model.chat import fit_history, render_text
        from model.images import prepare_chat, prompt_embeddings

        if self.processor is not None:
            prompt = prepare_chat(self.tokenizer, [*system, *turns], self.model.config, self.processor, room)
            return prompt.input_ids[0].tolist(), prompt_embeddings(self.model, prompt)
        if self.pretrained:
            return render_text(self.tokenizer, [turns[-1]["content"]])[0][:-1], None
        return fit_history(self.tokenizer, system, turns, room, **thinking)[0], None


class RemoteModel:
    """A model at an OpenAI-compatible server's address."""

    def __init__(self, client, name: str):
        self.client, self.name = client, name

    def parts(self, system: list[dict], turns: Sequence[dict], sampling: dict) -> Iterator[tuple[str, str]]:
        """As in `LocalModel.parts`; `wishes` are parameters of the chat completions API."""
        from model.reasoning import ReasoningStream

        messages = [*system, *({**turn, "content": _as_parts(turn["content"])} for turn in turns)]
        reader = ReasoningStream()  # for servers that leave the tags in
        for part, text in answer_parts(self.client, self.name, messages, **sampling):
            if part == "thinking":
                yield part, text
            else:
                yield "raw", text
                yield from reader.push(text)
        yield from reader.flush()


def _as_parts(content: str | list[str | bytes]) -> str | list[dict]:
    """Content in the API's form, with images as data: URLs."""
    if isinstance(content, str):
        return content
    return [
        {"type": "text", "text": part}
        if isinstance(part, str)
        else {"type": "image_url", "image_url": {"url": "data:image;base64," + base64.b64encode(part).decode()}}
        for part in content
    ]


def weights_in(out_dir: Path, vision: bool) -> list[Path]:
    """The .pth files for a page: chat models first, and of each kind the newest first."""
    order = ("full_sft", "rlhf", "full_dist", "reason", "grpo", "ppo", "sft_vlm", "pretrain")

    def rank(path: Path) -> tuple[int, float]:
        kinds = [i for i, kind in enumerate(order) if path.name.startswith(kind)]
        return (kinds[0] if kinds else -1), -path.stat().st_mtime

    found = [
        path
        for path in out_dir.rglob("*.pth")
        if not any(part == "lora" or part.endswith(".resume") for part in path.relative_to(out_dir).parts[:-1])
        and ("_vlm" in path.stem) == vision
        and not path.stem.startswith("reward_")  # which judges answers and writes none
    ]
    return sorted(found, key=rank)


def adapters_for(weights: Path) -> list[Path]:
    """The LoRA adapters in `lora/` beside the weights with the same size in their name."""
    size = weights.stem.removesuffix("_moe").rpartition("_")[2] + ("_moe" if weights.stem.endswith("_moe") else "")
    return sorted(path for path in (weights.parent / "lora").glob(f"*_{size}.pth"))


def load_local(
    weights: Path, adapter: Path | None, tokenizer_folder: str | None, device: str | None, vision_model: str | None
) -> LocalModel:
    """Load a model, with any adapter merged into it.

    Args:
        vision_model: the vision tower's folder, for weights that need one.

    Raises:
        UserError: one of them cannot be loaded.
    """
    from trainer.device import pick_device
    from trainer.loading import load_for_inference, load_vlm_for_inference

    processor = None
    if vision_model is None:
        model, tokenizer = load_for_inference(weights, tokenizer_folder, adapter)
    else:
        model, tokenizer, processor = load_vlm_for_inference(weights, vision_model, tokenizer_folder)
    pretrained = vision_model is None and weights.stem.startswith("pretrain_")
    return LocalModel(model.to(pick_device(device)), tokenizer, processor, pretrained)


def connect(base_url: str, api_key: str) -> tuple[object, list[str]]:
    """A client for an address, and the names of the models there.

    Raises:
        UserError: it is not an address, nothing answers, it refuses the request, or a proxy prevents it.
    """
    import openai

    patient = openai.Timeout(600, connect=5)  # a busy server may let a question wait
    client = open_client(base_url, api_key or "none", max_retries=0, timeout=patient)
    return client, models_at(client.with_options(timeout=10))
