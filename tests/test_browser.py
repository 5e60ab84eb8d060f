"""The page in a real browser: headless Chromium, the system's own, driven by Playwright."""

import base64
import io
import json
import shutil

import numpy as np
import pytest
from conftest import make_dicom
from PIL import Image

sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
         "--disable-background-networking", "--disable-component-update"]
pytestmark = [pytest.mark.browser,
              pytest.mark.skipif(not CHROMIUM, reason="needs the system's chromium")]
PIXELS = np.arange(64 * 64, dtype=np.uint16).reshape(64, 64)


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser, server):
    """The page; at the end there must be no error in its console and no request elsewhere."""
    page = browser.new_page()
    errors, requests = [], []
    page.on("console", lambda message: message.type == "error" and errors.append(message.text))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(server.url)
    yield page
    page.close()
    # of a file that is refused Chromium itself says so, whatever the page does
    assert not [error for error in errors if "responded with a status of " not in error]
    assert all(url.startswith((server.url, "data:", "blob:")) for url in requests)


@pytest.fixture(scope="module")
def radiographs():
    """Contents by name: a DICOM, a PNG and a text file."""
    dicom, png = io.BytesIO(), io.BytesIO()
    make_dicom(PIXELS).save_as(dicom, enforce_file_format=True)
    Image.fromarray((PIXELS // 16).astype(np.uint8)).save(png, "PNG")
    return {"one.dcm": dicom.getvalue(), "two.png": png.getvalue(), "three.txt": b"a letter"}


def drop(page, files):
    """Drops files {name: content} beside the area, as a user who misses it does."""
    contents = {name: base64.b64encode(content).decode() for name, content in files.items()}
    transfer = page.evaluate_handle("""(contents) => {
      const transfer = new DataTransfer();
      for (const [name, text] of Object.entries(contents)) {
        const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
        transfer.items.add(new File([bytes], name));
      }
      return transfer;
    }""", contents)
    page.dispatch_event("h1", "drop", {"dataTransfer": transfer})


def card(page, name):
    return page.locator("#results > li", has=page.get_by_role("heading", name=name, exact=True))


def test_dropped_files_appear_with_picture_boxes_and_reasons(page, server, radiographs):
    drop(page, radiographs)
    sync_api.expect(page.get_by_role("status")).to_have_text("2 done, 1 failed")
    for name in ("one.dcm", "two.png"):
        _, answer = server.upload(name, radiographs[name])
        [answer] = answer.values()
        picture = card(page, name).get_by_role("img")
        assert picture.get_attribute("src") == f"data:image/png;base64,{answer['image']}"
        assert picture.evaluate("picture => picture.complete && picture.naturalWidth") >= 64
        link = card(page, name).get_by_role("link", name="Save the picture")
        assert link.get_attribute("download") == f"{name.partition('.')[0]}.png"
        boxes = np.reshape(answer["annotations"].split(), (-1, 5))
        assert len(boxes) and card(page, name).locator("ol li").all_text_contents() == [
            f"{c} at {x}, {y}: {width} \u00d7 {height}" for c, x, y, width, height in boxes]
    assert card(page, "three.txt").locator("p").text_content() == "is not a DICOM file"


def test_the_page_names_the_model(page, checkpoint):
    sync_api.expect(page.locator("#model")).to_have_text(f"Model: {checkpoint}")


def test_annotations_are_downloaded_as_predict_writes_them(page, server, radiographs, tmp_path):
    drop(page, radiographs)
    sync_api.expect(page.get_by_role("status")).to_have_text("2 done, 1 failed")
    with page.expect_download() as download:
        page.get_by_role("button", name="Download annotations.json").click()
    assert download.value.suggested_filename == "annotations.json"
    download.value.save_as(tmp_path / "annotations.json")
    text = (tmp_path / "annotations.json").read_text("utf-8")
    expected = {}
    for name in ("one.dcm", "two.png"):
        [(patient_id, answer)] = server.upload(name, radiographs[name])[1].items()
        expected[patient_id] = answer["annotations"]
    assert json.loads(text) == expected and text.startswith('{\n "')


def test_a_picture_appears_within_seconds(page, radiographs):
    drop(page, {"first.dcm": radiographs["one.dcm"]})
    card(page, "first.dcm").get_by_role("img").wait_for()
    drop(page, {"second.dcm": radiographs["one.dcm"]})
    card(page, "second.dcm").get_by_role("img").wait_for(timeout=10_000)  # 1 s on a quiet machine


def test_files_with_the_same_id_keep_ids_of_their_own(page, radiographs):
    drop(page, {"a.dcm": radiographs["one.dcm"]})
    card(page, "a.dcm").get_by_role("img").wait_for()
    drop(page, {"a.png": radiographs["two.png"]})
    card(page, "a.png").get_by_role("img").wait_for()
    assert "; id: a (2)" in card(page, "a.png").locator("p").text_content()


def test_names_with_markup_are_text(page, radiographs):
    drop(page, {"<img src=x onerror=alert(1)>.txt": b"a letter"})
    sync_api.expect(page.get_by_role("status")).to_have_text("1 failed")
    assert page.locator("#results h2").text_content() == "<img src=x onerror=alert(1)>.txt"
    assert not page.locator("#results img").count()


def test_an_answer_that_is_cut_off_fails_and_the_next_file_is_sent(page, radiographs):
    answers = [{"status": 200, "body": '{"one": {"anno'}] * 5
    page.route("**/predict", lambda route: route.fulfill(**answers.pop()) if answers
               else route.continue_())
    drop(page, {f"{number}.dcm": radiographs["one.dcm"] for number in range(6)})
    sync_api.expect(page.get_by_role("status")).to_have_text("1 done, 5 failed")
    assert page.locator(".problem", has_text="got no answer: HTTP status 200").count() == 5


@pytest.fixture
def busy(page):
    """Waits of the page in milliseconds, all of which take 1 here, while a proxy answers 503."""
    page.evaluate("""() => {
      window.waits = []; window.now = Date.now();
      const wait = setTimeout;
      window.setTimeout = (wake, time, ...values) => {
        if (time >= 1000) { waits.push(time); now += time; }
        return wait(wake, Math.min(time, 1), ...values);
      };
      Date.now = () => now;
    }""")
    return page


@pytest.mark.parametrize("header", [None, "Sat, 28 Nov 2026 20:00:00 GMT", "-3", "5"])
def test_a_busy_server_is_asked_ever_less_often_and_given_up_after_a_minute(
        busy, radiographs, header):
    headers = {"Retry-After": header} if header else {}
    busy.route("**/predict", lambda route: route.fulfill(status=503, headers=headers))
    drop(busy, {"one.dcm": radiographs["one.dcm"]})
    sync_api.expect(busy.get_by_role("status")).to_have_text("1 failed")
    assert "HTTP status 503" in card(busy, "one.dcm").locator(".problem").text_content()
    waits = busy.evaluate("waits")
    assert 5 < len(waits) < 20 and sum(waits) <= 60_000
    assert waits == sorted(waits) and waits[0] == (5000 if header == "5" else 1000)


def test_clear_ends_the_tries(busy, radiographs):
    tries = []

    def answer(route):
        tries.append(route)
        if len(tries) == 3:
            busy.evaluate("document.getElementById('clear').click()")
        route.fulfill(status=503)
    busy.route("**/predict", answer)
    drop(busy, {"one.dcm": radiographs["one.dcm"]})
    busy.wait_for_timeout(500)
    assert len(tries) == 3 and busy.get_by_role("status").text_content() == ""


def test_remarks_are_shown(page):
    content = io.BytesIO()
    Image.new("RGB", (64, 64)).save(content, "PNG")
    drop(page, {"a.png": content.getvalue()})
    card(page, "a.png").get_by_role("img").wait_for()
    assert card(page, "a.png").get_by_text("is a colour image").is_visible()


def test_the_page_works_by_keyboard(page, radiographs):
    file = {"name": "one.dcm", "mimeType": "", "buffer": radiographs["one.dcm"]}
    page.on("filechooser", lambda chooser: chooser.set_files(file))
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "files"
    page.keyboard.press("Space")
    card(page, "one.dcm").get_by_role("img").wait_for()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "download"
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    assert not page.locator("#results li").count()
    assert page.evaluate("document.activeElement.id") == "files"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_a_phone_and_can_be_read_in_light_and_dark(page, radiographs, scheme):
    page.set_viewport_size({"width": 360, "height": 740})
    page.emulate_media(color_scheme=scheme)
    drop(page, radiographs | {"x" * 120 + ".txt": b"a letter"})
    sync_api.expect(page.get_by_role("status")).to_have_text("2 done, 2 failed")
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    assert page.get_by_text("Not for clinical use.").is_visible()
    for selector in ("h1", "#drop strong", ".quiet", ".problem", "button"):
        assert contrast(page, selector) >= 4.5, selector


def contrast(page, selector):
    """Contrast of an element's text to the ground behind it (WCAG 2.2)."""
    colours = page.locator(selector).first.evaluate("""(element) => {
      let ground = element;
      while (getComputedStyle(ground).backgroundColor === "rgba(0, 0, 0, 0)") {
        ground = ground.parentElement;
      }
      return [getComputedStyle(element).color, getComputedStyle(ground).backgroundColor]
        .map((colour) => colour.match(/[0-9.]+/g).slice(0, 3).map(Number));
    }""")
    shares = np.array(colours) / 255
    linear = np.where(shares <= 0.04045, shares / 12.92, ((shares + 0.055) / 1.055) ** 2.4)
    dark, bright = sorted(linear @ [0.2126, 0.7152, 0.0722])
    return (bright + 0.05) / (dark + 0.05)
