"""The whole way in minutes: demo data, pretraining, fine-tuning, an examination. `make demo` runs it.

Everything lies in dataset/demo/ and out/demo/; what is there from an earlier call is used again, and an interrupted
training goes on where it stopped.
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
