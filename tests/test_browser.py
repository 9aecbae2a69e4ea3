import json
import os
import subprocess
import time

import pytest
from pages import plain_frames, player, running, until

from page import Show
from play import NAMES

CHROMIUM = os.environ.get("CHROMIUM")  # the path of a Chromium, for the tests in a browser
FLAGS = (
    "headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking "
    "disable-component-update disable-sync window-size=500,600 remote-debugging-pipe"
)


class Browser:
    """Chromium, told what to do in the DevTools protocol over a pair of pipes."""

    def __init__(self, folder):
        (listens, tells), (hears, answers) = os.pipe(), os.pipe()
        command = [CHROMIUM, *(f"--{flag}" for flag in FLAGS.split()), f"--user-data-dir={folder}"]
        shell = f'exec "$@" 3<&{listens} 4>&{answers} 2>/dev/null'
        ends = (listens, answers)
        self.process = subprocess.Popen(["bash", "-c", shell, "-", *command], pass_fds=ends)
        for end in ends:
            os.close(end)
        self.tells, self.hears = os.fdopen(tells, "wb", 0), os.fdopen(hears, "rb", 0)
        self.count, self.session = 0, {}

    def tell(self, method, **params):
        self.count += 1
        message = {"id": self.count, "method": method, "params": params} | self.session
        self.tells.write(json.dumps(message).encode() + b"\0")
        while True:
            answer = json.loads(b"".join(iter(lambda: self.hears.read(1), b"\0")))
            if answer.get("id") == self.count:
                return answer["result"]

    def open(self, url):
        target = self.tell("Target.createTarget", url=url)["targetId"]
        attached = self.tell("Target.attachToTarget", targetId=target, flatten=True)
        self.session = {"sessionId": attached["sessionId"]}

    def run(self, script):
        given = {"expression": script, "awaitPromise": True, "returnByValue": True}
        return self.tell("Runtime.evaluate", **given)["result"].get("value")

    def key(self, code, kind="keyDown"):
        self.tell("Input.dispatchKeyEvent", type=kind, code=code, key=code)


@pytest.fixture(scope="module")
def tab(tmp_path_factory):
    """A page that runs in a browser: (the browser, its Show)."""
    if not CHROMIUM:
        pytest.skip("CHROMIUM names no browser")
    with running(Show(player, plain_frames)) as (port, show):
        browser = Browser(tmp_path_factory.mktemp("browser"))
        browser.open(f"http://127.0.0.1:{port}/?x=1")
        try:
            assert until(lambda: show.number > 2)
            assert until(lambda: browser.run("at('words').textContent"))
            yield browser, show
        finally:
            browser.session = {}
            browser.tell("Browser.close")
            browser.process.wait(20)


def test_the_picture_has_the_focus_and_gets_it_back_from_a_form(tab):
    browser, show = tab
    assert browser.run("document.activeElement.id") == "picture"
    browser.run("at('looks').firstElementChild.focus()")
    browser.run("at('looks').firstElementChild.value = 'a blue star'")
    browser.run("at('looks').lastElementChild.click()")
    assert until(lambda: show.looks == "a blue star")
    assert browser.run("document.activeElement.id") == "picture"


def test_of_two_keys_the_latest_counts_and_the_other_resumes(tab):
    browser, show = tab
    for code, kind, action in (
        ("ArrowRight", "keyDown", "right"),
        ("KeyW", "keyDown", "up"),
        ("KeyW", "keyUp", "right"),
        ("ArrowRight", "keyUp", "none"),
    ):
        browser.key(code, kind)
        assert until(lambda action=action: show.action == action)


LETTERS = {"KeyW": "up", "KeyA": "left", "KeyS": "down", "KeyD": "right"}


@pytest.mark.parametrize(("code", "action"), [*LETTERS.items()])
def test_four_letters_are_actions_too(tab, code, action):
    browser, show = tab
    browser.key(code)
    assert until(lambda: show.action == action)
    browser.key(code, "keyUp")
    assert until(lambda: show.action == "none")


def test_letters_in_a_form_are_no_actions(tab):
    browser, show = tab
    browser.run("at('prompt').firstElementChild.focus()")
    browser.key("KeyW")
    browser.key("KeyW", "keyUp")
    time.sleep(0.2)
    assert show.action == "none"
    browser.run("at('picture').focus()")


def test_a_tap_lasts_long_enough_to_show(tab):
    browser, show = tab
    browser.key("ArrowLeft")
    browser.key("ArrowLeft", "keyUp")
    assert until(lambda: show.mark and NAMES.index("left") in show.mark["actions"])
    assert until(lambda: show.action == "none")


def test_the_space_bar_pauses(tab):
    browser, show = tab
    for paused in (True, False):
        browser.key("Space")
        browser.key("Space", "keyUp")
        assert until(lambda paused=paused: show.paused == paused)


def test_an_error_is_seen_on_the_page_until_a_wish(tab):
    browser, show = tab
    show.error = "RuntimeError: too bad"
    assert until(lambda: "too bad" in browser.run("at('problem').textContent"))
    browser.run("steer({action: 'none'})")
    assert until(lambda: not browser.run("at('problem').textContent"))


@pytest.mark.parametrize("size", [(320, 568), (375, 667), (1280, 720)])
def test_all_buttons_to_play_with_are_in_sight(tab, size):
    browser, _ = tab
    shape = {"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": size[0] < 500}
    browser.tell("Emulation.setDeviceMetricsOverride", **shape)
    script = "[...document.querySelectorAll('#keys button')].map(b => b.getBoundingClientRect())"
    for box in json.loads(browser.run(f"JSON.stringify({script})")):
        assert 0 <= box["left"] < box["right"] <= size[0]
        assert 0 <= box["top"] < box["bottom"] <= size[1]


def test_ten_tabs_in_one_browser_all_see_frames(tab):
    browser, _ = tab
    script = """new Promise(async done => {
        const tabs = [...Array(10)].map(() => document.createElement("iframe"));
        tabs.forEach(tab => { tab.src = "/"; document.body.append(tab); });
        const dark = tab => {
            const picture = tab.contentDocument?.getElementById("picture");
            return !picture || !picture.getContext("2d").getImageData(9, 9, 1, 1).data[3];
        };
        for (let wait = 0; tabs.some(dark) && wait < 200; wait++) await sleep(100);
        done(tabs.filter(dark).length);
        tabs.forEach(tab => tab.remove());
    })"""
    assert browser.run(script) == 0
