"""A process that has imported what the scripts import, and forks a copy of itself for each script that a test runs.

Importing torch and transformers takes seconds, more than most tiny runs. A forked copy has already imported them; apart
from that it is a separate process, with its own arguments, environment, signals, terminal and exit code. The server
computes nothing, so that no thread is running when it forks.

Reads one JSON request per line, {"start": {…}} or {"poll": pid}, and writes a JSON reply; the client is
`tests/running.py`.
"""

import atexit
import gc
import io
import json
import os
import runpy
import signal
import sys
import threading
import traceback
from pathlib import Path

import matplotlib.figure  # noqa: F401
import torch
import torch._dynamo
import transformers

import trainer.evaluation
import trainer.metrics
import trainer.schedule  # noqa: F401
from trainer.weights import SHIPPED_TOKENIZER


def serve() -> dict | None:
    """Answer requests until the input ends; in a forked copy return the request that it is to run."""
    requests, replies = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    for line in requests:
        request = json.loads(line)
        if "start" in request:
            reply = {"pid": os.fork()}
            if reply["pid"] == 0:
                requests.close()
                replies.close()
                return request["start"]
        else:
            pid, status = os.waitpid(request["poll"], os.WNOHANG)
            reply = {"exit_code": os.waitstatus_to_exitcode(status) if pid else None}
        print(json.dumps(reply), file=replies, flush=True)
    return None


def become(script: str, arguments: list[str], env: dict[str, str], cwd: str, stdin: str, out: str, err: str) -> None:
    """Run a script like `python script arguments…`, with these files, or a terminal, as its streams."""
    os.setsid()  # so that a terminal opened now becomes the controlling one
    os.dup2(os.open(stdin, os.O_RDONLY), 0)
    for number, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        stream = io.FileIO(number, "w" if number else "r", closefd=False)
        buffer = io.BufferedWriter(stream) if number else io.BufferedReader(stream)
        setattr(sys, name, io.TextIOWrapper(buffer, "utf-8", line_buffering=number == 2 or os.isatty(number)))
    if os.isatty(0):  # as if started at a terminal, even if the tests run under nohup
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    sys.argv = [script, *arguments]
    sys.path[0] = str(Path(script).parent)
    code = 0
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        code = end.code if isinstance(end.code, int | None) else 1
    except BaseException:
        code = 1
        traceback.print_exc()
    # Like Python's exit, but without destroying a million objects, which takes longer than most of these runs.
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    os._exit(code or 0)


if __name__ == "__main__":
    torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])  # these two import more at first use
    transformers.AutoTokenizer.from_pretrained(str(SHIPPED_TOKENIZER), local_files_only=True)
    gc.freeze()  # so that a forked copy's garbage collection does not copy memory
    if (order := serve()) is not None:
        become(**order)
