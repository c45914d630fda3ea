"""The chat page, for text and for images; drawn by Streamlit, which runs `page` again at every click.

Text from users, models and servers is shown only by `st.text`, selections and input fields: literally, never as
Markdown or HTML.
"""

import argparse
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

import streamlit as st

from scripts.serving.page_models import Answer, RemoteModel, adapters_for, connect, load_local, weights_in
from trainer.arguments import ROOT, add_device_argument
from trainer.errors import UserError
from trainer.inference_arguments import SAMPLING

SOURCES = ("out/", "OpenAI API")  # the same in both languages: a selection whose options change loses its state
PICTURES = ["png", "jpg", "jpeg", "webp", "bmp", "gif"]
WORDS = {
    "中文": {
        "source": "模型来源",
        "weights": "模型",
        "adapter": "LoRA 适配器",
        "no_weights": "{} 里没有可用的权重：请先运行 `make demo`，或训练自己的模型，或改用 API。",
        "address": "API 地址",
        "key": "API 密钥",
        "system": "系统提示词",
        "system_hint": "留空则使用模型默认的提示词",
        "parameters": "生成参数",
        "temperature": "温度",
        "temperature_help": "采样温度；0 表示贪心解码",
        "top_p": "Top-p",
        "penalty": "重复惩罚",
        "longest": "最大回答长度（token）",
        "history": "历史对话轮数",
        "seed": "随机种子",
        "seed_help": "留空则每次不同",
        "new": "新对话",
        "ask": "说点什么…",
        "hello": "你好，想聊点什么？",
        "samples": ("你是谁？", "中国的首都是哪里？", "水的化学式是什么？", "12 + 30 等于多少？"),
        "attach": "点击输入框里的回形针，添加一张或多张图片，再提问。",
        "describe": "请描述这张图片。",
        "thinking": "思考过程",
        "think": "先思考，再回答",
        "stop": "停止",
        "stopped": "已停止",
        "again": "重新生成",
        "delete": "删除这一轮",
        "failed": "出错了",
        "loading": "正在加载模型…",
        "speed": "{} token · {:.0f} token/秒",
    },
    "English": {
        "source": "Model source",
        "weights": "Model",
        "adapter": "LoRA adapter",
        "no_weights": "There are no weights in {}: run `make demo`, train your own, or use an API.",
        "address": "API address",
        "key": "API key",
        "system": "System prompt",
        "system_hint": "leave empty for the model's default",
        "parameters": "Parameters",
        "temperature": "Temperature",
        "temperature_help": "sampling temperature; 0: greedy",
        "top_p": "Top-p",
        "penalty": "Repetition penalty",
        "longest": "Longest answer (tokens)",
        "history": "Turns of chat history",
        "seed": "Seed",
        "seed_help": "leave empty for a different answer each time",
        "new": "New chat",
        "ask": "Say something…",
        "hello": "Hello! What would you like to talk about?",
        "samples": (
            "Who are you?",
            "What is the capital of France?",
            "What is the chemical symbol of gold?",
            "12 + 30 = ?",
        ),
        "attach": "Attach one or more pictures with the paper clip in the input field, then ask about them.",
        "describe": "Describe the picture.",
        "thinking": "Thinking",
        "think": "Think before answering",
        "stop": "Stop",
        "stopped": "stopped",
        "again": "Regenerate",
        "delete": "Delete this turn",
        "failed": "Something went wrong",
        "loading": "Loading the model…",
        "speed": "{} tokens · {:.0f} tokens/s",
    },
}


@dataclass(eq=False)
class Turn:
    """A question, with or without images, and, once asked, its answer."""

    number: int
    question: str
    pictures: list[bytes]
    answer: Answer | None = None

    def messages(self) -> list[dict]:
        """The turn in the form of a later question's history; a turn without an answer is left out."""
        if self.answer is None or not self.answer.raw:
            return []
        return [self.asked(), {"role": "assistant", "content": self.answer.raw}]

    def asked(self) -> dict:
        return {"role": "user", "content": [*self.pictures, self.question] if self.pictures else self.question}


@dataclass
class Settings:
    """The side bar's settings: the backend that answers (None: there is none), and the sampling settings."""

    backend: object | None = None
    system: list[dict] = field(default_factory=list)
    sampling: dict = field(default_factory=dict)
    history: int = 3


def get_args():
    parser = argparse.ArgumentParser(description="streamlit run scripts/web_demo.py -- OPTIONS")
    parser.add_argument("--out_dir", type=Path, default=ROOT / "out", help="folder of the weights")
    parser.add_argument("--tokenizer", default=None, metavar="DIR", help="tokenizer folder (default: the shipped one)")
    add_device_argument(parser)
    parser.add_argument(
        "--vision_model",
        default=str(ROOT / "model" / "vision_model" / "clip-vit-base-patch16"),
        metavar="DIR",
        help="the vision tower of web_demo_vlm.py: a CLIP's transformers folder",
    )
    parser.add_argument("--base_url", default="http://127.0.0.1:8998/v1", help="address of the API to offer")
    return parser.parse_args()


@st.cache_resource(max_entries=2, show_spinner=False)
def _local(weights: Path, adapter: Path | None, changed: tuple, tokenizer, device, vision_model):
    return load_local(weights, adapter, tokenizer, device, vision_model)


@st.cache_resource(ttl=60, show_spinner=False)
def _remote(address: str, key: str):
    return connect(address, key)


# ------------------------------------------------------------------------------------------------------- side bar


def choose_local(words: dict, args, vision: bool):
    """The backend for a model in `out/`; None if there is none."""
    weights = weights_in(args.out_dir, vision)
    if not weights:
        st.info(words["no_weights"].format(f"`{args.out_dir}`"), icon=":material/info:")
        return None
    chosen = st.selectbox(
        words["weights"], weights, format_func=lambda path: str(path.relative_to(args.out_dir)), key="weights"
    )
    adapter = None
    if adapters := adapters_for(chosen):
        adapter = st.selectbox(
            words["adapter"],
            [None, *adapters],
            format_func=lambda path: path.stem if path else "—",
            key=f"adapter for {chosen}",
        )
    changed = tuple(path.stat().st_mtime for path in (chosen, adapter) if path)
    with st.spinner(words["loading"]):
        tower = args.vision_model if vision else None
        return _local(chosen, adapter, changed, args.tokenizer, args.device, tower)


def choose_remote(words: dict, args):
    """The backend for a model at a server's address; None if it has none."""
    address = st.text_input(words["address"], args.base_url, key="address")
    key = st.text_input(words["key"], type="password", placeholder="OPENAI_API_KEY", key="api_key")
    if not key and address == args.base_url:  # never to an address that somebody typed
        key = os.environ.get("OPENAI_API_KEY", "")
    client, names = _remote(address, key)
    name = st.selectbox(words["weights"], names, key="remote_model")
    return RemoteModel(client, name) if name else None


def side_bar(words: dict, args, vision: bool) -> Settings:
    """Draw the side bar; returns its settings."""
    settings = Settings()
    remote = st.radio(words["source"], SOURCES, horizontal=True, key="source") == SOURCES[1]
    try:
        settings.backend = choose_remote(words, args) if remote else choose_local(words, args, vision)
    except UserError as error:
        st.error(words["failed"], icon=":material/error:")
        st.text(str(error))
    system = st.text_area(words["system"], placeholder=words["system_hint"], height=80, key="system").strip()
    if system:
        settings.system = [{"role": "system", "content": system}]
    with st.expander(words["parameters"]):
        usual, hint = SAMPLING, words["temperature_help"]
        temperature = st.slider(words["temperature"], 0.0, 2.0, usual["temperature"], 0.05, help=hint, key="t")
        top_p = st.slider(words["top_p"], 0.05, 1.0, usual["top_p"], 0.05, key="top_p")
        penalty = st.slider(
            words["penalty"], 1.0, 2.0, usual["repetition_penalty"], 0.05, disabled=remote, key="penalty"
        )
        longest = st.slider(words["longest"], 16, 4096, usual["max_new_tokens"], 16, key="longest")
        seed = st.number_input(words["seed"], 0, 2**31 - 1, None, 1, help=words["seed_help"], key="seed")
        settings.history = st.slider(words["history"], 0, 20, 3, key="history")
    settings.sampling = {"temperature": temperature, "top_p": top_p, "seed": seed}
    settings.sampling |= (
        {"max_tokens": longest} if remote else {"max_new_tokens": longest, "repetition_penalty": penalty}
    )
    if getattr(settings.backend, "opens_thoughts", False) and st.toggle(words["think"], key="think"):
        settings.sampling["open_thinking"] = True
    return settings


# ------------------------------------------------------------------------------------------------------------ talk


def say(question: str, pictures: list[bytes] = ()) -> None:
    """Add a question to the chat; a running answer is stopped."""
    state = st.session_state
    for turn in state.turns:
        if turn.answer is not None:
            turn.answer.stop()
    state.asked = state.get("asked", 0) + 1
    state.turns.append(Turn(state.asked, question, list(pictures)))


def forget(turn: Turn) -> None:
    if turn.answer is not None:
        turn.answer.stop()
    st.session_state.turns.remove(turn)


def forget_all() -> None:
    for turn in list(st.session_state.turns):
        forget(turn)


def ask_again(turn: Turn) -> None:
    turn.answer = None


def ask(turn: Turn, settings: Settings) -> None:
    """Start the model's answer."""
    turns = st.session_state.turns
    earlier = turns[: turns.index(turn)]
    known = [message for old in earlier[max(0, len(earlier) - settings.history) :] for message in old.messages()]
    turn.answer = Answer(settings.backend.parts(settings.system, [*known, turn.asked()], settings.sampling))


def draw_pictures(turn: Turn, words: dict) -> None:
    """Draw the images of a question as the model sees them, or name the one it cannot read."""
    if not turn.pictures:
        return
    from model.images import ImageError, read_image

    with st.container(horizontal=True):
        for number, picture in enumerate(turn.pictures, 1):
            try:
                image = read_image(picture)
                image.thumbnail((512, 512))
                st.image(image, width=240)
            except ImageError as error:
                st.error(words["failed"], icon=":material/error:")
                st.text(f"{number}: {error}")


def draw_answer(turn: Turn, words: dict, last: bool) -> None:
    """Show an answer, and update it while it is being generated."""
    answer = turn.answer
    above, text, below = st.container(), st.empty(), st.container()
    thinking = None
    running = not answer.ended
    if running:
        below.button(words["stop"], icon=":material/stop_circle:", on_click=answer.stop, key=f"stop {turn.number}")
    while True:
        ended = answer.ended  # before the text, which then is whole
        if answer.thinking and thinking is None:
            thinking = above.expander(words["thinking"]).empty()
        if thinking is not None:
            thinking.text(answer.thinking)
        text.text(answer.text + ("" if ended else " ▌"))
        if ended:
            break
        answer.watch(0.06)
    if running:
        st.rerun()  # now with other buttons
    with below:
        if answer.error:
            st.error(words["failed"], icon=":material/error:")
            st.text(answer.error)
        with st.container(horizontal=True, vertical_alignment="center", gap="small"):
            if last:
                st.button(
                    "",
                    icon=":material/refresh:",
                    help=words["again"],
                    on_click=ask_again,
                    args=(turn,),
                    key=f"again {turn.number}",
                    type="tertiary",
                )
            st.button(
                "",
                icon=":material/delete:",
                help=words["delete"],
                on_click=forget,
                args=(turn,),
                key=f"delete {turn.number}",
                type="tertiary",
            )
            notes = [words["stopped"]] if answer.stopped else []
            if answer.tokens and answer.seconds:
                notes.append(words["speed"].format(answer.tokens, answer.tokens / answer.seconds))
            st.caption(" · ".join(notes))


def draw_greeting(words: dict, ready: bool, vision: bool) -> None:
    """Draw an empty chat: a few questions to begin with, or where to add images."""
    st.header(words["hello"], anchor=False)
    if vision:
        st.write(words["attach"])
        return
    columns = st.columns(2)
    for i, sample in enumerate(words["samples"]):
        columns[i % 2].button(
            sample, on_click=say, args=(sample,), width="stretch", disabled=not ready, key=f"sample {i}"
        )


def page(vision: bool = False) -> None:
    """Draw the page; `vision` for models that take images.

    Raises:
        UserError: the script was run by Python instead of Streamlit.
    """
    if not st.runtime.exists():
        script = "web_demo_vlm.py" if vision else "web_demo.py"
        raise UserError(f"this page needs Streamlit: run {sys.executable} -m streamlit run scripts/{script}")
    args = get_args()
    st.set_page_config(page_title="MiniMind", page_icon=":material/forum:")
    state = st.session_state
    state.setdefault("turns", [])
    with st.sidebar:
        st.title("MiniMind", anchor=False)
        own = "中文" if (st.context.locale or "").startswith("zh") else "English"
        language = st.segmented_control("语言 / Language", list(WORDS), default=own, required=True, key="language")
        words = WORDS[language or own]
        st.button(words["new"], icon=":material/edit_square:", on_click=forget_all, width="stretch", key="new")
        settings = side_bar(words, args, vision)
    ready = settings.backend is not None
    if vision:
        said = st.chat_input(
            words["ask"], accept_file="multiple", file_type=PICTURES, disabled=not ready, key="question"
        )
        if said:
            say(said.text or words["describe"], [file.getvalue() for file in said.files])
    elif question := st.chat_input(words["ask"], disabled=not ready, key="question"):
        say(question)
    if not state.turns:
        draw_greeting(words, ready, vision)
    for turn in list(state.turns):
        with st.chat_message("user", avatar=":material/person:"):
            draw_pictures(turn, words)
            st.text(turn.question)
        if turn.answer is None and ready:
            ask(turn, settings)
        if turn.answer is not None:
            with st.chat_message("assistant", avatar=":material/smart_toy:"):
                draw_answer(turn, words, last=turn is state.turns[-1])
