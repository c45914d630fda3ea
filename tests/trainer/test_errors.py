"""How scripts end: one line and exit code 2 for an error the user can fix, a traceback for a bug."""

import io
import os
import signal
import sys
import time

import pytest
import torch

from dataset import DataError
from trainer import errors
from trainer.errors import UserError, print_notice, run_main, shown


def ending(error: BaseException, capsys) -> tuple[int, str]:
    def main():
        raise error

    with pytest.raises(SystemExit) as end:
        run_main(main)
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
            os.kill(os.getpid(), signal.SIGKILL)  # like the kernel when memory runs out

    def main():
        list(torch.utils.data.DataLoader(Dies(), num_workers=1, multiprocessing_context="fork"))

    with pytest.raises(SystemExit) as end:
        run_main(main)
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("error: a --num_workers process died (DataLoader worker (pid")
    assert "--num_workers 0" in said


def test_pytorch_still_words_it_like_that():
    with pytest.raises(RuntimeError, match="DefaultCPUAllocator: can't allocate memory"):
        torch.empty(1 << 60, dtype=torch.uint8)


def test_a_bug_keeps_its_traceback():
    def main():
        raise KeyError("a bug")

    with pytest.raises(KeyError):
        run_main(main)


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
            run_main(lambda error=error: (_ for _ in ()).throw(error))
    assert waited == [0, 3, 6, 6]
    assert capsys.readouterr().err == "error: x\nerror: y\nrank 2 stops because another rank failed\n"


def test_a_stream_that_cannot_show_a_character(monkeypatch, capfd):
    monkeypatch.setattr(sys, "stdout", open(1, "w", encoding="ascii", closefd=False))  # noqa: SIM115
    run_main(lambda: print("水 water"))
    assert capfd.readouterr().out == "? water\n"


def test_of_several_ranks_the_first_alone_notes(monkeypatch, capsys):
    for rank in ("0", "1", "2"):
        monkeypatch.setenv("RANK", rank)
        print_notice(f"from {rank}")
        print_notice(f"of {rank}", every_rank=True)
    assert capsys.readouterr().err.splitlines() == ["from 0", "of 0", "of 1", "of 2"]


def test_a_package_that_is_missing_is_named(capsys):
    def main():
        import no_such_package_as_this.at_all  # noqa: F401

    with pytest.raises(SystemExit) as end:
        run_main(main)
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: no_such_package_as_this is not installed for {sys.executable}: ")


@pytest.mark.parametrize("error", [ModuleNotFoundError("no", name="torch.gone"), ModuleNotFoundError("no")])
def test_a_part_of_a_package_that_is_missing_is_a_bug(error):
    with pytest.raises(ModuleNotFoundError):
        run_main(lambda: (_ for _ in ()).throw(error))


def test_a_reader_that_has_enough_is_no_error(monkeypatch, tmp_path):
    """With `| head` the exit code is 141, as in a shell, also on systems without SIGPIPE."""
    monkeypatch.setattr(sys, "stdout", open(tmp_path / "out", "w", encoding="utf-8"))  # noqa: SIM115
    monkeypatch.delattr(errors.signal, "SIGPIPE")
    with pytest.raises(SystemExit) as end:
        run_main(lambda: (_ for _ in ()).throw(BrokenPipeError()))
    assert end.value.code == 141


def test_streams_that_are_closed(monkeypatch):
    for name in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    run_main(lambda: (print("x"), print_notice("y"), sys.stdin.read()))


def test_on_windows_pipes_and_files_are_utf8(monkeypatch):
    """There a code page without Chinese would be used."""
    raw = {name: io.BytesIO("你好".encode() if name == "stdin" else b"") for name in ("stdin", "stdout", "stderr")}
    for name, stream in raw.items():
        monkeypatch.setattr(sys, name, io.TextIOWrapper(stream, encoding="cp1252", errors="strict"))
    monkeypatch.setattr(sys, "platform", "win32")
    run_main(lambda: (print(sys.stdin.read()), print_notice("水"), sys.stdout.flush()))
    assert raw["stdout"].getvalue().decode().strip() == "你好"
    assert raw["stderr"].getvalue().decode().strip() == "水"


def test_a_name_that_is_not_utf8_can_be_shown(capsys):
    name = b"a\xff\xe6\xb0\xb4.jsonl".decode("utf-8", "surrogateescape")
    assert shown(name) == "a\\udcff水.jsonl"
    assert shown("水") == "水"
    print_notice(f"error in {name}")
    assert capsys.readouterr().err == "error in a\\udcff水.jsonl\n"
    assert ending(UserError(f"{name} is missing"), capsys) == (2, "error: a\\udcff水.jsonl is missing\n")
