"""The playground in headless Chromium, over a real socket, before routes that speak the endpoint's contract."""

import asyncio
import base64
import io
import json
import re
import shutil
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI
from fastapi.responses import JSONResponse
from PIL import Image, ImageDraw
from selenium.webdriver import Chrome, ChromeOptions, ChromeService, Keys
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.wait import WebDriverWait
from starlette.requests import Request
from starlette.responses import Response

from cluster.api_errors import ApiError, install_handlers, later, once, refused_content
from cluster.images_schema import ImagesRequest, make_order
from cluster.placement import ServeSection
from cluster.playground import ASSETS, add_playground, make_page
from cluster.sse import PictureEvents, stream

LIMITS = ServeSection(max_images=4, max_steps=50, max_side_px=128)
SHAPE = {"width_px": 64, "height_px": 64, "size_multiple_px": 8, "min_side_px": 16}
LIMIT_S = 60
HOLD_LIMIT_S = 120
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
needs_chromium = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="no Chromium found: apt-get install -y chromium chromium-driver (CI does)"
)


def picture(seed: int, share: float, size: tuple[int, int] = (64, 64)) -> bytes:
    """A PNG of a disc in a colour of its seed, under noise as long as `share` is below 1."""
    drawn = Image.new("RGB", size, (205, 232, 220))
    colour = ((seed * 67) % 200, (90 + seed * 31) % 200, (130 + seed * 13) % 200)
    ImageDraw.Draw(drawn).ellipse((12, 12, size[0] - 12, size[1] - 12), outline=colour, width=6)
    noise = Image.merge("RGB", [Image.effect_noise(size, 90) for _ in range(3)])
    file = io.BytesIO()
    Image.blend(noise, drawn, share).save(file, format="PNG")
    return file.getvalue()


class Studio:
    """An endpoint that draws discs; tests hold it between two events, close it, or let it refuse."""

    def __init__(self) -> None:
        self.go_on = threading.Event()
        """While it is clear, a stream waits after the first partial picture of each row."""
        self.go_on.set()
        self.left = threading.Event()
        """A client went before its stream had ended."""
        self.state = "ready"
        self.version = 7
        self.key = ""
        self.fault: ApiError | None = None
        """Ends a stream after its first finished picture, or refuses it where the status says so."""
        self.asked: list[dict[str, Any]] = []
        self.url = ""

    def make_app(self) -> FastAPI:
        app = FastAPI()
        install_handlers(app, ImagesRequest.model_fields)
        add_playground(app, LIMITS, lambda: SHAPE if self.state == "ready" else {})

        @app.get("/readyz")
        async def ready() -> JSONResponse:
            facts = {"model_version": self.version, "dataset": "emblems@0123abcd", "run_id": "fresco-5f2e"}
            known = facts if self.state == "ready" else {}
            return JSONResponse({"status": self.state, "error": "", **known}, 200 if known else 503)

        @app.post("/v1/images/generations")
        async def generate(body: ImagesRequest, request: Request) -> Response:
            return self.answer(body, request)

        return app

    def answer(self, body: ImagesRequest, request: Request) -> Response:
        if self.key and request.headers.get("authorization") != f"Bearer {self.key}":
            raise ApiError("Authorization expected to be Bearer and a known key", None, "invalid_api_key", 401)
        if self.state != "ready":
            raise later(503, f"the model is {self.state}; see /readyz", f"model_{self.state}", 1)
        self.asked.append(body.model_dump(exclude_none=True))
        if "forbidden" in body.prompt:
            raise refused_content("violence")
        if self.fault and self.fault.status < 500:
            raise self.fault
        order = make_order(body, LIMITS, SHAPE)
        return stream(self.draw(order.rows, order.size, order.partial_images))

    async def draw(self, rows: list[dict[str, Any]], size: str, num_partial: int) -> AsyncIterator[bytes]:
        events = PictureEvents("image_generation", size, "png", {"model_version": self.version})
        sides = (rows[0]["width_px"], rows[0]["height_px"])
        ended = False
        try:
            for part in range(num_partial):
                for index, row in enumerate(rows):
                    half = picture(row["seed"], (part + 1) / (num_partial + 1), sides)
                    yield events.partial(half, part, index=index, seed=row["seed"])
                await asyncio.to_thread(self.go_on.wait, HOLD_LIMIT_S)
            for index, row in enumerate(rows):
                yield events.completed(picture(row["seed"], 1.0, sides), index=index, seed=row["seed"])
                if self.fault:
                    raise self.fault
            ended = True
        finally:
            if not ended:
                self.left.set()


@pytest.fixture
def studio() -> Iterator[Studio]:
    made = Studio()
    with closing(socket.socket()) as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        server = uvicorn.Server(uvicorn.Config(made.make_app(), log_level="error", lifespan="off"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        made.url = f"http://127.0.0.1:{listener.getsockname()[1]}/"
        try:
            yield made
        finally:
            made.go_on.set()
            server.should_exit = True
            thread.join(30)


def start_chromium(folder: Path) -> Chrome:
    options = ChromeOptions()
    options.binary_location = str(CHROMIUM)
    # As root there is no sandbox, and containers have a small /dev/shm; nothing else may use the network.
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-background-networking"):
        options.add_argument(flag)
    options.add_argument("--disable-component-update")
    options.add_argument(f"--user-data-dir={folder / 'profile'}")
    options.add_experimental_option("prefs", {"download.default_directory": str(folder)})
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    return Chrome(options=options, service=ChromeService(str(DRIVER)))


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chrome]:
    driver = start_chromium(tmp_path_factory.mktemp("chromium"))
    yield driver
    driver.quit()


class Page:
    """The page as a person meets it."""

    def __init__(self, browser: Chrome, studio: Studio, width_px: int = 1200) -> None:
        self.browser = browser
        browser.set_window_size(width_px, 900)
        browser.get(studio.url)

    def at(self, selector: str) -> WebElement:
        return self.browser.find_element(By.CSS_SELECTOR, selector)

    def all(self, selector: str) -> list[WebElement]:
        return self.browser.find_elements(By.CSS_SELECTOR, selector)

    def text(self, selector: str) -> str:
        return self.at(selector).text

    def write(self, selector: str, text: str) -> None:
        self.at(selector).clear()
        self.at(selector).send_keys(text)

    def value(self, selector: str) -> str:
        return str(self.at(selector).get_property("value"))

    def run(self, script: str) -> Any:
        return self.browser.execute_script(script)  # type: ignore[no-untyped-call]

    def wait(self, condition: Callable[[], Any]) -> Any:
        return WebDriverWait(self.browser, LIMIT_S, poll_frequency=0.05).until(lambda _: condition())

    def draw(self, **fields: str) -> None:
        """Fill the form, press Draw and wait for the pictures."""
        self.wait(lambda: self.text("#served").startswith("Version"))
        for name, value in fields.items():
            self.write(f"#{name}", value)
        self.at("#draw").click()

    def drawn(self, count: int) -> list[WebElement]:
        def shown() -> list[WebElement] | None:
            found = self.all("#stage figure[data-state=done]")
            return found if len(found) == count and self.at("#draw").is_enabled() else None

        return self.wait(shown)  # type: ignore[no-any-return]


def requested(browser: Chrome, page: str) -> list[str]:
    """What this page asked for; the browser's own first page asks for things too."""
    entries = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]  # type: ignore[no-untyped-call]
    sent = [entry["params"] for entry in entries if entry["method"] == "Network.requestWillBeSent"]
    return [entry["request"]["url"] for entry in sent if entry["documentURL"] == page]


def test_page_holds_everything_it_needs_and_its_policy_names_it_by_hash() -> None:
    page, policy = make_page()
    assert "<!-- style -->" not in page and "<!-- script -->" not in page
    assert not re.search(r"""(src|href|url)\s*[=(:]\s*["'`]?(https?:)?//""", page)
    assert page.count("<script>") == page.count("</script>") == 1
    assert "unsafe" not in policy and policy.count("'sha256-") == 2


def test_page_has_the_colours_of_the_reports() -> None:
    reports = ASSETS.parents[1] / "components" / "assets" / "report.css"
    colours = dict(re.findall(r"(--\w[\w-]*): (#[0-9a-f]{6})", reports.read_text().split("@media")[0]))
    own = re.findall(r"(--\w[\w-]*): (#[0-9a-f]{6})", (ASSETS / "try.css").read_text().split("@media")[0])
    assert own and all(colours[name] == value for name, value in own)


@needs_chromium
def test_page_draws_without_asking_another_host_and_without_a_complaint(browser: Chrome, studio: Studio) -> None:
    browser.get_log("performance")  # type: ignore[no-untyped-call]
    browser.get_log("browser")  # type: ignore[no-untyped-call]
    page = Page(browser, studio)
    page.draw(prompt="a disc", negative_prompt="stars", n="2", steps="9", guidance_scale="4.5", seed="11")
    pictures = page.drawn(2)
    assert studio.asked == [
        {"prompt": "a disc", "negative_prompt": "stars", "n": 2, "steps": 9, "guidance_scale": 4.5, "seed": 11}
        | {"size": "auto", "stream": True, "partial_images": LIMITS.max_partial_images}
    ]
    assert ["seed 11" in pictures[0].text, "seed 12" in pictures[1].text] == [True, True]
    assert all("version 7" in drawn.text and "64 × 64" in drawn.text for drawn in pictures)
    assert page.text("#served") == "Version 7 · trained on emblems@0123abcd · run fresco-5f2e"
    assert page.run("return document.querySelector('#stage img').naturalWidth") == 64
    assert page.run("return getComputedStyle(document.querySelector('#stage img')).imageRendering") == "pixelated"
    assert page.at("#stage img").size["width"] > 128, "small pictures are enlarged"
    urls = requested(browser, studio.url)
    assert studio.url in urls and all(url.startswith((studio.url, "data:")) for url in urls)
    assert browser.get_log("browser") == []  # type: ignore[no-untyped-call]


@needs_chromium
def test_partial_pictures_are_shown_before_the_finished_one(browser: Chrome, studio: Studio) -> None:
    studio.go_on.clear()
    page = Page(browser, studio)
    page.draw(seed="3", n="2")
    page.wait(lambda: len(page.all("#stage figure[data-state=partial] img")) == 2)
    assert page.all("#stage figure[data-state=done]") == [] and not page.at("#draw").is_enabled()
    half = page.at("#stage img").get_attribute("src")
    studio.go_on.set()
    page.drawn(2)
    finished = str(page.at("#stage img").get_attribute("src"))
    assert finished != half
    assert base64.b64decode(finished.partition("base64,")[2]) == picture(3, 1.0)


@needs_chromium
def test_seed_of_a_picture_draws_it_again(browser: Chrome, studio: Studio) -> None:
    page = Page(browser, studio)
    page.draw()
    page.drawn(1)
    first = page.at("#stage img").get_attribute("src")
    seed = page.text("#stage figcaption button").removeprefix("seed ")
    page.at("#stage figcaption button").click()
    assert page.value("#seed") == seed and "seed" not in studio.asked[0]
    page.draw()
    page.wait(lambda: len(studio.asked) == 2)
    page.drawn(1)
    assert studio.asked[1]["seed"] == int(seed)
    assert page.at("#stage img").get_attribute("src") == first
    page.at("#any-seed").click()
    assert page.value("#seed") == ""


@needs_chromium
@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("prompt", "forbidden things", "expected to pass this endpoint's content policy"),
        ("steps", "51", "Expected 1 to 50, found 51 (the limit is serve.max_steps)."),
        ("n", "1.5", "Input should be a valid integer"),
        ("seed", "-1", "Expected 0 to"),
        ("prompt", "", "Expected 1 to 2000 characters (serve.max_prompt_chars), found 0."),
    ],
)
def test_refusal_stands_beside_the_field_it_blames(
    field: str, value: str, words: str, browser: Chrome, studio: Studio
) -> None:
    page = Page(browser, studio)
    page.draw(**{field: value})
    page.wait(lambda: page.text(f"#fault-{field}") and page.at("#draw").is_enabled())
    assert words.lower() in page.text(f"#fault-{field}").lower()
    shown = [fault.get_attribute("id") for fault in page.all(".fault") if fault.text]
    assert shown == [f"fault-{field}"]
    assert page.at(f"#{field}").get_attribute("aria-invalid") == "true"
    assert browser.switch_to.active_element == page.at(f"#{field}")
    page.draw(**{field: "2"})
    page.drawn(2 if field == "n" else 1)
    assert not any(fault.text for fault in page.all(".fault"))


@needs_chromium
def test_error_in_mid_stream_is_told_and_what_was_finished_stays(browser: Chrome, studio: Studio) -> None:
    studio.fault = once(500, "drawing failed; the endpoint's log says why", "internal_error")
    page = Page(browser, studio)
    page.draw(n="3", seed="30")
    page.drawn(1)
    assert page.text("#fault") == "Drawing failed; the endpoint's log says why."
    assert "seed 30" in page.text("#stage") and len(page.all("#history button")) == 1


@needs_chromium
def test_full_queue_and_an_endpoint_that_is_away_are_told_in_sentences(browser: Chrome, studio: Studio) -> None:
    studio.fault = later(429, "16 pictures wait already; try again in 7 s", "queue_full", 7)
    page = Page(browser, studio)
    page.draw()
    page.wait(lambda: page.text("#fault") == "16 pictures wait already; try again in 7 s.")
    browser.execute_cdp_cmd("Network.enable", {})
    gone = {"offline": True, "latency": 0, "downloadThroughput": -1, "uploadThroughput": -1}
    browser.execute_cdp_cmd("Network.emulateNetworkConditions", gone)
    try:
        page.at("#draw").click()
        page.wait(lambda: page.text("#fault").startswith("The endpoint did not answer"))
    finally:
        browser.execute_cdp_cmd("Network.emulateNetworkConditions", {**gone, "offline": False})
    studio.fault = None
    page.draw()
    page.drawn(1)
    assert page.text("#fault") == ""


@needs_chromium
def test_size_is_chosen_from_what_the_model_can_draw_or_written(browser: Chrome, studio: Studio) -> None:
    page = Page(browser, studio)
    page.wait(lambda: len(page.all("#size option")) > 2)
    offered = [option.get_attribute("value") for option in page.all("#size option")]
    assert offered[0] == "auto" and offered[-1] == "other" and {"32x32", "128x128", "64x96"} <= set(offered)
    page.run("size.value = 'other'; size.dispatchEvent(new Event('input', {bubbles: true}))")
    page.draw(width="48", height="30")
    page.wait(lambda: "multiples of 8" in page.text("#fault-size"))
    page.draw(height="40")
    page.drawn(1)
    assert studio.asked[-1]["size"] == "48x40" and "48 × 40" in page.text("#stage figcaption")


@needs_chromium
def test_key_is_asked_for_when_the_endpoint_wants_one_and_kept_in_the_tab(browser: Chrome, studio: Studio) -> None:
    studio.key = "fresco-secret"
    page = Page(browser, studio)
    assert not page.at("#key").is_displayed()
    page.draw()
    page.wait(lambda: page.at("#key").is_displayed() and page.text("#fault-key"))
    page.draw(key="fresco-secret")
    page.drawn(1)
    assert page.run("return sessionStorage.getItem('fresco.key')") == studio.key
    assert page.run("return localStorage.length") == 0
    assert studio.key not in page.run("return sessionStorage.getItem('fresco.history')")
    browser.refresh()
    assert not page.at("#key").is_displayed()
    page.draw(prompt="after a reload")
    page.wait(lambda: len(studio.asked) == 2)


@needs_chromium
@pytest.mark.parametrize("how", ["button", "escape"])
def test_cancelling_ends_the_request_and_the_earlier_pictures_stay(how: str, browser: Chrome, studio: Studio) -> None:
    page = Page(browser, studio)
    page.draw(seed="5")
    page.drawn(1)
    before = page.at("#stage img").get_attribute("src")
    studio.go_on.clear()
    page.draw(seed="6")
    page.wait(lambda: page.all("#stage figure[data-state=partial]"))
    if how == "button":
        page.at("#cancel").click()
    else:
        ActionChains(browser).send_keys(Keys.ESCAPE).perform()
    assert studio.left.wait(LIMIT_S), "the endpoint sees that the client has gone"
    page.drawn(1)
    assert page.at("#stage img").get_attribute("src") == before
    assert page.text("#progress") == "cancelled" and not any(fault.text for fault in page.all(".fault"))


@needs_chromium
def test_history_brings_back_prompt_settings_and_pictures_also_after_a_reload(browser: Chrome, studio: Studio) -> None:
    page = Page(browser, studio)
    page.draw(prompt="first", steps="7", seed="1", n="2")
    page.drawn(2)
    page.draw(prompt="second", steps="8", seed="9", n="1")
    page.drawn(1)
    browser.refresh()
    page.wait(lambda: len(page.all("#history button")) == 2 and page.text("#served").startswith("Version"))
    assert page.text("#asked") == "second"
    page.all("#history button")[1].click()
    assert len(page.drawn(2)) == 2 and page.text("#asked") == "first"
    assert [page.value(f"#{name}") for name in ("prompt", "steps", "seed", "n")] == ["first", "7", "1", "2"]
    page.at("#forget").click()
    assert not page.at("#past").is_displayed()
    assert page.run("return sessionStorage.getItem('fresco.history')") == "[]"


@needs_chromium
def test_history_is_bounded_in_number_and_in_what_the_tab_stores(browser: Chrome, studio: Studio) -> None:
    page = Page(browser, studio)
    page.draw()
    page.drawn(1)
    page.run(
        "for (let i = 0; i < 45; i++) remember({prompt: `p${i}`}, [{b64: 'A'.repeat(i > 40 ? 8e5 : 8), format: 'png',"
        " seed: i, size: '64x64'}])"
    )
    assert page.run("return memory.length") == 40
    assert len(page.run("return sessionStorage.getItem('fresco.history')")) < 3.5e6
    assert page.run("return JSON.parse(sessionStorage.getItem('fresco.history'))[0].body.prompt") == "p44"


@needs_chromium
def test_page_waits_for_a_model_that_loads_and_draws_by_itself(browser: Chrome, studio: Studio) -> None:
    studio.state = "loading"
    page = Page(browser, studio)
    page.wait(lambda: "loading" in page.text("#served"))
    page.at("#draw").click()
    page.wait(lambda: "loading" in page.text("#progress"))
    assert studio.asked == []
    studio.state = "ready"
    page.drawn(1)
    assert len(studio.asked) == 1 and page.text("#served").startswith("Version 7")
    page.wait(lambda: len(page.all("#size option")) > 2)


@needs_chromium
def test_version_shown_follows_a_swap(browser: Chrome, studio: Studio) -> None:
    page = Page(browser, studio)
    page.draw()
    page.drawn(1)
    studio.version = 8
    page.draw()
    page.wait(lambda: "version 8" in page.text("#stage"))
    page.wait(lambda: page.text("#served").startswith("Version 8"))


@needs_chromium
def test_keyboard_alone_draws_and_every_field_has_a_label(browser: Chrome, studio: Studio) -> None:
    page = Page(browser, studio)
    page.wait(lambda: page.text("#served").startswith("Version"))
    page.write("#prompt", "from the keyboard")
    page.at("#prompt").send_keys(Keys.CONTROL, Keys.ENTER)
    page.drawn(1)
    assert studio.asked[0]["prompt"] == "from the keyboard"
    unnamed = "return [...document.querySelectorAll('input, textarea, select, button')]"
    unnamed += ".filter((one) => !(one.labels?.length || one.getAttribute('aria-label') || one.textContent.trim()))"
    assert page.run(unnamed) == []
    assert page.at("#stage img").get_attribute("alt") == "from the keyboard"


@needs_chromium
def test_download_is_the_file_the_endpoint_sent(browser: Chrome, studio: Studio) -> None:
    page = Page(browser, studio)
    page.draw(seed="21")
    page.drawn(1)
    link = page.at("#stage figcaption a")
    assert link.get_attribute("download") == "fresco-21.png"
    assert base64.b64decode(str(link.get_attribute("href")).partition("base64,")[2]) == picture(21, 1.0)


@needs_chromium
def test_prompt_is_text_and_never_markup(browser: Chrome, studio: Studio) -> None:
    page = Page(browser, studio)
    evil = "<img src=x onerror='document.title=1'><b>bold</b>"
    page.draw(prompt=evil)
    page.drawn(1)
    assert page.text("#asked") == evil and page.all("#asked *") == []
    assert browser.title == "Fresco: draw a picture"


@needs_chromium
def test_page_fits_a_narrow_screen(browser: Chrome, studio: Studio) -> None:
    # A window has a least width; the device's is set below it.
    metrics = {"width": 375, "height": 800, "deviceScaleFactor": 2, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    try:
        page = Page(browser, studio)
        page.draw(n="3", prompt="averyveryverylongwordwithoutanyplacewhereitcouldbebrokenintotwolines" * 2)
        page.drawn(3)
        page.at("#reference summary").click()
        assert page.run("return [innerWidth, document.documentElement.scrollWidth]") == [375, 375]
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
