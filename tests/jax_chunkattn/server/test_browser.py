"""The page in a browser: it draws the tree, and two chats beside each other share."""

from __future__ import annotations

import re
import shutil

import pytest

from tests.jax_chunkattn.server.endpoints import Running, opened

sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright, from PyPI")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium on the path"),
]


def test_the_page_draws_the_tree_and_two_chats_share(tiny: Running):
    common = list(range(64))
    connections = [opened(tiny, prompt=[*common, at], max_tokens=900) for at in range(3)]
    with sync_api.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page()
        problems: list[str] = []
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda said: said.type == "error" and problems.append(said.text))
        page.goto(tiny.url)
        page.wait_for_selector("#tree svg rect", timeout=60_000)
        assert page.inner_text("#model") == "tiny"
        for connection in connections:
            connection.close()
        assert "tokens a second" in page.inner_text("#numbers")

        told = []
        for at in range(2):
            chat = page.locator(".chat").nth(at)
            chat.locator("input").fill("What is it?")
            chat.locator("button").click()
            said = chat.locator(".told", has_text=re.compile("cached|error"))
            said.wait_for(timeout=60_000)
            told.append(said.inner_text())
            assert chat.locator("li.assistant").inner_text()
        page.wait_for_selector('#tree rect[data-users="0"]', state="attached")
        assert page.inner_text("#state") == "live"
        browser.close()
    assert problems == []
    assert told[0].startswith("0 of ")
    cached = [int(words.split()[0]) for words in told]
    assert cached[1] > 300  # all but the last of a system prompt and a question
