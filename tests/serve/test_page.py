"""The page, in a real browser: two models asked side by side."""

import re
import shutil

import pytest

from jaxhybrid.serve.page import CONTENT_SECURITY_POLICY, PAGE
from jaxhybrid.serve.server import open_server
from tests.serve.conftest import LIMITS, PROMPT, generated, running


def test_the_page_asks_for_nothing_beyond_this_server(served):
    status, headers, text = served.ask("/")
    assert (status, text) == (200, PAGE)
    assert headers["content-type"] == "text/html; charset=utf-8"
    assert headers["content-security-policy"] == CONTENT_SECURITY_POLICY
    assert "default-src 'none'; connect-src 'self'; script-src 'sha256-" in CONTENT_SECURITY_POLICY
    assert not re.search(r"https?:|src=|url\(|@import|innerHTML|<link", PAGE)


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api", reason="the page needs playwright: `uv sync --group browser`")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("the page needs a chromium on the PATH: `apt-get install chromium`")
    with api.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def page(browser):
    """A page whose errors, of the script or by the policy, fail the test."""
    page = browser.new_page()
    said = []
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("console", lambda message: said.append(message.text) if message.type == "error" else None)
    yield page
    page.close()
    assert [text for text in said if not text.startswith("Failed to load resource")] == []


def texts(page, kind):
    return [[one.text_content() for one in pane.locator(f".{kind}").all()] for pane in page.locator(".pane").all()]


def ask(page, prompt, **settings):
    for name, value in settings.items():
        page.fill(f"#{name.replace('_', '-')}", str(value))
    page.fill("#prompt", prompt)
    page.click("#send")
    page.wait_for_selector("#send:enabled")


@pytest.mark.slow
def test_two_models_are_asked_side_by_side(served, page, student, other):
    page.goto(f"http://127.0.0.1:{served.port}/")
    page.wait_for_selector(".pane")
    assert page.locator(".pane h2").all_text_contents() == ["student", "other"]
    ask(page, "anna", max_tokens=12)
    folders = student, other
    first = [generated(folder, "u:anna\na:")[0] for folder in folders]
    assert texts(page, "answer") == [[text] for text in first]
    for pane in page.locator(".speed").all():
        assert re.fullmatch(r"12 tokens, [\d.]+ tokens/s; [\d.]+ s altogether", pane.text_content())
    ask(page, "<b>bert</b>", max_tokens=6)  # each goes on with its own conversation
    second = [
        generated(folder, f"u:anna\na:{text}\nu:<b>bert</b>\na:", tokens=6)[0] for folder, text in zip(folders, first)
    ]
    assert texts(page, "answer") == [list(pair) for pair in zip(first, second)]
    assert texts(page, "asked") == [["anna", "<b>bert</b>"]] * 2
    page.click("#clear")
    assert texts(page, "answer") == [[], []]
    page.select_option("#form-of", "continue")
    ask(page, PROMPT, max_tokens=12)
    assert texts(page, "answer") == [generated(folder, PROMPT) for folder in folders]


@pytest.mark.slow
def test_stopping_frees_the_slots_and_errors_are_shown(served, page, gate):
    page.goto(f"http://127.0.0.1:{served.port}/")
    page.wait_for_selector(".pane")
    gate.clear()
    page.fill("#prompt", "anna")
    page.press("#prompt", "Control+Enter")
    page.wait_for_selector("#stop:enabled")
    page.click("#stop")
    page.wait_for_selector("#send:enabled")
    gate.set()
    assert page.locator(".speed").all_text_contents() == ["stopped"] * 2
    page.select_option("#form-of", "continue")
    page.evaluate("document.getElementById('max-tokens').removeAttribute('max')")
    page.fill("#prompt", PROMPT * 50)
    page.click("#send")
    page.wait_for_selector("#send:enabled")
    assert all("more than the 96 there may be" in text for text in page.locator(".speed").all_text_contents())


@pytest.mark.slow
def test_an_api_key_is_asked_for_and_one_model_without_a_chat_template_goes_on_with_text(student, page, tmp_path):
    plain = tmp_path / "plain"
    shutil.copytree(student, plain)
    (plain / "chat_template.jinja").unlink()
    with running(open_server([str(plain)], ["plain"], LIMITS, api_key="secret")) as served:
        page.goto(f"http://127.0.0.1:{served.port}/")
        page.wait_for_selector(".error")
        assert "no API key" in page.locator(".error").text_content()
        ask(page, PROMPT, key="secret", max_tokens=12)
        assert page.locator("#form-of").input_value() == "continue"
        ask(page, PROMPT)
        assert texts(page, "answer")[0][-1] == generated(student, PROMPT)[0]
