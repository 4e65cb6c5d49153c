"""Who may ask: names, other sites' pages, tokens; and what keeps a page to itself."""

import pytest

from instaflow.serving.guard import Guard
from tests.serving.made import HeldBack, served

TOKEN = "a token of the test's own"
BODY = {"prompt": "a seven"}


@pytest.fixture(scope="module")
def server():
    painter = HeldBack()
    painter.let_go()
    with served(painter) as server:
        yield server


@pytest.fixture(scope="module")
def locked():
    painter = HeldBack()
    painter.let_go()
    with served(painter, TOKEN) as server:
        yield server


@pytest.mark.parametrize("name", ["localhost", "my.name:80", "127.0.0.1:80", "[::1]:9000", "LOCALHOST:1"])
def test_this_machines_own_names_pass(server, name):
    assert server.ask(BODY, Host=name).status == 200


def test_a_server_at_another_address_of_this_machine_alone_is_asked_by_it():
    painter = HeldBack()
    painter.let_go()
    with served(painter, address="127.0.0.2") as server:
        assert server.ask(BODY).status == 200
        assert server.ask(BODY, Host="127.0.0.3").refusal[0] == 403


@pytest.mark.parametrize("name", ["evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "", "[", "a@b"])
def test_another_name_that_leads_here_is_refused(server, name):
    assert server.ask(path="/", Host=name).refusal[0] == 403
    assert server.ask(BODY, Host=name).refusal[0] == 403


@pytest.mark.parametrize(
    "origin", ["http://evil.example", "null", "http://127.0.0.1:1", "https://localhost", "http://["]
)
def test_another_sites_page_may_not_ask(server, origin):
    assert server.ask(BODY, Origin=origin).refusal[0] == 403


def test_a_page_that_is_not_this_ones_may_not_ask_even_without_an_origin(server):
    assert server.ask(BODY, Sec_Fetch_Site="cross-site").refusal[0] == 403


def test_the_own_page_may(server):
    assert server.ask(BODY, Origin=server.url.rstrip("/")).status == 200


@pytest.mark.parametrize("path", ["/", "/api/models", "/page.js", "/nowhere"])
def test_every_answer_keeps_to_itself(server, path):
    headers = server.ask(path=path).headers
    policy = dict(rule.split(" ", 1) for rule in headers["content-security-policy"].split("; "))
    assert policy.pop("default-src") == "'self'" and policy.pop("img-src") == "'self' blob: data:"
    assert policy == dict.fromkeys(["object-src", "base-uri", "form-action", "frame-ancestors"], "'none'")
    assert (headers["x-content-type-options"], headers["referrer-policy"]) == ("nosniff", "no-referrer")
    assert headers["cross-origin-resource-policy"] == headers["cross-origin-opener-policy"] == "same-origin"
    assert headers["cache-control"] == "no-store"
    assert "access-control-allow-origin" not in headers


def test_a_token_is_asked_for_everywhere(locked):
    for path in ("/", "/page.js", "/api/models", "/api/health", "/nowhere"):
        assert locked.ask(path=path).refusal == (401, "This server wants its token")
    assert locked.ask(BODY).status == 401
    page = locked.ask(path="/", Accept="text/html")
    assert page.status == 401 and b"open the address that it printed" in page.content


@pytest.mark.parametrize("given", ["", "Bearer ", f"Bearer {TOKEN[:-1]}", f"Bearer {TOKEN}x", "Bearer é"])
def test_a_wrong_token_is_refused(locked, given):
    assert locked.ask(BODY, Authorization=given).status == 401


def test_a_token_passes_as_a_header(locked):
    assert locked.ask(BODY, Authorization=f"Bearer {TOKEN}").status == 200


def test_a_token_in_the_address_becomes_a_cookie(locked):
    from urllib.parse import quote

    answer = locked.ask(path=f"/?token={quote(TOKEN)}")
    assert (answer.status, answer.headers["location"]) == (303, "/")
    cookie = answer.headers["set-cookie"]
    assert "HttpOnly" in cookie and "SameSite=lax" in cookie and TOKEN not in cookie
    assert cookie.startswith(f"instaflow-{locked.port}=")
    assert locked.ask(BODY, Cookie=cookie.partition(";")[0]).status == 200
    assert locked.ask(path="/?token=wrong").status == 401
    assert locked.ask(BODY, path=f"/api/images?token={quote(TOKEN)}").status == 401  # where it would stay in logs


def test_a_token_does_not_open_for_another_sites_page(locked):
    headers = {"Authorization": f"Bearer {TOKEN}", "Origin": "http://evil.example"}
    assert locked.ask(BODY, **headers).status == 403


def test_a_server_under_any_name_wants_a_token():
    with pytest.raises(ValueError, match="token"):
        Guard(None, hosts=None, token=None)
