"""The page at `/ui` in a real browser, against a real server."""

import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

playwright_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed")

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium"),
]
NOTHING = "\N{EN DASH}"
PHONE = {"viewport": {"width": 390, "height": 844}, "is_mobile": True, "has_touch": True, "device_scale_factor": 2}


@pytest.fixture(scope="module")
def server(start_server: Any) -> Any:
    """A server with a hot pool smaller than the document, so that chunks are evicted and recalled."""
    return start_server("--hot-bytes", "1MiB", "--keep-ratio", "0.2")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright_api.sync_playwright() as playwright:
        # no sandbox: where tests run as root it can't be had, and the page is our own
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser: Any, server: Any) -> Iterator[Callable[..., Any]]:
    """Opens the page in a browser context with the given options.

    At its end no page may have logged an error, or sent a request to another host.
    """
    contexts, said, asked = [], [], []

    def opened(**options: Any) -> Any:
        contexts.append(context := browser.new_context(**options))
        page = context.new_page()
        page.on("console", lambda message: said.append(message.text) if message.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.route("**/v1/chat/completions", to_the_end)
        page.goto(f"{server.url}/ui")
        playwright_api.expect(page.locator("#model")).to_have_text("bytes")
        return page

    yield opened
    for context in contexts:
        context.close()
    assert said == []
    assert asked and all(url.startswith((f"{server.url}/", "data:")) for url in asked)


def to_the_end(route: Any) -> None:
    """Send a fixed seed: answers of a random model are then reproducible, and as long as allowed."""
    route.continue_(post_data=json.dumps({**route.request.post_data_json, "ignore_eos": True, "seed": 1}))


@pytest.fixture(scope="module")
def artifacts() -> Path:
    """The directory for screenshots."""
    folder = Path(__file__).parents[2] / "build" / "test-artifacts"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def document(tokens: int) -> str:
    return "".join(random.Random(1).choices("abcdefgh <b>&\"'\n", k=tokens))


def test_a_document_is_uploaded_and_its_memory_watched(
    open_page: Callable[..., Any], tmp_path: Path, artifacts: Path
) -> None:
    page = open_page()
    page.evaluate("""() => {
        window.strips = new Set();
        new MutationObserver(() => window.strips.add(strip.dataset.states)).observe(
            document.getElementById("strip"), { attributes: true, attributeFilter: ["data-states"] });
    }""")
    file = tmp_path / "text.txt"
    file.write_text(text := document(4000))
    page.get_by_label("Text file").set_input_files(file)
    playwright_api.expect(page.get_by_label("Document")).to_have_value(text)
    page.get_by_label("Question").fill("<img src=x onerror=alert(1)>?")
    page.get_by_text("Settings").click()
    page.get_by_label("Longest answer").fill("200")
    page.get_by_label("Keep ratio").fill("0.1")
    page.get_by_role("button", name="Ask").click()
    playwright_api.expect(page.locator("#speed")).not_to_have_text(NOTHING, timeout=60_000)
    page.screenshot(path=artifacts / "ui-answering.png", full_page=True)
    playwright_api.expect(page.get_by_role("status")).to_contain_text("full length", timeout=60_000)
    page.screenshot(path=artifacts / "ui-answered.png", full_page=True)

    strips = page.evaluate("() => [...window.strips]")
    before, after = [s for s in strips if "." in s], [s for s in strips if "." not in s and "c" in s]
    assert len(before) > 1 and len(set(after)) > 3, "prefill grows, and sets change"
    assert {"h", "c"} <= set("".join(after)) and {"f", "p"} & set("".join(after))
    assert len(after[-1]) >= 4200 // 16
    kept = sum(letter in "ah" for letter in after[-1]) / len(after[-1])
    assert 0.03 < kept < 0.3
    assert float(page.locator("#keep-ratio").inner_text()) == pytest.approx(kept, abs=0.1)
    assert float(page.locator("#speed").inner_text()) > 0
    label = page.locator("#strip").get_attribute("aria-label")
    assert f"{after[-1].count('c')} cold" in label
    assert len(page.locator("#answer").inner_text()) > 10
    assert page.locator("#answer *").count() == 0, "what a model says is text, never markup"


def test_with_the_keyboard_alone_and_stopped(open_page: Callable[..., Any]) -> None:
    page = open_page()
    page.keyboard.press("Tab")
    focused = "() => document.activeElement.id"
    assert page.evaluate(focused) == "document"
    page.keyboard.type("some text")
    page.keyboard.press("Tab")
    assert page.evaluate(focused) == "file"
    page.keyboard.press("Tab")
    assert page.evaluate(focused) == "question"
    page.keyboard.type("what?")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")  # opens the settings
    for _ in range(3):
        page.keyboard.press("Tab")
    assert page.evaluate(focused) == "tokens"
    page.keyboard.press("Control+a")
    page.keyboard.type("7000")
    page.keyboard.press("Control+Enter")
    playwright_api.expect(page.locator("#speed")).not_to_have_text(NOTHING, timeout=60_000)
    page.keyboard.press("Escape")
    playwright_api.expect(page.get_by_role("status")).to_have_text("Stopped.")


def test_what_the_server_refuses_is_said(open_page: Callable[..., Any], browser: Any, server: Any) -> None:
    page = browser.new_page()  # of its own: the browser tells of the refusal in its console
    page.goto(f"{server.url}/ui")
    page.get_by_label("Document").fill("x" * 9000)
    page.get_by_label("Question").fill("?")
    page.get_by_role("button", name="Ask").click()
    playwright_api.expect(page.get_by_role("status")).to_contain_text("8192 tokens", timeout=30_000)
    page.close()
    open_page()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("device", [{}, PHONE], ids=["desk", "phone"])
def test_labels_and_contrast(
    open_page: Callable[..., Any], artifacts: Path, scheme: str, device: dict[str, Any]
) -> None:
    """axe-core finds no violation, and nothing is wider than the screen."""
    page = open_page(color_scheme=scheme, bypass_csp=True, **device)  # axe is put into the page
    page.get_by_text("Settings").click()
    page.get_by_label("Question").fill("short?")
    page.get_by_label("Longest answer").fill("60")
    page.get_by_role("button", name="Ask").click()
    playwright_api.expect(page.get_by_role("status")).to_contain_text("length", timeout=60_000)
    page.screenshot(path=artifacts / f"ui-{scheme}-{'phone' if device else 'desk'}.png", full_page=True)
    found = axe.Axe().run(page)
    assert found.response["violations"] == [], found.generate_report()
    assert page.evaluate("() => document.documentElement.scrollWidth <= innerWidth")


def test_the_page_brings_its_own_rules(server: Any) -> None:
    for path, kind in (("/ui", "text/html"), ("/ui/app.js", "text/javascript"), ("/ui/style.css", "text/css")):
        answer: httpx.Response = server.get(path)
        assert answer.status_code == 200 and answer.headers["content-type"].startswith(kind)
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
    assert server.get("/ui/../ingress.py").status_code == 404
    text = server.get("/ui").text
    assert "http://" not in text and "https://" not in text and "<script>" not in text and "style=" not in text
