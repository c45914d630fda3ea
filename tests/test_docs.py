"""The README and docs/ are up to date: their commands exist, accept the flags shown, and run."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from tests.conftest import write_jsonl
from tests.running import ROOT, TINY, TINY_TRAINING, run_script

# in the order in which their commands are run: a page may need weights that an earlier one has trained
PAGES = (
    *(
        "README",
        "dataset/README",
        "docs/data",
        "docs/training",
        "docs/lose_nothing",
        "docs/reasoning_and_preferences",
        "docs/reinforcement_learning",
        "docs/vision",
        "docs/results",
        "docs/serving",
        "docs/quantization",
        "docs/memory",
    ),
    *("docs/scaling", "docs/windows", "docs/tools", "docs/architectures"),
    *("docs/benchmarks", "docs/formats", "docs/generations", "docs/coming_from_minimind2", "docs/troubleshooting"),
    "docs/glossary",
)
DATA_OF = {
    "train_pretrain.py": "pretrain_hq.jsonl",
    "train_full_sft.py": "sft_mini_512.jsonl",
    "train_lora.py": "sft_mini_512.jsonl",
    "train_distillation.py": "sft_mini_512.jsonl",
    "train_dpo.py": "dpo.jsonl",
    "train_distill_reason.py": "r1_mix_1024.jsonl",
    "train_grpo.py": "rl_math.jsonl",
    "train_reward.py": "dpo.jsonl",
    "train_ppo.py": "rl_math.jsonl",
    "train_pretrain_vlm.py": "vlm.jsonl",
    "train_sft_vlm.py": "vlm.jsonl",
}


def commands(page: str) -> list[list[str]]:
    """The commands in a page's bash blocks: continued lines joined, split into words, without VARIABLE=value."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    split = [shlex.split(line, comments=True) for line in lines if line.strip() and not line.startswith("#")]
    return [[word for i, word in enumerate(words) if i or "=" not in word] for words in split]


def script_of(command: list[str]) -> str | None:
    """The script that a command runs, as a path: `benchmarks/x.py` for `python -m benchmarks.x`."""
    if command[:2] == ["python", "-m"] and command[2].startswith("benchmarks."):
        return f"{command[2].replace('.', '/')}.py"
    return next((word for word in command if word.endswith(".py")), None)


def flags_after_script(command: list[str]) -> list[str]:
    at = next(i for i, word in enumerate(command) if word.endswith(".py") or word.startswith("benchmarks."))
    return command[at + 1 :]


ALL = [command for page in PAGES for command in commands(f"{page}.md")]
FORMS = sorted(  # each script, or each sub-command of one
    {
        (script, next((word for word in flags_after_script(command)[:1] if script.endswith("convert_model.py")), ""))
        for command in ALL
        if (script := script_of(command)) and command[0] != "streamlit"
    }
)


def test_every_page_is_listed_here():
    there = {path.relative_to(ROOT).with_suffix("").as_posix() for path in (ROOT / "docs").glob("*.md")}
    assert there == {f"{page}{ending}" for page in PAGES if page.startswith("docs/") for ending in ("", "_zh")}


@pytest.mark.parametrize("page", PAGES)
def test_both_languages_show_the_same_commands_and_sections(page):
    def shape(text: str) -> list[str]:
        return [re.match("#+", line)[0] for line in text.splitlines() if re.match("#+ ", line)]

    english, chinese = ((ROOT / f"{page}{ending}.md").read_text(encoding="utf-8") for ending in ("", "_zh"))
    assert commands(f"{page}.md") == commands(f"{page}_zh.md")
    assert shape(re.sub(r"```.*?```", "", english, flags=re.DOTALL)) == shape(
        re.sub(r"```.*?```", "", chinese, flags=re.DOTALL)
    )


@pytest.mark.parametrize("readme", ["README.md", "README_zh.md"])
def test_the_first_page_is_one(readme):
    assert len((ROOT / readme).read_text(encoding="utf-8").splitlines()) <= 200


def test_every_make_target_exists():
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    shown = [command[1] for command in (*ALL, *commands("CONTRIBUTING.md")) if command[0] == "make"]
    assert shown
    assert set(shown) <= set(targets)


@pytest.mark.parametrize(("script", "sub"), FORMS, ids=lambda value: str(value))
def test_every_script_exists_and_knows_the_flags_shown(script, sub):
    shown = {
        word.split("=")[0]
        for command in ALL
        if script_of(command) == script and (not sub or sub in command)
        for word in flags_after_script(command)
        if word.startswith("--")
    }
    assert shown <= set(re.findall(r"--[\w-]+", help_of(script, *filter(None, [sub]))))


def help_of(script: str, *words: str) -> str:
    if not script.startswith("benchmarks/"):
        return run_script(script, *words, "--help").stdout
    module = script.removesuffix(".py").replace("/", ".")
    return run_script("tests/as_module.py", module, *words, "--help").stdout


def test_a_teacher_is_made_before_it_teaches():
    made = set()
    for command in ALL:
        if script_of(command) == "train_full_sft.py" and "--dim" in command:
            made.add(f"full_sft_{command[command.index('--dim') + 1]}")
        if "--teacher_weight" in command:
            assert command[command.index("--teacher_weight") + 1] in made


@pytest.mark.parametrize(
    "page", [f"{page}{ending}.md" for page in PAGES for ending in ("", "_zh")] + ["CONTRIBUTING.md"]
)
def test_every_file_and_section_linked_is_there(page):
    for link in re.findall(r"\]\(([^)]+)\)", (ROOT / page).read_text(encoding="utf-8")):
        if link.startswith("http"):
            continue
        name, _, section = link.partition("#")
        target = (ROOT / page).parent / name if name else ROOT / page
        assert target.exists(), f"{page} links to {link}"
        if section:
            headings = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), flags=re.MULTILINE)
            assert section in {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}, link


@pytest.fixture(scope="module")
def every_data(tiny_data, tmp_path_factory) -> Path:
    """`tiny_data` with pairs, reasoning and images added."""
    folder = shutil.copytree(tiny_data, tmp_path_factory.mktemp("readme") / "data")
    asked = [[{"role": "user", "content": f"How much is {n} and {n}?"}] for n in range(16)]
    pairs = [{"chosen": [*q, said(f"It is {2 * n}.")], "rejected": [*q, said("No.")]} for n, q in enumerate(asked)]
    write_jsonl(folder / "dpo.jsonl", pairs)
    problems = [{"question": q["content"], "answer": 2 * n} for n, (q,) in enumerate(asked)]
    write_jsonl(folder / "rl_math.jsonl", problems)
    thought = "<think>\nTwice {n}.\n</think>\n<answer>\n{m}\n</answer>"
    chats = [{"conversations": [*q, said(thought.format(n=n, m=2 * n))]} for n, q in enumerate(asked)]
    write_jsonl(folder / "r1_mix_1024.jsonl", chats)
    Image.new("RGB", (40, 32), "red").save(folder / "red.png")
    shown = {"image": "red.png", "conversations": [{"role": "user", "content": "<image>\nWhat?"}, said("Red.")]}
    write_jsonl(folder / "vlm.jsonl", [shown] * 16)
    return folder


def mixed(flags: list[str], data: Path) -> list[str]:
    """The flags with the files of --mix replaced by `data` and a copy of it."""
    copy = data.with_name(f"copy_{data.name}")
    files = iter([shutil.copy(data, copy), data])
    return [
        f"{next(files)}:{flag.rsplit(':', 1)[1]}" if re.fullmatch(r".*\.jsonl:[\d.]+", flag) else flag for flag in flags
    ]


def said(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def test_the_commands_run_shrunken(every_data, tokenizer_dir, clip_dir, tmp_path):
    """Each (script, launcher, kind of model) once, in the pages' order, using the results of earlier commands."""
    common = ("--tokenizer", tokenizer_dir, "--out_dir", tmp_path)
    seen = set()
    for command in ALL:
        script = script_of(command)
        flags = flags_after_script(command) if script else []
        if script == "eval_model.py" and "--prompt" in flags:
            shown = run_script(script, *flags, *TINY, *common, "--max_new_tokens", "8")
            assert f"> {flags[flags.index('--prompt') + 1]}" in shown.stdout
        form = (script, command[0], *(flag in flags for flag in ("--use_moe", "--deepspeed", "--mix", "--from_weight")))
        if script not in DATA_OF or "--nnodes" in command or command[0] == "deepspeed" or form in seen:
            continue  # there is only one machine here; the deepspeed launcher has its own test
        seen.add(form)
        shrunken = [*TINY_TRAINING, "--max_seq_len", "128", "--max_steps", "2", "--overwrite"]
        if script == "train_distillation.py":
            shrunken += ["--teacher_weight", "full_sft_32"]
        if script in ("train_grpo.py", "train_ppo.py"):
            shrunken += ["--max_new_tokens", "8"]
        if script.endswith("_vlm.py"):
            shrunken += ["--images_path", every_data, "--vision_model", clip_dir]
        data = every_data / DATA_OF[script]
        flags = [re.sub(r"out/(\w+)_512\.pth", r"\1", flag) for flag in mixed(flags, data)]
        run_script(
            script, *flags, *common, *shrunken, "--data_path", data, processes=2 if command[0] == "torchrun" else 1
        )
    assert {script for script, *_ in seen} == set(DATA_OF)


def test_help_names_what_each_script_is_for():
    for script in {script for script, _ in FORMS}:
        source = (ROOT / script).read_text(encoding="utf-8")
        assert re.match(r'r?"""', source), f"{script} begins with no docstring"


def test_the_packages_import_without_the_heavy_packages():
    code = "import sys, model, dataset, trainer.runtime, trainer.weights; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert not {"deepspeed", "wandb", "swanlab", "tensorboard", "streamlit", "trl", "peft"} & set(loaded.split())
