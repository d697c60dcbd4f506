"""The server's page, as a person uses it, in headless Chromium."""

from __future__ import annotations

import re
import shutil
import threading
import time
from collections.abc import Iterator

import httpx2
import pytest
import uvicorn
from playwright.sync_api import Browser, Page, expect, sync_playwright

from icl_markup import MarkupClassifier, MarkupModel
from icl_markup.server import create_app
from tests.conftest import TEXTS, tiny_backbone

X = [text for texts in TEXTS.values() for text in texts[:2]]
Y = [label for label, texts in TEXTS.items() for _ in texts[:2]]
KEY = "a-key-of-ASCII"
HOSTILE = '<img src=x onerror="document.title=1"><script>document.title=1</script>'


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        pytest.skip("no Chromium is installed (apt-get install chromium)")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


class Served:
    """A server in a thread, on a free port."""

    def __init__(self, api_key: str | None = None):
        self.classifier = MarkupClassifier(MarkupModel(tiny_backbone("bert"))).fit(X, Y)
        config = uvicorn.Config(create_app(self.classifier, api_key=api_key), port=0, log_level="warning")
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run)
        self.thread.start()
        while not self.server.started:
            assert self.thread.is_alive()
            time.sleep(0.01)
        self.url = f"http://127.0.0.1:{self.server.servers[0].sockets[0].getsockname()[1]}"

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(30)


@pytest.fixture
def served() -> Iterator[Served]:
    served = Served()
    yield served
    served.stop()


@pytest.fixture
def page(browser: Browser, served: Served) -> Iterator[Page]:
    """The page, which must neither ask another site for anything nor break its own policy."""
    context = browser.new_context()
    page = context.new_page()
    page.set_default_timeout(20_000)
    wrong: list[str] = []
    page.on("console", lambda one: wrong.append(one.text) if "Content Security Policy" in one.text else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("request", lambda one: None if one.url.startswith(served.url) else wrong.append(one.url))
    page.goto(served.url)
    expect(page.locator("#labels tr")).to_have_count(4)
    yield page
    context.close()
    assert not wrong


def classify(page: Page, *texts: str) -> None:
    page.fill("#texts", "\n".join(texts))
    page.press("#texts", "Control+Enter")
    expect(page.locator("#answers > li")).to_have_count(len(texts))
    expect(page.locator("#answers .asked").first).to_have_text(texts[0])


def test_sentences_have_bars_and_a_prompt(page: Page, served: Served) -> None:
    texts = ["will it rain", "my <label> card [MASK]"]
    wanted = served.classifier.predict_proba(texts)
    classify(page, *texts)
    for i, row in enumerate(wanted):
        item = page.locator("#answers > li").nth(i)
        best = served.classifier.classes_[row.argmax()]
        assert item.locator(".best .name").inner_text() == best
        for label, probability in zip(served.classifier.classes_, row, strict=True):
            meter = item.get_by_role("meter", name=label, exact=True)
            assert float(meter.get_attribute("aria-valuenow") or "nan") == pytest.approx(100 * probability, abs=0.06)
            track, fill = meter.bounding_box(), meter.locator(".fill").bounding_box()
            assert track and fill and fill["width"] / track["width"] == pytest.approx(probability, abs=0.02)
        shares = [float(share.removesuffix(" %")) for share in item.locator(".share").all_inner_texts()]
        assert shares == sorted(shares, reverse=True) and sum(shares) == pytest.approx(100, abs=0.3)

    expect(page.locator("#prompt-facts")).to_contain_text("will it rain")
    page.get_by_role("button", name="Show the prompt of my <label> card [MASK]").click()
    expect(page.locator("#prompt-facts")).to_contain_text("[MASK]")
    expect(page.locator("#prompt .slot")).to_have_count(1)
    expect(page.locator("#prompt .query")).to_have_text(re.compile(r"my\W+label\W+card\W+mask"))
    tags = page.locator("#prompt .tag").all_inner_texts()
    assert tags[0] == "<classification>" and tags.count("<label>") == len(X) + 1
    kinds = ("tag", "symbol", "slot", "value", "special")
    colours = {
        page.locator(f"#prompt .{kind}").first.evaluate("one => getComputedStyle(one).backgroundColor")
        for kind in kinds
    }
    assert len(colours) == len(kinds)
    assert page.locator("#legend li").count() == len(kinds) + 2


def test_labels_and_examples_are_edited(page: Page, served: Served) -> None:
    classify(page, "money back please")
    page.fill("#label", "refund")
    page.fill("#examples", "money back\n\nrefund me\n")
    page.click("#add-button")
    expect(page.locator("#labels tr")).to_have_count(5)
    expect(page.locator("#state")).to_contain_text("5 labels")
    expect(page.locator("#answers .name", has_text="refund")).to_have_count(1)  # answered anew
    expect(page.locator("#prompt .value", has_text="refund me")).to_have_count(1)

    page.get_by_role("button", name="Edit refund").click()
    expect(page.locator("#examples")).to_be_focused()
    expect(page.locator("#examples")).to_have_value("money back\nrefund me")
    assert page.locator("#label").get_attribute("readonly") is not None
    page.fill("#examples", "give it back")
    page.click("#add-button")
    expect(page.locator("#labels tr", has_text="refund").locator("li")).to_have_text(["give it back"])
    page.get_by_role("button", name="Edit weather").click()
    page.click("#cancel")
    expect(page.locator("#label")).to_have_value("")

    page.get_by_role("button", name="Remove refund").click()
    expect(page.locator("#labels tr")).to_have_count(4)
    expect(page.locator("#answers .name", has_text="refund")).to_have_count(0)
    assert "refund" not in served.classifier.classes_


def test_errors_are_shown(page: Page, served: Served) -> None:
    problem = page.get_by_role("alert")
    expect(problem).to_be_hidden()
    page.click("#classify button")
    expect(problem).to_contain_text("type a sentence")
    page.fill("#label", "none of the above")
    page.click("#add-button")
    expect(problem).to_contain_text("meaning of its own")
    expect(page.locator("#label")).to_have_value("none of the above")  # to be mended
    page.fill("#texts", "\n".join(["a"] * 257))
    page.click("#classify button")
    expect(problem).to_contain_text("at most 256")
    page.get_by_role("button", name="Dismiss").click()
    expect(problem).to_be_hidden()
    served.stop()
    page.fill("#texts", "anyone there?")
    page.click("#classify button")
    expect(problem).to_contain_text("does not answer")
    expect(page.locator("#classify button")).to_be_enabled()


def test_what_people_type_is_text_and_no_markup(page: Page) -> None:
    page.fill("#label", HOSTILE)
    page.fill("#description", HOSTILE)
    page.fill("#examples", HOSTILE)
    page.click("#add-button")
    expect(page.locator("#labels tr")).to_have_count(5)
    classify(page, HOSTILE)
    expect(page.locator("#answers .name", has_text=HOSTILE)).to_have_count(1)
    assert page.locator("main img, main script").count() == 0 and page.title() == "icl-markup"
    page.get_by_role("button", name=f"Remove {HOSTILE}").click()
    expect(page.locator("#labels tr")).to_have_count(4)


def test_it_is_used_with_the_keyboard_alone(page: Page) -> None:
    page.locator("body").press("Tab")  # the link to the API
    page.keyboard.press("Tab")
    expect(page.locator("#texts")).to_be_focused()
    page.keyboard.type("will it rain")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    expect(page.locator("#answers > li")).to_have_count(1)
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    expect(page.locator("#prompt")).to_be_focused()
    fields = page.locator("input:visible, textarea:visible")
    for i in range(fields.count()):
        name = fields.nth(i).evaluate("field => field.labels[0].textContent")
        assert name.strip()


def test_it_fits_a_small_screen_and_has_a_dark_mode(page: Page) -> None:
    classify(page, "will it rain " * 20)
    page.set_viewport_size({"width": 360, "height": 700})
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    light = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.emulate_media(color_scheme="dark")
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert light != dark


def test_a_key_is_asked_for(browser: Browser) -> None:
    served = Served(api_key=KEY)
    context = browser.new_context()
    try:
        page = context.new_page()
        page.set_default_timeout(20_000)
        page.goto(served.url)
        expect(page.get_by_role("alert")).to_contain_text("API key is needed")
        expect(page.locator("#key-field")).to_be_focused()
        page.keyboard.type("wrong")
        page.keyboard.press("Enter")
        expect(page.get_by_role("alert")).to_contain_text("API key is wrong")
        expect(page.locator("#key-field")).to_be_visible()
        page.fill("#key-field", KEY)
        page.keyboard.press("Enter")
        expect(page.locator("#labels tr")).to_have_count(4)
        expect(page.locator("#key")).to_be_hidden()
        expect(page.get_by_role("alert")).to_be_hidden()
        classify(page, "will it rain")
        assert KEY not in page.content() and KEY not in page.url
    finally:
        context.close()
        served.stop()


def test_the_api_is_described(page: Page, served: Served) -> None:
    page.get_by_role("link", name="API").click()
    expect(page.locator(".route")).to_have_count(9)
    described = {re.sub(r"\s+", " ", text) for text in page.locator(".route h2").all_inner_texts()}
    api = httpx2.get(f"{served.url}/openapi.json").json()["paths"]
    assert described == {f"{method.upper()} {path}" for path, methods in api.items() for method in methods}
    expect(page.locator(".route", has_text="/classify").locator("pre").first).to_contain_text("100000 characters")
