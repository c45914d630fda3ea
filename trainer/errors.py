"""How a script ends when the user can mend what is wrong: one line that says what to do, exit code 2, no traceback."""

import os
import sys
from collections.abc import Callable


class UserError(Exception):
    """Something the user can mend; the message says what is wrong and what to do, in one line."""


def launch(main: Callable[[], None]) -> None:
    """Run a script's `main`; a UserError or DataError becomes one line on stderr and exit code 2.

    Under torchrun every rank meets the same error; only the first one prints it.
    """
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        from dataset.jsonl import DataError  # here, since it brings torch, for which --help need not wait

        if not isinstance(error, UserError | DataError):
            raise
        if os.environ.get("RANK", "0") == "0":
            print("error: " + " ".join(str(error).split()), file=sys.stderr, flush=True)
        sys.exit(2)
