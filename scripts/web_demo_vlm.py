"""Chat about pictures in the browser, with a vision-language model from `out/` or one behind an OpenAI-compatible API.

streamlit run scripts/web_demo_vlm.py                      or, in scripts/: streamlit run web_demo_vlm.py
streamlit run scripts/web_demo_vlm.py -- --out_dir out/demo --vision_model FOLDER
"""

import _repo  # noqa: F401  (lets Streamlit find the packages)

from trainer.errors import run_main


def main():
    from scripts.serving.page import page

    page(vision=True)


if __name__ == "__main__":
    run_main(main)
