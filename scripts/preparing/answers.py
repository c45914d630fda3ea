"""Faults of answers, and of the order of a chat's turns."""

import re

from scripts.preparing.stage_records import TAG, WELL_FORMED

# Some good answers begin with "As an AI…"; a refusal also says what it cannot do.
CANNOT = r"(?:can(?:no|')t|cannot|am (?:not|unable)|'m (?:not|unable)|do(?: no|n')t|won't|will not|must decline)"
WITHIN = r"[^。！？\n]{0,25}?"
DOING = "|".join(
    "回答 提供 完成 生成 理解 帮助 协助 执行 满足 处理 给出 判断 确定 访问 创建 创作 "
    "浏览 查看 播放 绘制 展示 识别 讨论 继续 为您 为你".split()
)
AI = "人工智能|AI|ＡＩ|语言模型|大?语言模型|机器人|虚拟助手"
UNABLE = rf"(?:无法|不能|没办法|没有办法|不可以|不便){WITHIN}(?:{DOING})|不支持|没有足够|没有具体|没有能力|无法完成"
REFUSAL = re.compile(
    r"(?:\A|\n|[.!?。！？] ?)\s*(?:"
    rf"as an? (?:AI|artificial intelligence|(?:large )?language model|virtual assistant)\b[^.!?\n]{{0,60}}?\bI {CANNOT}"
    rf"|I(?:'m|’m| am) (?:(?:very|really|so) )?sorry,? (?:but )?(?:as an AI|I {CANNOT})"
    rf"|(?:sorry|my apologies|I apologi[sz]e)[,.] (?:but )?(?:as an AI|I {CANNOT})"
    r"|I (?:can(?:no|')t|cannot|am unable to|am not able to|won't) "
    r"(?:assist|help|fulfill?|comply|provide|engage|answer)\b"
    rf"|(?:很|非常|十分|真的|实在)?(?:抱歉|对不起|遗憾)[，,。！!]?{WITHIN}(?:{UNABLE})"
    rf"|(?:作为|身为|我(?:只)?是)(?:一个|一名|一款|一种)?(?:{AI}){WITHIN}"
    rf"(?:{UNABLE}|不能|无法|没有(?:个人|情感|感情|能力|自己)|不具备|不会)"
    rf"|我(?:{UNABLE})"
    r")",
    re.IGNORECASE,
)
CHINESE_SIGNS = ("抱歉", "对不起", "遗憾", "作为", "身为", "我是", "我只是", "我无法", "我不能")
ENGLISH_SIGNS = ("orry", "As a", "as a", "I can", "I am", "I won", "apolog", "As A")
ENDS = ".!?。！？…\"'”’）)]}】》」』`*~>|;；%￥$"
UNFINISHED = ("，", "、", ",", "（", "(", "“", "[", "：“", "——", " and", " the", " of", " to", " a", " with")
CUT_CHARS = 100  # an answer this short may be a list, a name or a title


def is_refusal(text: str) -> bool:
    """Whether a text refuses to answer, at the beginning of a sentence in its first 300 characters."""
    text = text[:300]
    chinese = ("无" in text or "不" in text or "没" in text) and any(sign in text for sign in CHINESE_SIGNS)
    return (chinese or any(sign in text for sign in ENGLISH_SIGNS)) and REFUSAL.search(text) is not None


def is_cut_off(answer: str) -> bool:
    """Whether an answer seems to be cut off: in an open code block, or in its last sentence.

    A last line without a full stop is not enough: lists, titles and sums have none. A last line in which sentences end,
    except the last one, is.
    """
    answer = answer.rstrip()
    if answer.count("```") % 2:
        return True
    if len(answer) < CUT_CHARS:
        return False
    if answer.endswith(UNFINISHED):
        return True
    if answer[-1] in ENDS or not (answer[-1].isalpha() or answer[-1] in ":："):
        return False
    last = answer[answer.rfind("\n") + 1 :]
    if answer[-1] in ":：":
        return len(answer) > 3 * CUT_CHARS
    inner = re.findall(r"[。！？]|[a-z][.!?] [A-Z]", last[:-1])
    return len(inner) >= 2


def turns_fault(turns: list[dict]) -> str | None:
    """The fault in the order of a chat's turns; None if there is none.

    A chat may begin with a system turn; then user and assistant take turns, the user first.
    """
    body = turns[1:] if turns and turns[0]["role"] == "system" else turns
    if not body:
        return "no turns"
    for number, turn in enumerate(body):
        if turn["role"] != ("assistant" if number % 2 else "user"):
            return "turns that do not alternate"
    if body[-1]["role"] != "assistant":
        return "no answer at the end"
    if not any(turn.get("weight", 1) for turn in body[1::2]):
        return "no answer to train on"
    if len(body) > 2:
        said = [turn["content"] for turn in body]
        if any(said[n] == said[n + 2] and len(said[n]) > 20 for n in range(len(said) - 2)):
            return "a repeated turn"
    if any(
        body[n]["content"] == body[n + 1]["content"] and len(body[n]["content"]) > 20 for n in range(0, len(body), 2)
    ):
        return "an answer that only repeats the question"
    return None


def thought_fault(answer: str, required: bool) -> bool:
    """Whether an answer's tags differ from our form, <think>, </think>, <answer>, </answer>, each once."""
    if not required and not TAG.search(answer):
        return False
    return WELL_FORMED.fullmatch(answer) is None
