"""The page in a real browser, before a student and a teacher of the digits: typed, dragged, reloaded, two tabs."""

import io
import json
import os
import re
import shlex
import shutil
from urllib.parse import quote

import pytest
from PIL import Image

from tests.serving.made import HeldBack, served, soon

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), ""
)
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="needs Chromium: apt install chromium")

NARROW = 390
PIXELS = """image => {
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
  canvas.getContext("2d").drawImage(image, 0, 0);
  return canvas.toDataURL();
}"""
ENDLESS = """wanted => {
  const wait = window.setTimeout;
  window.setTimeout = (run, ms) => wait(run, ms === wanted ? 1e9 : ms);
}"""
"""Pauses of so many milliseconds do not end."""
HTML = '<img src=x onerror="document.title=\'run\'"><script>document.title="run"</script><b>bold</b>'


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    from pipelines.painting import Models
    from tests.serving.digits import write_digits

    with served(Models(write_digits(tmp_path_factory.mktemp("digits")))) as server:
        yield server


@pytest.fixture(scope="module")
def chromium():
    from playwright.sync_api import sync_playwright

    sandbox = [] if os.getuid() else ["--no-sandbox"]  # which root has none of
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=sandbox)
        yield chromium
        chromium.close()


class Tab:
    """A tab with the page, and what went wrong in it."""

    def __init__(self, chromium, url, **options):
        self.page = chromium.new_page(**options)
        self.page.set_default_timeout(60_000)
        self.faults, self.requests, self.sent = [], [], []
        self.page.on("pageerror", lambda error: self.faults.append(str(error)))
        self.page.on("console", self.heard)
        self.page.on("request", self.asked)
        self.page.goto(url)
        self.page.wait_for_selector(".card")

    def heard(self, message):
        if "409" not in message.text:  # a request that a newer one has replaced, as it should
            self.faults.append(message.text)

    def asked(self, request):
        self.requests.append(request.url)
        if request.method == "POST":
            self.sent.append(request.post_data_json)

    def card(self, name):
        return self.page.locator(f".card[aria-label={name}]")

    def drawn(self):
        """Wait until both cards show what is asked; the files of their images."""
        both = self.page.locator(".picture:not(.stale) img:visible")
        soon(lambda: both.count() == 2)
        return [both.nth(place).evaluate(PIXELS) for place in range(2)]

    def type(self, text):
        self.page.locator("#prompt").fill(text)
        return self.drawn()

    def prompt(self):
        return self.page.locator("#prompt").input_value()


@pytest.fixture
def tab(chromium, server):
    tab = Tab(chromium, server.url)
    yield tab
    tab.page.close()
    assert not tab.faults
    assert all(url.startswith((server.url, "blob:", "data:")) for url in tab.requests)


def test_the_images_follow_what_is_typed(tab):
    assert tab.card("student").locator(".blank").is_visible()
    tab.page.locator("#prompt").press_sequentially("a seven", delay=150)
    first = tab.drawn()
    students = [body["prompt"] for body in tab.sent if body["model"] == "student"]
    assert students == ["a", "a ", "a s", "a se", "a sev", "a seve", "a seven"]
    assert [body["prompt"] for body in tab.sent if body["model"] == "teacher"][-1] == "a seven"
    tab.page.locator("#prompt").press_sequentially("th")
    assert all(old != new for old, new in zip(first, tab.drawn(), strict=True))
    assert tab.type("a seven") == first
    tab.page.locator("#prompt").fill("")
    assert tab.card("student").locator(".blank").is_visible()


def test_the_student_is_seen_before_its_slow_teacher(tab):
    tab.page.locator("#prompt").press_sequentially("a seven")
    tab.card("student").locator("img:visible").wait_for()
    assert not tab.card("teacher").locator("img").is_visible()
    tab.drawn()
    assert len([body for body in tab.sent if body["model"] == "teacher"]) == 1  # after the pause, not at each key


def test_times_are_compared(tab):
    tab.type("an odd digit")
    for name, steps in (("student", "1 step"), ("teacher", "25 steps")):
        told = tab.card(name).locator(".seconds").inner_text()
        assert re.match(rf"[\d.]+ m?s for {steps}, here after [\d.]+ m?s$", told)
    widths = [tab.card(name).locator(".bar i").bounding_box()["width"] for name in ("student", "teacher")]
    assert 0 < widths[0] < widths[1]


def test_steps_and_guidance_are_each_models_own(tab):
    student, teacher = tab.type("a seven")
    tab.card("teacher").locator(".steps").fill("2")
    tab.card("teacher").locator(".guidance").fill("1.5")
    soon(lambda: "2 steps" in tab.card("teacher").locator(".seconds").inner_text())
    again = tab.drawn()
    assert again[0] == student and again[1] != teacher
    assert (tab.sent[-1]["num_steps"], tab.sent[-1]["guidance_scale"]) == (2, 1.5)
    tab.card("teacher").locator(".steps").fill("0")
    error = tab.card("teacher").locator(".error:visible")
    error.wait_for()
    assert "'num_steps' must be a whole number from 1 to 200, not 0" in error.inner_text()
    assert "docs/" not in error.inner_text()
    tab.faults.clear()  # the browser tells of the 422, too


def test_dragging_leads_from_one_noise_to_the_other(tab):
    first = tab.type("a seven")
    way = tab.page.locator("#position")
    box = way.bounding_box()
    tab.page.mouse.move(box["x"] + 10, box["y"] + box["height"] / 2)
    tab.page.mouse.down()
    for part in range(1, 6):
        tab.page.mouse.move(box["x"] + box["width"] * part / 6, box["y"] + box["height"] / 2)
    tab.page.mouse.up()
    middle = tab.drawn()
    positions = [body["position"] for body in tab.sent if body["model"] == "student" and "position" in body]
    assert len(positions) >= 4 and positions == sorted(positions)
    way.press("End")
    last = tab.drawn()
    assert len({images[0] for images in (first, middle, last)}) == 3
    tab.page.locator("#seed").fill("1")
    way.press("Home")
    assert tab.drawn()[0] == last[0]  # seed 1 itself


def test_an_image_between_two_noises_tells_its_place(tab):
    tab.type("a seven")
    assert tab.card("student").locator("img").get_attribute("alt") == "student draws: a seven (seed 0)"
    tab.page.locator("#position").fill("0.3")
    tab.drawn()
    assert tab.card("student").locator("img").get_attribute("alt") == "student draws: a seven (seed 0 → 1 at 0.3)"
    assert tab.card("student").locator(".save").get_attribute("download") == "student-seed-0-1-at-0.3.png"
    assert tab.page.get_by_label("From this noise to the other: 0.3", exact=True).count() == 1
    entry = tab.page.locator("#history button").first
    soon(lambda: entry.locator("small").inner_text() == "seed 0 → 1 at 0.3")
    assert entry.get_attribute("title") == "a seven (seed 0 → 1 at 0.3)"


def test_guidance_that_a_model_is_meant_without_is_noted(tab):
    tab.type("a seven")
    assert not tab.page.locator(".note:visible").count()
    tab.card("student").locator(".guidance").fill("7.5")
    note = tab.card("student").locator(".note:visible")
    note.wait_for()
    assert note.inner_text() == "'student' is meant without guidance, which is trained in: 7.5 spoils its images."
    tab.card("student").locator(".guidance").fill("")
    note.wait_for(state="detached")


def test_a_reload_brings_all_back(tab):
    tab.page.locator("#seed").fill("7")
    tab.card("student").locator(".steps").fill("3")
    images = tab.type("a nine & a <b>two</b>")
    tab.page.locator("#history button").first.wait_for()
    tab.page.reload()
    assert tab.drawn() == images
    assert tab.prompt() == "a nine & a <b>two</b>"
    assert tab.page.locator("#seed").input_value() == "7"
    assert tab.card("student").locator(".steps").input_value() == "3"
    assert tab.page.locator("#history button").count() == 1


def test_the_history_leads_back(tab):
    first = tab.type("a seven")
    tab.page.locator("#history button").first.wait_for()
    tab.type("a two")
    soon(lambda: tab.page.locator("#history button").count() == 2)
    tab.page.locator("#history button").last.click()
    soon(lambda: tab.prompt() == "a seven")
    assert tab.drawn() == first
    tab.page.locator("#forget").click()
    assert not tab.page.locator("#past").is_visible()


def test_two_tabs_have_each_its_own(chromium, server, tab):
    other = Tab(chromium, server.url)
    tab.page.locator("#prompt").press_sequentially("a seven")
    other.page.locator("#prompt").press_sequentially("a two")
    one, two = tab.drawn(), other.drawn()
    assert all(a != b for a, b in zip(one, two, strict=True))
    assert (tab.prompt(), other.prompt()) == ("a seven", "a two")
    assert tab.sent[0]["client"] != other.sent[0]["client"]
    other.page.reload()
    assert other.drawn() == two
    assert not other.faults
    other.page.close()


def test_a_prompt_of_10_000_characters_is_drawn_and_said_to_be_cut(tab):
    tab.type("a seven " * 1250)
    for name in ("student", "teacher"):
        assert "cut after 10 tokens" in tab.card(name).locator(".note:visible").inner_text()
    tab.page.wait_for_timeout(400)
    tab.page.reload()
    tab.drawn()
    assert len(tab.prompt()) == 10_000
    assert tab.page.evaluate("document.documentElement.scrollWidth") <= tab.page.viewport_size["width"]
    tab.type("a two")
    assert not tab.card("student").locator(".note").is_visible()


@pytest.mark.parametrize("text", ["🙂👩‍👩‍👧 ٧ 七", HTML, "'; DROP \\ \"$(x)`"], ids=["emoji", "html", "quotes"])
def test_any_text_is_shown_and_never_run(tab, text):
    tab.type(text)
    assert tab.sent[-1]["prompt"] == text
    entry = tab.page.locator("#history button").first
    entry.wait_for()
    assert entry.locator("span").inner_text() == text[:60]
    tab.page.locator("summary").click()
    assert "curl" in tab.page.locator("#curl").inner_text()
    assert tab.page.title() == "InstaFlow"
    assert tab.page.locator("b, script:not([src]), img[src=x]").count() == 0
    tab.page.reload()
    tab.drawn()
    assert tab.prompt() == text and tab.page.title() == "InstaFlow"


def test_the_command_that_is_shown_draws_the_same(tab, server):
    tab.type('it\'s a "seven"')
    tab.page.locator("summary").click()
    words = shlex.split(tab.page.locator("#curl").inner_text())
    body = json.loads(words[words.index("-d") + 1])
    assert words[1] == f"{server.url}api/images"
    assert body == {"model": "student", "prompt": 'it\'s a "seven"', "seed": 0}
    assert server.ask(body).status == 200


def test_the_command_takes_the_token_from_the_terminal(chromium):
    token = "a token of the test's own"
    with served(HeldBack(), token) as server:
        tab = Tab(chromium, f"{server.url}?token={quote(token)}")
        command = tab.page.locator("#curl").text_content()
        assert '-H "Authorization: Bearer $TOKEN"' in command and token not in command
        assert shlex.split(command)[1] == f"{server.url}api/images"
        tab.page.close()


def test_an_address_that_another_wrote_changes_what_it_names_alone(chromium, server):
    address = f"{server.url}#prompt=a&steps.__proto__=3&guidance.__proto__=9&steps.constructor=3"
    tab = Tab(chromium, address)
    assert tab.page.evaluate("[({}).steps, ({}).guidance, Object.steps]") == [None] * 3
    assert [tab.card(name).locator(".steps").input_value() for name in ("student", "teacher")] == ["", ""]
    tab.drawn()
    assert all("num_steps" not in body and "guidance_scale" not in body for body in tab.sent)
    assert not tab.faults
    tab.page.close()


def test_an_address_that_another_wrote_is_read_with_care(chromium, server):
    tab = Tab(chromium, f"{server.url}#prompt={quote(HTML)}&seed=-1&position=9&steps.student=x&nonsense=1")
    assert tab.prompt() == HTML
    assert tab.page.locator("#seed").input_value() == "0"
    tab.drawn()
    assert tab.page.title() == "InstaFlow"
    assert not tab.faults
    tab.page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1200, NARROW])
def test_it_fits_and_is_labelled(chromium, server, width, scheme):
    tab = Tab(chromium, server.url, viewport={"width": width, "height": 800}, color_scheme=scheme)
    tab.type("a handwritten seven")
    assert tab.page.evaluate("document.documentElement.scrollWidth") <= width
    boxes = [tab.card(name).bounding_box() for name in ("student", "teacher")]
    assert boxes[0]["y"] == boxes[1]["y"]  # side by side
    nameless = """() => [...document.querySelectorAll("main input, main textarea, main select, main button")].filter(
      e => e.checkVisibility() && !(e.labels?.length || e.textContent.trim())).map(e => e.outerHTML)"""
    assert tab.page.evaluate(nameless) == []
    tab.page.locator("#prompt").focus()
    reached = []
    for _ in range(12):
        reached.append(tab.page.evaluate("document.activeElement.id || document.activeElement.className"))
        tab.page.keyboard.press("Tab")
    wanted = ["prompt", "seed", "new", "position", "seed_to", "new", "steps", "guidance", "save", "steps"]
    assert reached[: len(wanted)] == wanted
    assert not tab.faults
    tab.page.close()


def test_the_page_says_when_the_server_is_gone(chromium):
    with served(HeldBack()) as server:
        tab = Tab(chromium, server.url)
    tab.page.locator("#prompt").fill("a")
    tab.card("fast").locator(".error:visible").wait_for()
    assert tab.page.locator("#link").inner_text() == "The server does not answer"
    tab.page.close()


@pytest.fixture
def held(chromium):
    """A painter that waits, and a tab that asks it."""
    image = io.BytesIO()
    Image.new("RGB", (8, 8), "teal").save(image, "PNG")
    painter = HeldBack(image=image.getvalue())
    with served(painter) as server:
        tab = Tab(chromium, server.url)
        yield painter, tab
        tab.page.close()


def test_an_answer_to_an_older_prompt_is_never_seen_as_current(held):
    painter, tab = held
    slow = tab.card("slow")
    tab.page.locator("#prompt").fill("a two")
    soon(lambda: len(painter.steps) == 1)
    painter.let_go(1)
    soon(lambda: len(painter.steps) == 2)  # the slow one's first
    tab.page.evaluate(ENDLESS, 350)  # the pause after the last key
    tab.page.locator("#prompt").fill("a one")
    painter.let_go()
    shown = slow.locator("img[alt*='a two']")
    shown.wait_for()
    tab.card("fast").locator(".picture:not(.stale) img[alt*='a one']").wait_for()
    soon(lambda: shown.evaluate("image => getComputedStyle(image).opacity") == "0.45")
    tab.page.wait_for_timeout(1200)
    assert not tab.page.locator("#history button").count()  # for one is still to come
    tab.page.locator("#prompt").press("Enter")
    slow.locator(".picture:not(.stale) img[alt*='a one']").wait_for()
    tab.page.locator("#history button").first.wait_for()


def test_a_failure_leaves_the_earlier_image_dim_and_out_of_the_history(held):
    painter, tab = held
    painter.let_go()
    slow = tab.card("slow")
    tab.type("a two")
    tab.page.locator("#history button").first.wait_for()
    slow.locator(".steps").fill("999")
    slow.locator(".error:visible").wait_for()
    assert slow.locator(".picture.stale img:visible").count() == 1
    assert slow.locator(".seconds").inner_text() == "The image is that of an earlier request"
    assert not slow.locator(".save").is_visible()
    tab.page.wait_for_timeout(1200)
    assert tab.page.locator("#history button").count() == 1
    slow.locator(".steps").fill("")
    tab.drawn()
    assert slow.locator(".save").is_visible() and not slow.locator(".error").is_visible()


def test_the_number_of_drawings_follows(held):
    painter, tab = held
    painter.let_go()
    tab.page.add_init_script(f"({ENDLESS})(10000)")  # the pause between two looks at the server
    tab.page.reload()
    soon(lambda: tab.page.locator("#link").inner_text() == "0 drawn")
    tab.type("a two")
    soon(lambda: tab.page.locator("#link").inner_text() == "2 drawn")


def test_what_is_typed_before_the_models_are_known_is_drawn(server, chromium):
    page = chromium.new_page()

    def answer_late(route):
        page.fill("#prompt", "a seven")
        route.continue_()

    page.route("**/api/models", answer_late)
    page.goto(server.url)
    page.wait_for_selector(".card img[src]", timeout=60_000)
    assert page.input_value("#prompt") == "a seven"
    assert "prompt=a+seven" in page.url or "prompt=a%20seven" in page.url
    page.close()
