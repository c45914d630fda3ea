"""A page in headless Chromium; tests that need it are skipped where it is not installed."""

import contextlib
import os
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.running import PATIENCE, ROOT, free_port

FLAGS = (  # the second line keeps it from contacting its vendor's hosts
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--window-size=1280,860"),
    *("--disable-quic", "--disable-background-networking", "--disable-component-update", "--disable-sync"),
)


@contextlib.contextmanager
def chromium(profile: Path, language: str = "en-US"):
    """A browser with an empty profile."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    binary, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (binary and driver):
        pytest.skip("chromium and chromium-driver are not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for flag in (*FLAGS, f"--user-data-dir={profile}", f"--lang={language}"):
        options.add_argument(flag)
    options.add_experimental_option("prefs", {"intl.accept_languages": language})
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    try:
        yield browser
    finally:
        browser.quit()


@contextlib.contextmanager
def streamlit(script: str, *options, log: Path) -> Iterator[str]:
    """Start a page's server in scripts/, as a user might; yields its address."""
    port = free_port()
    command = [sys.executable, "-m", "streamlit", "run", script, "--server.headless", "true"]
    command += ["--server.port", str(port), "--", *map(str, options)]
    with open(log, "wb") as output:
        server = subprocess.Popen(
            command,
            cwd=ROOT / "scripts",
            stdout=output,
            stderr=output,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
    try:
        wait_for(lambda: _answers(f"http://localhost:{port}/_stcore/health", server, log))
        yield f"http://localhost:{port}"
    finally:
        server.terminate()
        server.wait(PATIENCE)


def _answers(address: str, server: subprocess.Popen, log: Path) -> bool:
    assert server.poll() is None, log.read_text()
    try:
        return urllib.request.urlopen(address, timeout=5).status == 200
    except OSError:
        return False


def wait_for(condition: Callable, seconds: float = PATIENCE):
    """The result of `condition` once it is true.

    Raises:
        AssertionError: it does not become true.
    """
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "it does not happen"
        time.sleep(0.1)
    return found


CLICK_IN_THE_CHAT = """
    const buttons = [...document.querySelectorAll("[data-testid=stChatMessage] button")];
    buttons.filter(button => button.innerText.trim().endsWith(arguments[0])).forEach(button => button.click());
"""


class Page:
    """A chat page as a user operates and sees it."""

    def __init__(self, browser, address: str):
        self.browser = browser
        browser.get(address)
        wait_for(lambda: self.all("[data-testid=stChatInput] textarea:enabled"))

    def all(self, selector: str) -> list:
        return self.browser.find_elements("css selector", selector)

    def say(self, text: str) -> None:
        field = wait_for(lambda: self.all("[data-testid=stChatInput] textarea:enabled"))[0]
        field.send_keys(text)
        wait_for(lambda: self._try_enter())

    def _try_enter(self) -> bool:
        """Press Enter; returns whether the input is empty then: while a file is uploading, it is not sent."""
        from selenium.common.exceptions import WebDriverException

        try:
            field = self.all("[data-testid=stChatInput] textarea")[0]
            if field.get_attribute("value"):
                field.send_keys("\n")
            return not field.get_attribute("value")
        except (WebDriverException, IndexError):  # Streamlit has just drawn it anew
            return False

    def attach(self, file: Path) -> None:
        """Attach a file to the next message, and wait until it is uploaded."""
        self.all("[data-testid=stChatInput] input[type=file]")[0].send_keys(str(file))
        wait_for(lambda: any(file.name in element.text for element in self.all("[data-testid=stChatInput]")))

    def click(self, words: str) -> None:
        """Click the last button, option or heading on the page with this text."""
        wait_for(lambda: self._try_click(words))

    def click_in_the_chat(self, words: str) -> None:
        """Click the button under a message; by script, because a growing answer moves it, and a pointer may hit the
        "Stop" button above the page or the input field below it."""
        self.browser.execute_script(CLICK_IN_THE_CHAT, words)

    def _try_click(self, words: str) -> bool:
        from selenium.common.exceptions import WebDriverException

        try:
            for element in reversed(self.browser.find_elements("xpath", f"//*[normalize-space(text())='{words}']")):
                if element.is_displayed():
                    element.click()
                    return True
        except WebDriverException:  # Streamlit has just drawn it anew, or something passes over it
            pass
        return False

    def messages(self) -> list[str]:
        """The text of each message on the page."""
        script = "return [...document.querySelectorAll('[data-testid=stChatMessage]')].map(e => e.innerText)"
        return self.browser.execute_script(script)

    def wait_to_see(self, text: str, message: int = -1) -> str:
        """Wait until a message contains the text; returns the message."""

        def seen():
            messages = self.messages()
            return messages and -len(messages) <= message < len(messages) and text in messages[message]

        try:
            wait_for(seen)
        except AssertionError:
            raise AssertionError(f"no {text!r} in {self.messages()}") from None
        return self.messages()[message]
