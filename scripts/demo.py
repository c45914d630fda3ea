"""The whole pipeline in minutes: demo data, pretraining, fine-tuning, a test. `make demo` runs it.

Everything is in dataset/demo/ and out/demo/; results of an earlier call are reused, and interrupted training
continues where it stopped.
"""

import _own_python  # noqa: F401  (makes .venv where packages are missing, and goes on there)
import _repo  # noqa: F401  (lets `python scripts/demo.py` find the packages)

from scripts.demo.first_model import run_demo
from scripts.demo.settings import OUT
from scripts.report_card.making import make_report
from trainer.arguments import Parser
from trainer.errors import run_main


def main():
    Parser(__doc__).parse_args()
    run_demo()
    print(f"report:      {make_report(OUT)}")


if __name__ == "__main__":
    run_main(main)
