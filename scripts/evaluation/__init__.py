"""Behind scripts/eval_benchmarks.py: evaluation with EleutherAI's harness and our own engine."""

import importlib.util
import logging

from trainer.errors import UserError


def require_harness() -> None:
    """Require lm_eval before the modules here, which need it, are imported; silence its log of prompts and samplers.

    Raises:
        UserError: it is not installed.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("lm_eval, the harness, is not installed: python -m pip install -r requirements-eval.txt")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
