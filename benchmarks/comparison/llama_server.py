"""llama.cpp as a peer: its server, run in this process by `xllamacpp`, and asked over HTTP.

The wheels of xllamacpp use no more than AVX2, so that they run anywhere. Where the processor has AVX-512, a fair
comparison of speed needs one that is compiled on it: pip install --no-binary xllamacpp xllamacpp.
"""

import json
import urllib.request
from pathlib import Path


class LlamaServer:
    """A GGUF file behind llama.cpp's HTTP endpoints, until the `with` block ends.

    Args:
        path: the GGUF file, which is read into memory and may be deleted afterwards.
        context: tokens that fit into each slot, prompt and answer together.
        slots: sequences decoded at once, in one batch.
        threads: of the prefill and of the decode, each.
        cache_type: precision of the KV cache, "f16" (llama.cpp's default) or "f32".
        flash_attention: llama.cpp chooses where None. Its kernel on a CPU rounds to fp16 also with an fp32 KV cache.
    Raises:
        ModuleNotFoundError: xllamacpp is not installed.
    """

    def __init__(
        self,
        path: Path,
        context: int,
        slots: int = 1,
        threads: int = 1,
        cache_type: str = "f16",
        flash_attention: bool | None = None,
    ):
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx, params.n_parallel = slots * context, slots
        params.n_batch = params.n_ubatch = 512
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type[f"GGML_TYPE_{cache_type.upper()}"]
        choice = {None: "AUTO", True: "ENABLED", False: "DISABLED"}[flash_attention]
        params.flash_attn_type = xllamacpp.llama_flash_attn_type[f"LLAMA_FLASH_ATTN_TYPE_{choice}"]
        params.load_mode = xllamacpp.llama_load_mode.LLAMA_LOAD_MODE_NONE  # no memory map
        params.fit_params = False  # take these sizes as they are
        params.cache_ram_mib = 0  # no copies of the slots' caches: storing them takes time
        params.warmup = False
        params.verbosity = -1
        self._server = xllamacpp.Server(params)
        self._url = self._server.listening_address

    def __enter__(self) -> "LlamaServer":
        return self

    def __exit__(self, *_) -> None:
        self._server = None  # it stops once nothing refers to it

    def ask(self, endpoint: str, **body):
        """The server's reply to a POST of this json, decoded.

        Raises:
            urllib.error.HTTPError: the server refuses it.
        """
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{self._url}/{endpoint}", json.dumps(body).encode(), headers)
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request) as reply:
            return json.load(reply)

    def complete(self, prompts: list[list[int]], n: int, **settings) -> list[dict]:
        """The likeliest next `n` tokens of each prompt, in the replies' "tokens"."""
        greedy = {"samplers": ["top_k"], "top_k": 1, "repeat_penalty": 1.0, "return_tokens": True}
        replies = self.ask("completion", prompt=prompts, n_predict=n, **greedy | settings)
        return replies if isinstance(replies, list) else [replies]  # of several prompts there is a list


def instruction_sets() -> list[str]:
    """What xllamacpp's llama.cpp was compiled with and this processor has: AVX2, AVX512, ...

    Raises:
        ModuleNotFoundError: xllamacpp is not installed.
    """
    import xllamacpp

    settings = (setting.split("=") for setting in xllamacpp.get_system_info().split(":", 1)[1].split("|"))
    return [setting[0].strip() for setting in settings if setting[-1].strip() == "1"]
