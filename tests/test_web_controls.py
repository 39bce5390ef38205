"""What web/controls.js promises in a real browser: mouse, fingers and a gamepad become the same chords.

No model is needed: the page says that there is none, and its controls work all the same.
"""

import functools
import http.server
import threading

import pytest
from test_play import chromium as chromium  # the fixture
from test_web import WEB

SIZE = {"width": 900, "height": 700}


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *about: object) -> None:
        pass


@pytest.fixture
def tab(chromium):
    """The page, and who can touch it."""
    handler = functools.partial(Quiet, directory=str(WEB))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        context = chromium.new_context(viewport=SIZE, has_touch=True)
        page = context.new_page()
        page.goto(f"http://127.0.0.1:{server.server_port}/")
        page.wait_for_function("window.page && banner.textContent")
        yield page
        context.close()
        server.shutdown()


def decided(tab, n: int = 8) -> list[str]:
    return tab.evaluate(f"page.controls.decide({n})")


def middle(tab, name: str) -> tuple[float, float, float]:
    """x, y and width of an element."""
    box = tab.locator(name).bounding_box()
    return box["x"] + box["width"] / 2, box["y"] + box["height"] / 2, box["width"]


@pytest.mark.browser
def test_dragging_on_the_picture_looks_around(tab) -> None:
    x, y, width = middle(tab, "#screen")
    tab.mouse.move(x, y)
    tab.mouse.down()
    tab.mouse.move(x + width / 4, y, steps=5)  # 30 of 120 degrees: twenty frames of a look key
    tab.mouse.up()
    assert decided(tab, 40) == ["l"] * 20 + ["_"] * 20
    assert decided(tab) == ["_"] * 8, "what was turned is turned once"

    # a quick turn is a faster key, up to what training has seen
    tab.mouse.down()
    tab.mouse.move(x, y - width / 8)
    tab.mouse.up()
    chord, *rest = decided(tab)
    assert chord.startswith("j2.5") or "j2.5" in chord.split("+")
    assert set(rest) == {chord} and "i1.3" in chord.split("+")


@pytest.mark.browser
def test_one_thumb_walks_while_a_finger_looks(tab) -> None:
    tab.evaluate("document.body.dataset.touch = true")
    touch = tab.context.new_cdp_session(tab)
    x, y, width = middle(tab, "#thumb")
    thumb = {"x": x + width / 3, "y": y - width / 3, "id": 0}
    screen_x, screen_y, screen_width = middle(tab, "#screen")
    finger = {"x": screen_x, "y": screen_y, "id": 1}
    moved = finger | {"x": screen_x + screen_width / 10}

    def fingers(kind: str, *points: dict) -> None:
        touch.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": list(points)})

    fingers("touchStart", thumb)
    assert decided(tab) == ["w+d"] * 8
    fingers("touchStart", thumb, finger)
    fingers("touchMove", thumb, moved)
    assert decided(tab) == ["w+d+l"] * 8
    fingers("touchEnd")
    assert decided(tab) == ["_"] * 8
    assert tab.evaluate("document.querySelector('#thumb span').style.translate") == ""


@pytest.mark.browser
def test_the_sticks_of_a_gamepad_walk_and_look(tab) -> None:
    tab.evaluate(
        "navigator.getGamepads = () => [null, window.pad].filter((pad) => pad !== undefined)"
    )
    tab.evaluate("window.pad = { axes: [0.1, -1, 0.8, 0] }")
    assert decided(tab) == ["w+l"] * 8, "small deflections are rest"
    tab.evaluate("window.pad = { axes: [-1, 0.2, 0, 0.9] }")
    assert decided(tab) == ["a+k"] * 8
    tab.evaluate("window.pad = undefined")
    assert decided(tab) == ["_"] * 8, "one that was unplugged holds nothing"


@pytest.mark.browser
def test_keys_are_let_go_when_the_page_loses_the_focus(tab) -> None:
    tab.keyboard.down("KeyW")
    assert decided(tab) == ["w"] * 8
    tab.evaluate("dispatchEvent(new Event('blur'))")
    assert decided(tab) == ["_"] * 8
