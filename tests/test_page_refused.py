import socket
import time

import pytest
from pages import ask, watch, wish

import play

WISHES = (
    "",
    "{",
    "[" * 1999,
    '{"looks": "\\ud800"}',
    '{"prompt": "a \\udfff star"}',
    '{"paused": 1}',
    "[]",
    "3",
    '{"action": "jump"}',
    '{"action": 7}',
    '{"prompt": ""}',
    '{"looks": "!!!"}',
    '{"prompt": 5}',
    '{"a": 1, "b": 2}',
    "x" * 5000,
    b"\xff\xfe",
)


@pytest.mark.parametrize("junk", WISHES, ids=range(len(WISHES)))
def test_junk_is_refused_and_harms_nothing(page, junk):
    port, show = page
    assert wish(port, junk) == 400
    assert show.state()["action"] == "none"
    assert watch(port, 2)


@pytest.mark.parametrize("junk", ["{", '{"looks": "\\ud800"}', b"\xff\xfe"])
def test_what_is_no_json_is_told_in_plain_words(page, junk):
    json_type = {"Content-Type": "application/json"}
    assert ask(page[0], "POST", "/steer", junk, **json_type)[1] == b"a wish is JSON in UTF-8"


def test_a_body_shorter_than_it_says_is_soon_refused(page):
    json_type = {"Content-Type": "application/json", "Content-Length": "99"}
    started = time.monotonic()
    assert ask(page[0], "POST", "/steer", "{}", **json_type)[0] == 408
    assert time.monotonic() - started < 10


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("POST", "/other", 400),
        ("GET", "/../play.py", 404),
        ("GET", "/frame", 404),
        ("GET", "/frame?after=x", 404),
        ("PUT", "/", 501),
    ],
)
def test_there_is_nothing_but_the_page(page, method, path, status):
    json_type = {"Content-Type": "application/json"}
    assert ask(page[0], method, path, "{}", **json_type)[0] == status


def test_a_name_that_leads_here_is_not_this_machine(page):
    assert ask(page[0], "GET", "/", Host="example.com")[0] == 403


FOREIGN = (
    {"Origin": "http://example.com"},
    {"Origin": "null"},
    {"Origin": "http://127.0.0.1:1"},
    {"Sec-Fetch-Site": "cross-site"},
    {"Sec-Fetch-Site": "same-site"},
)


@pytest.mark.parametrize("headers", FOREIGN, ids=range(len(FOREIGN)))
def test_another_sites_page_cannot_steer_this_one(page, headers):
    port, show = page
    assert wish(port, '{"action": "up"}', **headers) == 403
    assert show.action == "none"


@pytest.mark.parametrize("path", ["/frame?after=0", "/state"])
def test_another_sites_page_cannot_watch(page, path):
    assert ask(page[0], "GET", path, **{"Sec-Fetch-Site": "cross-site"})[0] == 403


def test_another_sites_page_can_link_to_this_one(page):
    assert ask(page[0], "GET", "/", **{"Sec-Fetch-Site": "cross-site"})[0] == 200


def test_the_page_itself_can_steer(page):
    port, _ = page
    own = {"Origin": f"http://127.0.0.1:{port}", "Sec-Fetch-Site": "same-origin"}
    assert wish(port, '{"action": "up"}', **own) == 200


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded"])
def test_a_form_cannot_steer(page, kind):
    port, show = page
    assert wish(port, '{"action": "up"}', **{"Content-Type": kind}) == 415
    assert show.action == "none"


def test_bytes_that_are_no_request_harm_nothing(page):
    port, _ = page
    with socket.create_connection(("127.0.0.1", port)) as junk:
        junk.sendall(b"\x00\xff nonsense\r\n\r\n")
        junk.recv(1000)
    assert watch(port, 2)


def test_a_port_that_is_taken_is_named(page, command_line):
    status, _, err = command_line(play, "--port", page[0])
    assert status == 2
    assert "choose another with --port" in err
