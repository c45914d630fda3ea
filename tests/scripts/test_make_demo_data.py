"""The demo's data: true, well-formed, reproducible by seed, with no exam question in any training file."""

import calendar
import datetime
import json
import re
from collections import Counter, defaultdict

import pytest

from dataset.jsonl import JsonlReader
from dataset.records import parse_chat, parse_pair, parse_text
from scripts.demo.scoring import normalise
from scripts.demo.world import relations
from scripts.make_demo_data import MINIMIND, POLITE, WILLOW, as_jsonl, build, identities, sentence, write
from scripts.tool_use.builtin import registry_of
from tests.running import run_script
from trainer.errors import UserError

CHATS = ("sft_mini_512", "sft_1024", "lora_identity", "lora_astronomy", "r1_mix_1024", "rl_cold_start", "eval_sft")
EXAMS = ("eval_facts", "eval_arithmetic", "eval_identity", "eval_lora_identity", "eval_reason")
OPENING = re.compile("|".join(re.escape(opening) for openings in POLITE.values() for opening in openings))
SUM = re.compile(r"(\d+) ([-+*]) (\d+)(?: = (\d+))?")
RESULT = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}


@pytest.fixture(scope="module")
def files():
    """The lines of every file, by its name without the suffix."""
    return {name.removesuffix(".jsonl"): lines for name, lines in build(42).items()}


@pytest.fixture(scope="module")
def training_texts(files):
    """Every text that any stage trains on, once: {text: file}."""
    found = {}
    for name, lines in files.items():
        if not name.startswith("eval_"):
            for text in (text for line in lines for text in stream_texts(line)):
                found.setdefault(text, name)
    return found


def stream_texts(line):
    chats = [line.get(key, ()) for key in ("conversations", "chosen", "rejected")]
    turns = [turn for chat in chats for turn in chat if turn["role"] != "tool"]  # tool results are not targets
    return [part for text in (line.get("text", ""), *(turn["content"] for turn in turns)) for part in text.split("\n")]


def questions_and_answers(files, *names):
    for name in names:
        for line in files[name]:
            turns = [turn["content"] for turn in line["conversations"] if turn["role"] != "system"]
            yield from zip(turns[::2], turns[1::2], strict=True)


def test_the_same_seed_writes_the_same_bytes_in_every_process(tmp_path, files):
    def run(hash_seed):  # a new Python each time: a forked one would share its hash seed
        given = {"env": {"PYTHONHASHSEED": hash_seed}, "launcher": ()}
        return run_script("scripts/make_demo_data.py", "--out_dir", tmp_path, **given)

    run("1")
    first = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    again = run("2")

    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == first
    states = [line.split()[-1] for line in again.stdout.splitlines()]
    assert states == ["unchanged"] * len(files)
    assert set(first) == {f"{name}.jsonl" for name in files} | {"manifest.json"}
    read = {name: [json.loads(line) for line in first[f"{name}.jsonl"].decode().splitlines()] for name in files}
    assert read == files


def test_another_seed_writes_other_lines(files):
    assert build(1)["sft_mini_512.jsonl"] != files["sft_mini_512"]


SOME_FILES = as_jsonl({"a.jsonl": [{"text": "eins"}], "b.jsonl": [{"text": "zwei"}]})


@pytest.mark.parametrize("name", ["a.jsonl", "b.jsonl", "manifest.json"])
@pytest.mark.parametrize("written_before", [False, True])
@pytest.mark.parametrize("content", ['{"text": "the user\'s"}\n', '{"a": 3}', "[1]", ""])
def test_a_file_that_is_the_users_is_never_replaced(tmp_path, name, written_before, content):
    if written_before:
        write(SOME_FILES, tmp_path)
    (tmp_path / name).write_text(content)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    with pytest.raises(UserError, match=re.escape(str(tmp_path / name))):
        write(as_jsonl({file: [{"text": "new"}] for file in SOME_FILES}), tmp_path)

    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_folder_in_the_place_of_a_file_is_told(tmp_path):
    (tmp_path / "b.jsonl").mkdir()

    with pytest.raises(UserError, match=re.escape(str(tmp_path / "b.jsonl"))):
        write(SOME_FILES, tmp_path)

    assert not (tmp_path / "a.jsonl").exists()


def test_its_own_files_are_replaced_and_lost_ones_written_again(tmp_path):
    write(SOME_FILES, tmp_path)
    (tmp_path / "b.jsonl").unlink()

    report = write(SOME_FILES | as_jsonl({"a.jsonl": [{"text": "drei"}]}), tmp_path)

    assert [line.split()[-1] for line in report] == ["written", "written"]
    assert json.loads((tmp_path / "a.jsonl").read_text()) == {"text": "drei"}
    assert json.loads((tmp_path / "b.jsonl").read_text()) == {"text": "zwei"}


def test_a_run_cut_short_knows_its_own_files_again(tmp_path, monkeypatch):
    write(SOME_FILES, tmp_path)
    changed = as_jsonl({name: [{"text": "new"}] for name in SOME_FILES})
    replace, calls = __import__("os").replace, []

    def fail_at_the_third(*paths):
        calls.append(paths)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        replace(*paths)

    monkeypatch.setattr("os.replace", fail_at_the_third)
    with pytest.raises(UserError, match="No space left"):
        write(changed, tmp_path)
    monkeypatch.undo()

    write(SOME_FILES, tmp_path)  # neither the new a.jsonl nor the old b.jsonl is mistaken for a user's file
    assert json.loads((tmp_path / "a.jsonl").read_text()) == {"text": "eins"}


def test_every_line_passes_the_projects_own_parsers(files, tmp_path):
    write(as_jsonl({f"{name}.jsonl": lines for name, lines in files.items()}), tmp_path)
    texts = list(JsonlReader(tmp_path / "pretrain_hq.jsonl", parse_text))
    pairs = [list(JsonlReader(tmp_path / f"{name}.jsonl", parse_pair)) for name in ("dpo", "eval_dpo")]
    readers = [JsonlReader(tmp_path / f"{name}.jsonl", parse_chat) for name in CHATS]
    chats = [chat for reader in readers for chat in reader]

    assert len(texts) > 5000
    assert len(pairs[1]) > 70
    assert all(chosen[:-1] == rejected[:-1] and chosen != rejected for part in pairs for chosen, rejected in part)
    assert all(chat[-1]["role"] == "assistant" for chat in chats)
    assert not any(reader.ignored for reader in readers)
    for name in EXAMS:
        for line in files[name]:
            assert list(line) == ["question", "answers", "kind", "lang"]
            assert line["lang"] in ("en", "zh")
            assert line["answers"]
            assert all(isinstance(answer, str) and normalise(answer) for answer in line["answers"])
    thought = [line["conversations"][-1]["content"] for line in files["r1_mix_1024"]]
    thought = [answer for answer in thought if "<" in answer]
    assert len(thought) == 6000
    assert all(re.fullmatch(r"<think>\n(.+\n)+</think>\n<answer>\n-?\d+\n</answer>", answer) for answer in thought)


def test_there_are_300_facts_and_1000_held_out_questions_a_language(files):
    # a fact counts once, in either language and direction: a capital and its country are one fact
    rows = {(r.kind, r.lang): r.rows for r in relations() if r.kind not in ("country", "before", "opposite", "after")}
    facts = sum(max(len(rows.get((kind, lang), ())) for lang in ("en", "zh")) for kind in {kind for kind, _ in rows})
    facts += sum(len(r.rows) for r in relations() if r.kind == "after" and r.lang == "en")
    facts += sum(len(r.rows) for r in relations() if r.kind == "opposite") // 2

    assert facts >= 300
    asked = Counter(line["lang"] for line in files["eval_facts"])
    assert min(asked["en"], asked["zh"]) >= 1000
    assert len({line["question"] for line in files["eval_facts"]}) == len(files["eval_facts"])
    assert len(files["eval_reason"]) >= 500


def test_no_held_out_phrasing_occurs_in_any_training_file_with_any_entity(training_texts):
    plain = {normalise(OPENING.sub("", text)): (file, text) for text, file in training_texts.items()}
    held_out = [phrasing for relation in relations() for phrasing in relation.held_out]
    held_out += [phrasing for who in (MINIMIND, WILLOW) for i in identities(*who) for phrasing in i.held_out]
    for phrasing in held_out:
        slot_open = re.sub(r"\{x[^}]*\}", "theslot", phrasing)
        pattern = re.compile(normalise(OPENING.sub("", slot_open)).replace("theslot", ".+"))
        # anywhere in a text, so that a question inside a longer line counts too
        seen = next((where for text, where in plain.items() if pattern.search(text)), None)
        assert seen is None, (phrasing, seen)


def test_no_held_out_sum_occurs_in_any_training_file_in_either_order(files, training_texts):
    examined = {tuple(sorted(SUM.search(line["question"]).group(1, 3))) for line in files["eval_arithmetic"]}
    assert len(files["eval_arithmetic"]) == 300

    sums = [(found, text) for text in training_texts for found in SUM.finditer(text)]
    assert len(sums) > 5000
    for found, text in sums:
        assert tuple(sorted(found.group(1, 3))) not in examined, text


def test_no_held_out_story_occurs_in_any_training_file_under_any_name(files, training_texts):
    def numbers(text):
        a, b, c = map(int, re.findall(r"\d+", text))
        return frozenset((a, b)), c

    stories = [text for text in training_texts if len(re.findall(r"\d+", text)) == 3 and not SUM.search(text)]
    examined = {numbers(line["question"]) for line in files["eval_reason"]}

    assert len(stories) > 5000
    assert examined.isdisjoint(map(numbers, stories))


def test_every_sum_and_story_is_right(files, training_texts):
    for text in training_texts:
        for a, op, b, result in SUM.findall(text):
            assert not result or RESULT[op](int(a), int(b)) == int(result), text
    for question, answer in questions_and_answers(files, "sft_mini_512"):
        if found := SUM.search(question):
            assert RESULT[found[2]](int(found[1]), int(found[3])) == int(answer[:-1]), question
    for line in files["eval_arithmetic"]:
        a, op, b, _ = SUM.search(line["question"]).groups()
        assert line["answers"] == [str(RESULT[op](int(a), int(b)))]
    asked = [(line["question"], line["answers"][0]) for line in files["eval_reason"]]
    thought = [(q, re.search(r"<answer>\n(.*)\n", a)) for q, a in questions_and_answers(files, "r1_mix_1024")]
    asked += [(question, found[1]) for question, found in thought if found]
    assert len(asked) > 6000
    for question, answer in asked:
        a, b, c = map(int, re.findall(r"\d+", question))
        assert a + b - c == int(answer), question


BY_KIND = {
    "story": lambda a, b, c: a + b - c,
    "larger": lambda a, b, c: a + b - c,
    "more": lambda a, b, c, d: a + b + c - d,
    "two_step": lambda a, b, c: a * b - c,
}


def test_problems_to_try_are_right_and_those_asked_were_never_tried(files, training_texts):
    def numbers(line):
        return tuple(map(int, re.findall(r"\d+", line["question"])))

    for line in files["rl_math"] + files["eval_rl"]:
        assert list(line) == ["question", "answer", "kind", "lang"]
        if line["kind"] == "units":
            a, b = numbers(line)
            assert line["answer"] == a * (100 if re.search("cm|厘米", line["question"]) else 60) + b
        else:
            assert line["answer"] == BY_KIND[line["kind"]](*numbers(line)), line
        assert line["answer"] >= 0
    kinds = [Counter(line["kind"] for line in files[name]) for name in ("rl_math", "eval_rl")]
    assert [of_one["story"] for of_one in kinds] == [3000, 600]
    assert all(len(set(of_one.values()) - {of_one["story"]}) == 1 and len(of_one) == 5 for of_one in kinds)
    tried = {line["question"] for line in files["rl_math"]} | set(training_texts)
    assert tried.isdisjoint(line["question"] for line in files["eval_rl"])

    def story(a, b, c):
        return frozenset((a, b)), c

    shown = [tuple(map(int, re.findall(r"\d+", text))) for text in training_texts if not SUM.search(text)]
    learned = {story(*found) for found in shown if len(found) == 3}
    learned |= {story(*numbers(line)) for line in files["rl_math"] if line["kind"] == "story"}
    assert learned.isdisjoint(story(*numbers(line)) for line in files["eval_rl"] if line["kind"] == "story")
    thoughts = [answer for _, answer in questions_and_answers(files, "rl_cold_start") if "<think>" in answer]
    assert len(thoughts) == 300


def test_a_question_has_one_taught_answer(files):
    taught = defaultdict(set)
    names = ("sft_mini_512", "sft_1024", "lora_astronomy", "eval_sft")
    for question, answer in questions_and_answers(files, *names):
        if not question.startswith(("And ", "那")):  # which depends on the turn before it
            taught[OPENING.sub("", question)].add(answer)
    assert {question: answers for question, answers in taught.items() if len(answers) > 1} == {}


def test_the_preferred_answer_is_the_beginning_of_the_one_the_model_was_taught(files):
    taught = dict(questions_and_answers(files, "sft_mini_512"))
    for line in files["dpo"] + files["eval_dpo"]:
        better = line["chosen"][-1]["content"]
        worse = line["rejected"][-1]["content"]
        assert re.split("[,，]", worse)[0] == better[:-1]
        assert worse in taught.values()
    learned = {OPENING.sub("", line["chosen"][0]["content"]) for line in files["dpo"]}
    assert learned <= {OPENING.sub("", question) for question in taught}
    assert learned.isdisjoint(OPENING.sub("", line["chosen"][0]["content"]) for line in files["eval_dpo"])


def test_a_follow_up_asks_on_and_half_of_the_talks_end_in_small_talk(files):
    """A follow-up such as "And Peru?" is answered by another row of what the question before it was about."""
    known, ends = defaultdict(set), Counter()
    for relation in relations():
        for x, (y, *_) in relation.rows:
            known[relation.lang, x].add(normalise(sentence(y, relation.lang)))
    for line in files["sft_mini_512"]:
        turns = [turn["content"] for turn in line["conversations"] if turn["role"] != "system"]
        follows = [turn for turn in turns[2::2] if re.fullmatch(r"And .+\?|那.+呢？", turn)]
        if follows:
            (asked,) = follows
            assert turns.index(asked) == 2
            about = re.fullmatch(r"And (.+)\?|那(.+)呢？", asked)
            assert normalise(turns[3]) in known["en" if about[1] else "zh", about[1] or about[2]]
            ends[len(turns)] += 1
    assert ends.keys() == {4, 6}
    assert 0.4 < ends[6] / ends.total() < 0.6


def test_who_the_model_is_differs_from_who_the_adapter_makes_it(files):
    mine = dict(questions_and_answers(files, "sft_mini_512"))
    answers = {identity.answer for identity in identities(*WILLOW)}
    adapted = [(OPENING.sub("", q), a) for q, a in questions_and_answers(files, "lora_identity")]
    others = [(question, answer) for question, answer in adapted if answer in answers]

    assert len(others) > 300
    for question, answer in others:
        assert mine[question] != answer
    assert all("MiniMind" in line["answers"][0] for line in files["eval_identity"])
    assert not any("MiniMind" in answer for _, answer in adapted)
    held_out = {line["question"]: line["answers"] for line in files["eval_identity"]}
    assert held_out.keys() == {line["question"] for line in files["eval_lora_identity"]}
    assert all(line["answers"][0] in dict(others).values() for line in files["eval_lora_identity"])


def test_the_calendar_agrees_with_pythons():
    world = {(relation.kind, relation.lang, relation.rows[0][0]): dict(relation.rows) for relation in relations()}
    months, days = list(calendar.month_name)[1:], list(calendar.day_name)
    for names in (months, days):
        after = world["after", "en", names[0]]
        assert [after[name][0] for name in names] == names[1:] + names[:1]
        before = world["before", "en", names[0]]
        assert [before[name][0] for name in names] == names[-1:] + names[:-1]
    lengths = [int(number) for (number,) in world["days", "en", "January"].values()]
    assert lengths == [calendar.monthrange(2023, month)[1] for month in range(1, 13)]
    assert lengths == [int(number) for (number,) in world["days", "zh", "一月"].values()]
    assert list(world["month", "en", "January"].values()) == [(str(n),) for n in range(1, 13)]


def test_opposites_are_opposites_both_ways():
    for relation in relations():
        if relation.kind == "opposite":
            opposite = {word: answers[0] for word, answers in relation.rows}
            assert len(opposite) == len(relation.rows)  # no word appears twice
            assert all(opposite[opposite[word]] == word for word in opposite)


def test_the_grammar_of_what_is_filled_in(files, training_texts):
    asked = [line["question"] for name in (*EXAMS, "rl_math", "eval_rl") for line in files[name]]
    for text in (*training_texts, *asked):
        assert not re.search(r"\b[Aa] (?=[aeiou])|\b[Aa]n (?!hour|[aeiou])", text), text
        assert not re.search(r"\b1 (?:apple|book|coin|pen|stone|card)s", text), text
        assert not re.search(r"[{}]|  |。。|\.\.|？？|\?\?", text), text
        # "Please answer: Tell me …" is a request for a request
        request = OPENING.match(text) and text[-1] not in "?？。."
        assert not request, text
        if text.isascii() and text[:1].isalpha() and " " in text:
            assert text[0].isupper(), text


def test_talks_with_tools_can_be_learned_and_say_what_the_tools_said(files):
    lines = files["tool_mix"]
    chats = [parse_chat(line, Counter()) for line in lines]
    said, kinds = registry_of(["all"]), Counter()
    for chat, line in zip(chats, lines, strict=True):
        listed = {tool["function"]["name"] for tool in line["tools"]}
        calls = [call for turn in chat for call in turn.get("tool_calls", ())]
        results = [turn["content"] for turn in chat if turn["role"] == "tool"]
        assert results == [said.call(call["name"], call["arguments"]) for call in calls]
        assert {call["name"] for call in calls} <= listed
        assert chat[-1]["role"] == "assistant"
        failed = any(result.startswith("error: ") for result in results)
        kinds[(len(calls), failed, chat[0]["content"].isascii())] += 1
        if len(calls) == 1 and not failed and calls[0]["name"] != "calendar":
            assert results[0] in chat[-1]["content"]
        if len(calls) == 1 and calls[0]["name"] == "calendar":
            asked = re.findall(r"\d{4}-\d\d-\d\d|\d+", chat[0]["content"])
            date = max(asked, key=len)
            later = sum(int(number) for number in asked if number != date)  # "… 7 days after …", or nothing
            day = datetime.date.fromisoformat(date) + datetime.timedelta(days=later)
            assert day.isoformat() in chat[-1]["content"]
            assert (f"{day:%A}" if chat[0]["content"].isascii() else f"星期{'一二三四五六日'[day.weekday()]}") in (
                chat[-1]["content"]
            )
    assert {(n, failed) for n, failed, _ in kinds} == {(0, False), (1, False), (1, True), (2, False)}
    assert min(kinds.values()) > 20
