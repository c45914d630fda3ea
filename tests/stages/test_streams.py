"""--stream, run for real: the same numbers for any location of the data, number of workers, and after a stop."""

import fsspec
import numpy as np
import pytest

from tests.conftest import SENTENCES, write_jsonl
from tests.running import call_script, one_error_line
from tests.stages.test_resume import assert_equal
from tests.stages.training import about, losses, weights

STREAM = ("--stream", "--stream_buffer", "4KiB", "--max_steps", "6", "--batch_size", "2")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """10 blocks of 4 KiB, and as many windows of rows."""
    texts = [f"{n}. {SENTENCES[n % 8]} {SENTENCES[n % 5]}"[: 60 + n % 60] for n in range(320)]
    path = write_jsonl(tmp_path_factory.mktemp("data") / "texts.jsonl", [{"text": text} for text in texts])
    assert 9 * 4096 < path.stat().st_size <= 10 * 4096
    return path


@pytest.fixture(scope="module")
def whole(pretrain, data, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    pretrain(out, *STREAM, "--accumulation_steps", "2", "--data_path", data, by=call_script)
    return out


def test_it_goes_on_where_it_stopped(pretrain, data, whole, tmp_path):
    """Resumed with workers, although it was started without."""
    flags = (*STREAM, "--accumulation_steps", "2", "--data_path", data)
    pretrain.interrupted(tmp_path, "SIGTERM", "log", 3, *flags, exit_code=143)
    stopped = about(tmp_path)["step"]
    assert 3 <= stopped < 6
    done = pretrain(tmp_path, *flags, "--resume", "--num_workers", "2")
    assert f"resumed at step {stopped}" in done.stdout
    assert_equal(weights(tmp_path), weights(whole))
    assert losses(tmp_path) == losses(whole)


def test_two_ranks_take_the_steps_of_one(pretrain, data, whole, tmp_path):
    done = pretrain(tmp_path, *STREAM, "--data_path", data, "--eval_interval", "6", "--eval_path", data, processes=2)
    assert "DDP on 2 processes" in done.stdout
    assert losses(tmp_path) == pytest.approx(losses(whole), abs=1e-4)


def test_from_an_address(pretrain, data, whole, tmp_path):
    fsspec.filesystem("memory").pipe("/far/texts.jsonl", data.read_bytes())
    flags = (*STREAM, "--accumulation_steps", "2", "--data_path", "memory://far/texts.jsonl")
    pretrain(tmp_path, *flags, by=call_script)
    assert_equal(weights(tmp_path), weights(whole))


def test_sft_streams_too(sft, tmp_path, capsys):
    sft(tmp_path, "--stream", "--max_steps", "2", by=call_script)
    assert "streamed from 1 file" in capsys.readouterr().out
    assert len(losses(tmp_path, "full_sft_32")) == 2


@pytest.fixture
def spoilt(data, tmp_path):
    """A line that is not JSON, in the block that is read last: (file, line number)."""
    last = int(np.random.default_rng((42, 0)).permutation(10)[-1])
    content = data.read_bytes()
    number = content[: last * 4096 + 1500].count(b"\n") + 1
    lines = content.split(b"\n")
    lines[number - 1] = b"oh!" + lines[number - 1][3:]
    path = tmp_path / "spoilt.jsonl"
    path.write_bytes(b"\n".join(lines))
    return path, number


def test_a_bad_line_saves_and_ends(pretrain, spoilt, tmp_path):
    path, number = spoilt
    flags = (*STREAM, "--data_path", path, "--max_steps", "500", "--batch_size", "16")
    done = pretrain(tmp_path / "out", *flags, exit_code=2)
    assert f"{path}, line {number}: not valid JSON" in one_error_line(done)
    learned = about(tmp_path / "out")["step"]
    assert learned == len(losses(tmp_path / "out")) > 5
    line = one_error_line(pretrain(tmp_path / "out", *flags, "--resume", exit_code=2))
    assert f"line {number}" in line
    assert about(tmp_path / "out")["step"] == learned
    done = pretrain(tmp_path / "out", *flags, "--resume", "--skip_bad_lines", "--max_steps", str(learned + 3))
    assert about(tmp_path / "out")["step"] == learned + 3
    assert f"bad lines skipped, the first: {path}, line {number}" in done.stdout


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("--max_steps", "0"), "--stream needs --max_steps"),
        (("--epochs", "2"), "leave out --epochs"),
        (("--mix", "a.jsonl:1"), "leave out --mix"),
        (("--data_path", "nosuch://a"), "Protocol not known"),
    ],
)
def test_what_a_stream_cannot_do(pretrain, tmp_path, capsys, flags, told):
    pretrain(tmp_path, *STREAM, *flags, by=call_script, exit_code=2)
    assert told in capsys.readouterr().err
