"""The pages in docs/ show commands that exist, alike in both languages."""

import re

import pytest

from tests.running import ROOT, run_script
from tests.test_readme import commands, script_of

PAGE, PAGE_ZH = "docs/coming_from_minimind2.md", "docs/coming_from_minimind2_zh.md"
ALL = commands(PAGE)


def test_both_languages_show_the_same_commands():
    assert commands(PAGE_ZH) == ALL


@pytest.mark.parametrize("script", sorted({script_of(command) for command in ALL}))
def test_every_command_is_one_and_knows_the_flags_shown(script):
    for command in ALL:
        if script_of(command) == script:
            words = command[command.index(script) + 1 :]
            sub = [word for word in words[:1] if word.startswith(("to-", "from-", "merge-"))]
            known = set(re.findall(r"--[\w-]+", run_script(script, *sub, "--help").stdout))
            assert {word for word in words if word.startswith("--")} <= known


def test_every_file_linked_is_there():
    for page in (PAGE, PAGE_ZH):
        for link in re.findall(r"\]\(([^)#]+)\)", (ROOT / page).read_text(encoding="utf-8")):
            assert (ROOT / "docs" / link).exists(), f"{page} links to {link}"
