"""The page in a real browser: it works from disk, asks for nothing, and the map answers to pointer, wheel and keys.

Selenium, because its driver comes from the browser's own package, so that the two always fit, and it is a few
megabytes; a browser that a test would have to download is none.
"""

import json
import shutil
import time

import numpy as np
import pytest
import torch

from sslpre.report import gallery, sprite
from sslpre.report.history import Curve, History
from sslpre.report.page import Content, page

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="no chromium and chromedriver on this machine")
FLAGS = (
    "headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking disable-component-update "
    "disable-sync disable-dev-shm-usage"
)
NAMES = ["<img src=x onerror=alert(1)>.png", "\"quotes' &amp;.png", "new\nline.png", "gnp\u202egpj.png"]


@pytest.fixture(scope="module")
def html(tmp_path_factory):
    """A page of 200 images in three folders, whose names want to be more than names."""
    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    folders = np.arange(200) % 3
    raw = torch.randn(200, 8) + 4 * torch.eye(8)[torch.from_numpy(folders)]
    sheet, across = sprite.sheet(rng.integers(0, 256, (200, 16, 16, 3), np.uint8))
    names = [NAMES[i] if i < len(NAMES) else f"</script><b>{i}</b>.png" for i in range(200)]
    picked = gallery.Picked(
        names, folders, ["cat", "<b>dog", "\u202eeel"], 200, 0, "./images", sheet, across, [[0, 1]], [(2, 3)]
    )
    curve = Curve([1, 2, 3], [3.0, 2.0, 1.0])
    log = History({"loss": curve, "<i>term": curve, "health.std": curve}, curve, "healthy", "", 3, 3, 1.0, 0.5, 48.0)
    content = Content(
        run="runs/<u>simclr-1",
        about=["simclr"],
        state="finished",
        step=3,
        steps=3,
        history=log,
        judged="loss",
        recipe='[method]\nname = "</pre><script>alert(1)</script>"',
        written="now",
        images="./images",
        picked=picked,
        seen=gallery.look(raw, spread=False),
    )
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(page(content), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in FLAGS.split():
        options.add_argument(f"--{flag}")
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('profile')}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def opened(browser, html):
    """The page, fresh, at 1280 × 900; after the test nothing was asked for and nothing went wrong."""
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    browser.set_window_size(1280, 900)
    browser.get("about:blank")
    browser.get_log("performance")  # what the browser does of itself when it starts
    browser.get(html.as_uri())
    browser.execute_script("document.getElementById('map').scrollIntoView({block: 'center'})")
    yield browser
    assert browser.get_log("browser") == []
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
    assert asked and all(url.startswith(("data:", html.as_uri())) for url in asked)


def view(browser):
    box = browser.execute_script("return document.querySelector('#map > svg').getAttribute('viewBox')")
    return [float(part) for part in box.split()]


def place(browser, at):
    """Where dot `at` is on the screen."""
    script = """const [x, y] = JSON.parse(document.getElementById("points").textContent).xy[arguments[0]];
    const map = document.getElementById("map"), edges = map.getBoundingClientRect();
    const [left, top, side] = map.querySelector("svg").getAttribute("viewBox").split(" ").map(Number);
    return [edges.left + map.clientLeft + (x - left) * map.clientWidth / side,
            edges.top + map.clientTop + (y - top) * map.clientWidth / side];"""
    return browser.execute_script(script, at)


def under(browser, x, y):
    """What of the map lies at a place on the screen."""
    edges = browser.execute_script(
        "const m = document.getElementById('map'), r = m.getBoundingClientRect();"
        "return [r.left + m.clientLeft, r.top + m.clientTop, m.clientWidth]"
    )
    left, top, side, _ = view(browser)
    return [left + (x - edges[0]) * side / edges[2], top + (y - edges[1]) * side / edges[2]]


def mouse(browser, kind, x, y, **more):
    browser.execute_cdp_cmd("Input.dispatchMouseEvent", {"type": kind, "x": x, "y": y, **more})


def touch(browser, kind, *points):
    where = [{"x": x, "y": y, "id": number} for number, (x, y) in enumerate(points)]
    browser.execute_cdp_cmd("Input.dispatchTouchEvent", {"type": kind, "touchPoints": where})


def key(browser, name):
    for kind in ("keyDown", "keyUp"):
        text = {"text": name} if len(name) == 1 and kind == "keyDown" else {}
        browser.execute_cdp_cmd("Input.dispatchKeyEvent", {"type": kind, "key": name, **text})


def until(browser, script):
    """What `script` returns, as soon as it is anything."""
    ends = time.monotonic() + 20
    while time.monotonic() < ends:
        found = browser.execute_script(script)
        if found:
            return found
        time.sleep(0.05)
    raise AssertionError(f"never: {script}")


TIP = "const tip = document.querySelector('.tip'); return !tip.hidden && tip.querySelector('b').textContent"


@pytest.mark.parametrize(
    ("at", "shown"), [(0, NAMES[0]), (1, NAMES[1]), (2, "new\\nline.png"), (3, "gnp\\u202egpj.png")]
)
def test_pointing_at_a_dot_shows_its_image_and_its_name_as_text(opened, at, shown):
    # dots lie on each other: only this one is left in the way of the pointer
    for _ in range(40):
        if view(opened)[2] <= 0.5:
            break
        x, y = place(opened, at)
        mouse(opened, "mouseWheel", x, y, deltaX=0, deltaY=-400)
        until(opened, f"return document.querySelector('#map > svg').getAttribute('viewBox') != '{view(opened)}'")
    x, y = place(opened, at)
    mouse(opened, "mouseMoved", x - 60, y - 60)
    mouse(opened, "mouseMoved", x, y)
    assert until(opened, TIP) == shown
    found = opened.execute_script(
        "const t = document.querySelector('.tip .t'), s = getComputedStyle(t);"
        "return [s.backgroundImage.slice(0, 20), t.style.getPropertyValue('--x'), t.style.getPropertyValue('--y'),"
        "document.querySelectorAll('.tip img, .tip script').length]"
    )
    assert found == ['url("data:image/webp', str(at % 15), str(at // 15), 0]
    mouse(opened, "mouseMoved", x + 400, y)
    mouse(opened, "mouseMoved", 5, 5)
    until(opened, "return document.querySelector('.tip').hidden")


def test_the_wheel_zooms_about_the_pointer_and_dragging_moves(opened):
    assert view(opened) == [0, 0, 100, 100]
    x, y = map(round, place(opened, 5))
    pointed = under(opened, x, y)
    for _ in range(6):
        mouse(opened, "mouseWheel", x, y, deltaX=0, deltaY=-300)
    until(opened, "return Number(document.querySelector('#map > svg').getAttribute('viewBox').split(' ')[2]) < 10")
    assert under(opened, x, y) == pytest.approx(pointed, abs=1e-3)
    thumbs = until(opened, "return document.querySelectorAll('.layer .t').length")
    assert 1 <= thumbs <= 60
    before = place(opened, 5)
    mouse(opened, "mousePressed", x, y, button="left", buttons=1)
    mouse(opened, "mouseMoved", x - 50, y + 30, button="left", buttons=1)
    mouse(opened, "mouseReleased", x - 50, y + 30, button="left")
    assert place(opened, 5) == pytest.approx([before[0] - 50, before[1] + 30], abs=1)
    opened.execute_script("document.querySelector('[data-do=all]').click()")
    assert view(opened) == [0, 0, 100, 100]


def test_two_fingers_zoom(opened):
    opened.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": True, "maxTouchPoints": 2})
    x, y = place(opened, 5)
    touch(opened, "touchStart", (x - 40, y), (x + 40, y))
    for apart in (60, 80, 120):
        touch(opened, "touchMove", (x - apart, y), (x + apart, y))
    touch(opened, "touchEnd")
    opened.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": False})
    assert view(opened)[2] == pytest.approx(100 / 3, rel=0.02)


def test_the_keyboard_reaches_every_image(opened):
    opened.execute_script("document.querySelector('#map > svg').focus()")
    key(opened, "ArrowRight")
    first = until(opened, TIP)
    key(opened, "ArrowLeft")
    second = until(opened, TIP)
    assert second != first
    assert opened.execute_script("return document.getElementById('said').textContent").startswith(second)
    key(opened, "+")
    assert view(opened)[2] == pytest.approx(70)
    key(opened, "0")
    key(opened, "Escape")
    assert view(opened)[2] == 100 and opened.execute_script("return document.querySelector('.tip').hidden")


def test_colours_follow_the_choice_and_a_legend_leaves_one_group(opened):
    colour = "return getComputedStyle(document.querySelector('#map .f1')).stroke"
    by_folder = opened.execute_script(colour)
    opened.execute_script("document.getElementById('by-k').click()")
    legend = "return getComputedStyle(document.querySelector('.legend.by-{}')).display"
    assert opened.execute_script(legend.format("f")) == "none" and opened.execute_script(legend.format("k")) == "flex"
    cluster = opened.execute_script("return document.querySelector('#map .f1').classList[1]")
    if cluster != "k1":
        assert opened.execute_script(colour) != by_folder
    opened.execute_script("document.getElementById('by-f').click()")
    assert opened.execute_script(colour) == by_folder
    opened.execute_script("document.querySelector('[data-only=f1]').click()")
    faint = opened.execute_script("return document.querySelectorAll('#map path.faint').length")
    assert faint == 200 - 67


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_both_themes_can_be_read_and_nothing_sticks_out(opened, theme, width):
    opened.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": theme}]}
    )
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    opened.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    assert opened.execute_script("return document.documentElement.scrollWidth") <= width
    worst = opened.execute_script(CONTRAST)
    assert worst[0] >= 4.5, worst
    dark = opened.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, dark[4:-1].split(","))) < 384) is (theme == "dark")


# the least contrast (WCAG 2, 1.4.3) of the page's texts, those of curves among them, with what is behind them
CONTRAST = """
const number = (colour) => colour.match(/[\\d.]+/g).map(Number);
const light = ([r, g, b]) => [r, g, b].map((v) => v / 255)
  .map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
  .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
const behind = (one) => { for (; one; one = one.parentElement) {
  const colour = number(getComputedStyle(one).backgroundColor);
  if (colour.length < 4 || colour[3] > 0) return colour; } return [255, 255, 255]; };
let worst = [99, ""];
const words = "p, h1, h2, h3, li, a, th, td, figcaption, code, pre, small, b, .plot text";
for (const one of document.querySelectorAll(words)) {
  const style = getComputedStyle(one);
  const pair = [light(number(one.tagName === "text" ? style.fill : style.color)), light(behind(one))];
  const ratio = (Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05);
  if (ratio < worst[0]) worst = [ratio, one.outerHTML.slice(0, 200)];
}
return worst;
"""
