"""How scripts end: one line and exit code 2 for what the user can mend, a traceback for what is a bug."""

import os
import signal
import sys
import time

import pytest
import torch

from dataset import DataError
from trainer.errors import UserError, launch


def ending(error: BaseException, capsys) -> tuple[int, str]:
    def main():
        raise error

    with pytest.raises(SystemExit) as end:
        launch(main)
    return end.value.code, capsys.readouterr().err


@pytest.mark.parametrize("error", [UserError("the flag\nis wrong"), DataError("the flag is  wrong")])
def test_what_the_user_can_mend_is_one_line(error, capsys):
    assert ending(error, capsys) == (2, "error: the flag is wrong\n")


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
    ],
)
def test_out_of_memory_says_what_needs_less(error, capsys):
    code, said = ending(error, capsys)
    assert code == 2
    assert "--batch_size" in said


def test_a_lost_worker_says_what_needs_less(capsys):
    class Dies(torch.utils.data.Dataset):
        def __len__(self):
            return 8

        def __getitem__(self, number):
            os.kill(os.getpid(), signal.SIGKILL)  # as the kernel does when memory runs out

    def main():
        list(torch.utils.data.DataLoader(Dies(), num_workers=1, multiprocessing_context="fork"))

    with pytest.raises(SystemExit) as end:
        launch(main)
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("error: a process of --num_workers has ended (DataLoader worker (pid")
    assert "--num_workers 0" in said


def test_pytorch_still_words_it_like_that():
    with pytest.raises(RuntimeError, match="DefaultCPUAllocator: can't allocate memory"):
        torch.empty(1 << 60, dtype=torch.uint8)


def test_a_bug_keeps_its_traceback():
    def main():
        raise KeyError("a bug")

    with pytest.raises(KeyError):
        launch(main)


def test_ctrl_c_is_no_traceback(capsys):
    assert ending(KeyboardInterrupt(), capsys) == (130, "")


def test_of_several_ranks_the_one_that_knows_speaks_first(monkeypatch, capsys):
    waited = []
    monkeypatch.setattr(time, "sleep", waited.append)
    monkeypatch.setenv("WORLD_SIZE", "2")
    lost = RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:4831.")
    for rank, error in (("0", UserError("x")), ("1", UserError("y")), ("2", lost), ("0", KeyError("a bug"))):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises((SystemExit, KeyError)):
            launch(lambda error=error: (_ for _ in ()).throw(error))
    assert waited == [0, 3, 6, 6]
    assert capsys.readouterr().err == "error: x\nerror: y\nrank 2 ends, as another rank has ended\n"


def test_a_stream_that_cannot_show_a_character(monkeypatch, capfd):
    monkeypatch.setattr(sys, "stdout", open(1, "w", encoding="ascii", closefd=False))  # noqa: SIM115
    launch(lambda: print("水 water"))
    assert capfd.readouterr().out == "? water\n"
