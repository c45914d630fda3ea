"""How good a model is: what stands behind scripts/eval_benchmarks.py, on EleutherAI's harness and our own engine."""

import importlib.util
import logging

from trainer.errors import UserError


def require_harness() -> None:
    """Before anything here is imported, which needs it; and keep it from reporting each prompt and sampler.

    Raises:
        UserError: it is not installed.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("lm_eval, the harness, is not installed: python -m pip install -r requirements-eval.txt")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
