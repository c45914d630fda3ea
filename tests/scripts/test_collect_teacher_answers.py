"""scripts/collect_teacher_answers.py with a small HTTP server: order, retries, resuming, and losing nothing."""

import gc
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from dataset import SFTDataset
from scripts.collect_teacher_answers import AnswerFile, chat_key
from tests.conftest import write_jsonl
from tests.running import PATIENCE, ROOT, call_script
from tests.scripts.openai_double import http_server
from trainer.errors import UserError

SCRIPT = "scripts/collect_teacher_answers.py"


class Endpoint(ThreadingHTTPServer):
    """Answers each question with "about QUESTION", unless `behave` says otherwise.

    Attributes:
        behave: (question, number of earlier requests for it) -> None, or (status, body); may block.
        asked: the requests' bodies, in order of arrival.
        most_at_once: the largest number of simultaneous requests.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.behave = lambda question, times: None
        self.asked: list[dict] = []
        self.times: Counter[str] = Counter()
        self.lock = threading.Lock()
        self.open = self.most_at_once = 0
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        question = body["messages"][-1]["content"]
        with server.lock:
            server.asked.append(body | {"authorization": self.headers["Authorization"], "path": self.path})
            times = server.times[question]
            server.times[question] += 1
            server.open += 1
            server.most_at_once = max(server.open, server.most_at_once)
        status, reply = server.behave(question, times) or (200, completion(f"about {question}"))
        with server.lock:
            server.open -= 1
        data = reply if isinstance(reply, bytes) else json.dumps(reply).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        if status == 429:
            self.send_header("Retry-After-Ms", "10")
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


def completion(content: str | None, finish_reason: str = "stop", **more) -> dict:
    choice = {"index": 0, "message": {"role": "assistant", "content": content, **more}, "finish_reason": finish_reason}
    return {"id": "1", "object": "chat.completion", "created": 0, "model": "teacher", "choices": [choice]}


@pytest.fixture
def endpoint():
    with Endpoint() as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def questions(tmp_path):
    return write_jsonl(tmp_path / "questions.jsonl", [{"question": f"question {n}?"} for n in range(24)])


def collect(endpoint, questions, answers, *flags: str, exit_code: int = 0) -> None:
    call_script(SCRIPT, questions, answers, "--base_url", endpoint.url, "--model", "big", *flags, exit_code=exit_code)


def replies(path) -> list[tuple[str, str]]:
    """(question, answer) of each line."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [(line["conversations"][-2]["content"], line["conversations"][-1]["content"]) for line in lines]


def test_answers_stand_in_the_order_of_the_questions(endpoint, questions, tmp_path, tiny_tokenizer):
    first, second = threading.Event(), threading.Event()

    def behave(question, times):
        if question == "question 0?":
            first.set()
            assert second.wait(PATIENCE)  # so that it is answered after another question
        else:
            assert first.wait(PATIENCE)  # so that two requests are open at once
            second.set()

    endpoint.behave = behave
    collect(endpoint, questions, tmp_path / "out" / "a.jsonl", "--concurrency", "6", "--temperature", "0.5")
    expected = [(f"question {n}?", f"about question {n}?") for n in range(24)]
    assert replies(tmp_path / "out" / "a.jsonl") == expected
    assert 1 < endpoint.most_at_once <= 6
    first = endpoint.asked[0]
    assert (first["model"], first["temperature"], first["path"]) == ("big", 0.5, "/v1/chat/completions")
    assert "max_tokens" not in first
    assert len(SFTDataset(tmp_path / "out" / "a.jsonl", tiny_tokenizer, 256, packing=False)) == 24


def test_what_is_sent_of_a_chat(endpoint, tmp_path):
    user, assistant = ({"role": role, "content": role} for role in ("user", "assistant"))
    system = {"role": "system", "content": "own"}
    questions = write_jsonl(
        tmp_path / "q.jsonl", [{"conversations": [system, user, assistant, user, assistant]}, {"question": "hi"}]
    )
    collect(endpoint, questions, tmp_path / "a.jsonl", "--system", "short", "--api_key", "k", "--concurrency", "1")
    assert [body["messages"] for body in endpoint.asked] == [
        [system, user, assistant, user],
        [{"role": "system", "content": "short"}, {"role": "user", "content": "hi"}],
    ]
    assert endpoint.asked[0]["authorization"] == "Bearer k"
    lines = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text(encoding="utf-8").splitlines()]
    assert lines[0]["conversations"] == [system, user, assistant, user, {**assistant, "content": "about user"}]
    assert (lines[0]["model"], lines[0]["thinking"]) == ("big", False)


def test_a_question_is_what_its_line_says(endpoint, tmp_path, capsys, tiny_tokenizer):
    """The system prompt is sent; a weight is not, but stays in the line; unknown keys are counted."""
    user, answer = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}
    lines = [
        {"question": "one", "system": "own", "id": 1, "answer": "1"},
        {"conversations": [user, answer | {"weight": 0}, user, answer], "id": 2},
        {"question": ""},
    ]
    questions, out = write_jsonl(tmp_path / "q.jsonl", lines), tmp_path / "a.jsonl"
    flags = ("--concurrency", "1", "--skip_bad_lines")
    collect(endpoint, questions, out, *flags)
    asked = [body["messages"] for body in endpoint.asked]
    assert asked == [[{"role": "system", "content": "own"}, user | {"content": "one"}], [user, answer, user]]
    said = capsys.readouterr().err
    assert f"{questions}: ignored keys: id 2, answer 1, turns after the question 1\n" in said
    assert f"{questions}: 1 bad lines skipped, the first: line 3: it contains no question" in said
    written = [json.loads(line)["conversations"] for line in out.read_text(encoding="utf-8").splitlines()]
    assert written[1] == [user, answer | {"weight": 0}, user, {"role": "assistant", "content": "about hi"}]
    assert "ignored keys: model 2, thinking 2" in SFTDataset(out, tiny_tokenizer).summary
    collect(endpoint, questions, out, *flags)  # finds its own answers again
    assert len(endpoint.asked) == 2


def test_a_busy_endpoint_is_asked_again(endpoint, questions, tmp_path, monkeypatch):
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)
    busy = {0: (429, {"error": {"message": "busy"}}), 1: (503, {"error": {"message": "later"}})}
    endpoint.behave = lambda question, times: busy.get(times)
    collect(endpoint, questions, tmp_path / "a.jsonl", "--retries", "2")
    assert len(replies(tmp_path / "a.jsonl")) == 24
    assert set(endpoint.times.values()) == {3}


def test_a_second_run_asks_only_what_has_no_answer(endpoint, questions, tmp_path, capsys):
    out = tmp_path / "a.jsonl"
    odd = {"question 3?": (400, {"error": {"message": "I will not"}}), "question 5?": (200, completion(""))}
    odd["question 7?"] = (200, completion("cut o", "length"))
    odd["question 8?"] = (200, {"choices": []})
    endpoint.behave = lambda question, times: odd.get(question)
    collect(endpoint, questions, out, exit_code=2)
    printed = capsys.readouterr()
    assert "20 of 24 questions are answered" in printed.out
    for word in ("I will not", "it is empty", "cut off at the token limit", "no choices", "4 questions got no answer"):
        assert word in printed.err
    before = out.read_text(encoding="utf-8").splitlines()
    assert [question for question, _ in replies(out)] == [f"question {n}?" for n in range(24) if n not in (3, 5, 7, 8)]
    odd.clear()
    endpoint.asked.clear()
    collect(endpoint, questions, out)
    assert sorted(body["messages"][-1]["content"][9] for body in endpoint.asked) == ["3", "5", "7", "8"]
    assert [question for question, _ in replies(out)] == [f"question {n}?" for n in range(24)]
    assert set(before) < set(out.read_text(encoding="utf-8").splitlines())
    endpoint.asked.clear()
    collect(endpoint, questions, out)
    assert endpoint.asked == []


def test_no_reply_whatever_its_shape_stops_a_worker(endpoint, questions, tmp_path, capsys):
    said = [b"", b"[", {"choices": "x"}, {"choices": [{}]}, {"choices": [{"message": None}]}, {"choices": [7]}]
    said += [completion([{"type": "text", "text": "in parts"}]), completion("half \ud800")]
    odd = {f"question {n}?": (200, reply) for n, reply in enumerate(said)}
    endpoint.behave = lambda question, times: odd.get(question)
    collect(endpoint, questions, tmp_path / "a.jsonl", "--concurrency", "1", exit_code=2)
    errors = capsys.readouterr().err
    assert [question for question, _ in replies(tmp_path / "a.jsonl")] == [f"question {n}?" for n in range(8, 24)]
    for word in (
        "did not send JSON",
        "sent no choices",
        "it is not text but",
        "half a character",
        "8 questions got no answer",
    ):
        assert word in errors


def test_hopeless_questions_are_got_past_by_a_larger_give_up_after(endpoint, questions, tmp_path, capsys):
    endpoint.behave = lambda question, times: (200, completion("")) if question[9:11].strip("?") < "2" else None
    collect(endpoint, questions, tmp_path / "a.jsonl", "--concurrency", "1", "--give_up_after", "2", exit_code=2)
    assert "2 question(s) in a row got no answer (--give_up_after 2), the last: it is empty" in capsys.readouterr().err
    assert replies(tmp_path / "a.jsonl") == []
    collect(endpoint, questions, tmp_path / "a.jsonl", "--concurrency", "1", "--give_up_after", "24", exit_code=2)
    assert len(replies(tmp_path / "a.jsonl")) == 12


def test_only_failures_in_a_row_make_it_give_up(endpoint, questions, tmp_path, capsys):
    endpoint.behave = lambda question, times: (200, completion("")) if int(question[9:-1]) % 3 else None
    flags = ("--concurrency", "1", "--give_up_after", "3")
    collect(endpoint, questions, tmp_path / "a.jsonl", *flags, exit_code=2)
    assert "16 questions got no answer (see above)" in capsys.readouterr().err
    assert [question for question, _ in replies(tmp_path / "a.jsonl")] == [f"question {n}?" for n in range(0, 24, 3)]


def test_an_answer_whose_question_went_away_meanwhile_is_kept(endpoint, questions, tmp_path):
    def behave(question, times):
        write_jsonl(questions, [{"question": "question 1?"}])

    endpoint.behave = behave
    collect(endpoint, questions, tmp_path / "a.jsonl")
    written = replies(tmp_path / "a.jsonl")
    assert written[0][0] == "question 1?"
    assert len(written) == 24


def test_the_address_may_come_from_the_environment(endpoint, questions, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_BASE_URL", endpoint.url)
    call_script(SCRIPT, questions, tmp_path / "a.jsonl", "--model", "big")
    assert len(replies(tmp_path / "a.jsonl")) == 24


def test_the_same_question_twice_gets_two_answers(endpoint, tmp_path):
    questions = write_jsonl(tmp_path / "q.jsonl", [{"question": "hi"}, {"question": "ho"}, {"question": "hi"}])
    endpoint.behave = lambda question, times: (200, completion(f"{question} {times}"))
    collect(endpoint, questions, tmp_path / "a.jsonl", "--concurrency", "1")
    assert replies(tmp_path / "a.jsonl") == [("hi", "hi 0"), ("ho", "ho 0"), ("hi", "hi 1")]


def test_thinking_is_kept_in_tags(endpoint, tmp_path, capsys):
    questions = write_jsonl(tmp_path / "q.jsonl", [{"question": f"{n}"} for n in range(4)])
    tagged = "<think>\nalready\n</think>\n<answer>\nthere\n</answer>"
    said = [
        completion("\n42 ", reasoning_content=" six\ntimes seven\n"),
        completion(tagged),
        completion("no thought"),
        completion("x", reasoning_content="a </think> b"),
    ]
    endpoint.behave = lambda question, times: (200, said[int(question)])
    collect(endpoint, questions, tmp_path / "a.jsonl", "--thinking", exit_code=2)
    answer = "<think>\nsix\ntimes seven\n</think>\n<answer>\n42\n</answer>"
    assert replies(tmp_path / "a.jsonl") == [("0", answer), ("1", tagged)]
    errors = capsys.readouterr().err
    assert "it has no reasoning_content" in errors
    assert "the thought already contains the tag </think>" in errors


def test_ctrl_c_loses_no_answer(endpoint, questions, tmp_path):
    """In its own process. Requests under way are finished; the rest is left to the next run."""
    release = threading.Event()
    endpoint.behave = lambda question, times: None if question < "question 2" else release.wait(PATIENCE) and None
    out = tmp_path / "a.jsonl"
    command = [
        sys.executable,
        SCRIPT,
        questions,
        out,
        "--base_url",
        endpoint.url,
        "--model",
        "big",
        "--concurrency",
        "3",
    ]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        while endpoint.open < 3 or sum(endpoint.times.values()) < 5:
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        assert "finishing the requests in progress" in process.stderr.readline()
        release.set()
        assert process.wait(PATIENCE) == 130
    asked = [body["messages"][-1]["content"] for body in endpoint.asked]
    assert len(asked) < 24
    assert sorted(question for question, _ in replies(out)) == sorted(asked)
    collect(endpoint, questions, out)
    assert [question for question, _ in replies(out)] == [f"question {n}?" for n in range(24)]
    assert set(endpoint.times.values()) == {1}


def test_it_gives_up_where_asking_on_is_useless(endpoint, questions, tmp_path, capsys):
    endpoint.behave = lambda question, times: (401, {"error": {"message": "wrong key"}})
    collect(endpoint, questions, tmp_path / "a.jsonl", "--concurrency", "1", exit_code=2)
    assert len(endpoint.asked) == 1
    assert "wrong key" in capsys.readouterr().err
    endpoint.behave = lambda question, times: (500, {"error": {"message": "broken"}})
    collect(endpoint, questions, tmp_path / "a.jsonl", "--concurrency", "1", "--retries", "0", exit_code=2)
    assert len(endpoint.asked) == 1 + 10
    endpoint.server_close()
    endpoint.shutdown()
    collect(endpoint, questions, tmp_path / "a.jsonl", "--retries", "0", exit_code=2)
    assert "run the same command to continue" in capsys.readouterr().err


def test_nobody_elses_file_is_touched(endpoint, questions, tmp_path, capsys):
    out = tmp_path / "a.jsonl"
    collect(endpoint, questions, out)
    mine = out.read_bytes()
    foreign = [
        b'{"conversations": [{"content": "x"}, {"content": "y"}], "model": "big", "thinking": false}\n',
        b'{"text": "a novel"}\n',
        b'{"conversations": [{"role": "us',
        b"[]\n",
        mine.splitlines(keepends=True)[0],  # one more answer than there are questions
    ]
    for line in foreign:
        out.write_bytes(mine + line)
        collect(endpoint, questions, out, exit_code=2)
        assert (
            "line 25 is not an answer by big to one of these questions: nothing was changed" in capsys.readouterr().err
        )
        assert out.read_bytes() == mine + line
    out.write_bytes(mine)
    collect(endpoint, questions, out, "--model", "other", exit_code=2)
    assert "line 1 is not an answer by other" in capsys.readouterr().err
    collect(endpoint, questions, out, "--thinking", exit_code=2)
    assert "and the --model, --system, --thinking it was made with" in capsys.readouterr().err
    assert out.read_bytes() == mine


def test_a_place_that_cannot_be_written_and_an_address_that_is_none(endpoint, questions, tmp_path, capsys):
    (tmp_path / "file").touch()
    for out, flags, told in (
        (tmp_path, (), "cannot write"),
        (tmp_path / "file" / "a.jsonl", (), "cannot write"),
        (tmp_path / "a.jsonl", ("--base_url", "http://[::1"), "not an API base URL"),
        (tmp_path / "a.jsonl", ("--base_url", "localhost:1"), "not an API base URL"),
    ):
        collect(endpoint, questions, out, *flags, exit_code=2)
        assert told in capsys.readouterr().err
    assert not (tmp_path / "a.jsonl").exists()


def test_an_endpoint_that_sends_something_else_is_told(questions, tmp_path, capsys):
    with http_server(b"<html>Welcome</html>", "text/html") as address:
        call_script(SCRIPT, questions, tmp_path / "a.jsonl", "--base_url", address, "--model", "big", exit_code=2)
    assert "does its address end in /v1?" in capsys.readouterr().err


def test_a_bad_line_stops_before_the_first_question(endpoint, tmp_path, capsys):
    questions = tmp_path / "q.jsonl"
    questions.write_text('{"question": "good"}\n{"query": "what"}\n{"question": " "}\n', encoding="utf-8")
    collect(endpoint, questions, tmp_path / "a.jsonl", exit_code=2)
    assert 'line 2: it has neither "question" nor "conversations"' in capsys.readouterr().err
    assert endpoint.asked == []
    assert not (tmp_path / "a.jsonl").exists()
    collect(endpoint, questions, tmp_path / "a.jsonl", "--skip_bad_lines")
    assert replies(tmp_path / "a.jsonl") == [("good", "about good")]


def test_a_full_disk_leaves_the_file_as_it_was(endpoint, questions, tmp_path, capsys, monkeypatch):
    from scripts.collect_teacher_answers import AnswerFile, chat_key
    from trainer.errors import UserError

    chat = [{"role": "user", "content": "hi"}]
    answers = AnswerFile(tmp_path / "a.jsonl", {"model": "big"}, Counter([chat_key(chat)] * 2))
    answers.add(chat, "one")
    before = (tmp_path / "a.jsonl").read_bytes()

    class HalfFull:
        fileno = answers._file.fileno

        def write(self, line):
            (tmp_path / "a.jsonl").write_bytes(before + line[:5])
            return 5

        def truncate(self, size):
            os.truncate(tmp_path / "a.jsonl", size)

    monkeypatch.setattr(answers, "_file", HalfFull())
    with pytest.raises(UserError, match="no space left"):
        answers.add(chat, "two")
    assert (tmp_path / "a.jsonl").read_bytes() == before


MADE_BY = {"model": "m", "thinking": False}


def test_two_runs_do_not_write_to_one_file(tmp_path):
    """Under whatever name they open it."""
    first = AnswerFile(tmp_path / "a.jsonl", MADE_BY, Counter())
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "a.jsonl")
    for name in ("a.jsonl", "link.jsonl"):
        with pytest.raises(UserError, match=f"{name}: another run is writing to it"):
            AnswerFile(tmp_path / name, MADE_BY, Counter())
    AnswerFile(tmp_path / "b.jsonl", MADE_BY, Counter())
    del first
    gc.collect()
    AnswerFile(tmp_path / "a.jsonl", MADE_BY, Counter())


@pytest.mark.parametrize("error", [OSError(37, "No locks available"), NotImplementedError("no flock")])
def test_a_file_system_without_locks_is_written_to(tmp_path, monkeypatch, error):
    def acquire(*_, **__):
        raise error

    monkeypatch.setattr("dataset.locks.lock_descriptor", acquire)
    chat = [{"role": "user", "content": "x"}]
    answers = AnswerFile(tmp_path / "a.jsonl", MADE_BY, Counter([chat_key(chat)]))
    answers.add(chat, "y")
    answers.sort(iter([chat]))
    assert json.loads((tmp_path / "a.jsonl").read_text(encoding="utf-8"))["conversations"][1]["content"] == "y"
