"""Runs a script and sends it a signal at an exact point, so that every machine behaves the same. Of two ranks the
second one is struck, or the one that STRUCK_RANK in the environment names.

crash_points.py SIGTERM log 3 train_pretrain.py …       the signal comes while step 3 is logged
crash_points.py SIGINT evaluate 1 train_pretrain.py …   it comes as the first evaluation begins
crash_points.py SIGINT save 2 train_pretrain.py …       it comes as the second save begins
crash_points.py SIGINT close 1 train_pretrain.py …      it comes when all is saved, before the curve is drawn
crash_points.py SIGKILL file 4 train_pretrain.py …      it comes before the 4th renaming or deletion of the second save
crash_points.py SIGSTOP log 3 train_pretrain.py …       the process is halted there: it neither continues nor ends
crash_points.py SIGALRM log 3 train_pretrain.py …       the main thread hangs there for ever; other threads continue
crash_points.py SIGXFSZ size 9999 train_pretrain.py …   it is ignored when a file would grow beyond this many bytes:
                                                       the write fails, as on a full disk
"""

import os
import resource
import runpy
import shutil
import signal
import sys
import time
from pathlib import Path

import trainer.evaluation
import trainer.watchdog
from trainer.checkpoint import Checkpoint
from trainer.metrics import Metrics


def strike(number: signal.Signals) -> None:
    if is_struck():
        os.kill(os.getpid(), number)


def is_struck() -> bool:
    struck = os.environ.get("STRUCK_RANK", "1")
    return os.environ.get("RANK", struck) == struck


def stay(*_) -> None:
    while True:
        time.sleep(60)


def at_log(number: signal.Signals, step: int) -> None:
    log = Metrics.log

    def watched(self, **values):
        log(self, **values)
        if self.progress.step == step:
            strike(number)

    Metrics.log = watched


def at_call(owner, name: str):
    """Strikes when a function or method is called for the nth time."""

    def arrange(number: signal.Signals, nth: int) -> None:
        function, calls = getattr(owner, name), []

        def watched(*arguments, **settings):
            calls.append(None)
            if len(calls) == nth:
                strike(number)
            return function(*arguments, **settings)

        setattr(owner, name, watched)

    return arrange


def at_file(number: signal.Signals, nth: int) -> None:
    write, counts = Checkpoint._write, {"saves": 0, "files": 0}

    def counting(function):
        def counted(*arguments, **settings):
            counts["files"] += counts["saves"] == 2
            if counts["files"] == nth:
                strike(number)
            return function(*arguments, **settings)

        return counted

    def watched(self, *arguments):
        counts["saves"] += 1
        write(self, *arguments)

    Checkpoint._write = watched
    os.replace, shutil.rmtree = counting(os.replace), counting(shutil.rmtree)


def at_size(number: signal.Signals, limit: int) -> None:
    assert signal.getsignal(number) is signal.SIG_IGN  # Python turns it into an OSError
    if is_struck():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))


if __name__ == "__main__":
    _, name, place, nth, script, *arguments = sys.argv
    arrange = {
        **{"log": at_log, "file": at_file, "size": at_size},
        **{"save": at_call(Checkpoint, "save"), "close": at_call(Metrics, "close")},
        "evaluate": at_call(trainer.evaluation, "evaluate"),
    }
    if name == "SIGHUP":
        signal.signal(
            signal.SIGHUP, signal.SIG_DFL
        )  # under nohup the tests' own processes ignore it, and so would this
    signal.signal(signal.SIGALRM, stay)
    trainer.watchdog.SILENT = float(os.environ.get("SILENT", trainer.watchdog.SILENT))
    arrange[place](signal.Signals[name], int(nth))
    script = str(Path(__file__).parents[2] / script)
    sys.argv = [script, *arguments]
    sys.path[0] = str(Path(script).parent)
    runpy.run_path(script, run_name="__main__")
