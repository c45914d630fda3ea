"""Chat with a model in the browser: one from `out/`, or one behind any OpenAI-compatible address.

streamlit run scripts/web_demo.py                          or, in scripts/: streamlit run web_demo.py
streamlit run scripts/web_demo.py -- --out_dir out/demo    options of the page follow the two dashes (--help lists them)
"""

import _repo  # noqa: F401  (lets Streamlit find the packages)

from trainer.errors import run_main


def main():
    from scripts.serving.page import page

    page()


if __name__ == "__main__":
    run_main(main)
