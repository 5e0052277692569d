"""Who may read the page: what names this machine, and nobody who would change anything."""

import pytest

from aiosgd.dashboard import guard


@pytest.mark.parametrize(
    ("host", "ours"),
    [
        ("127.0.0.1", True),
        ("127.0.0.1:8050", True),
        ("127.3.2.1:1", True),
        ("localhost", True),
        ("LOCALHOST:80", True),
        ("[::1]:8050", True),
        ("[::1]", True),
        ("", False),
        (":8050", False),
        ("evil.example", False),
        ("evil.example:8050", False),
        ("localhost.evil.example", False),
        ("127.0.0.1.evil.example:8050", False),
        ("127.0.0.1:80@evil.example", False),
        ("192.168.1.2:8050", False),
        ("0.0.0.0:8050", False),
        ("[::]:8050", False),
        ("localhost:80:80", False),
    ],
)
def test_a_host_header_names_this_machine_or_is_refused(host, ours):
    assert guard.names_this_machine(host) is ours


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.2", "example.org", ""])
def test_what_others_can_reach_is_no_loopback(host):
    assert not guard.is_loopback(host)


async def answered(host=b"127.0.0.1:8050", method="GET", kind="http", hosts=None):
    """Return what a guarded app sends, and whether the app was reached."""
    sent, reached = [], []

    async def app(scope, receive, send):
        reached.append(scope["type"])
        headers = [(b"content-type", b"text/html"), (b"cache-control", b"public")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b"page"})

    async def send(message):
        sent.append(message)

    headers = [(b"host", one) for one in ([host] if hosts is None else hosts)]
    await guard.guarded(app)({"type": kind, "headers": headers, "method": method}, None, send)
    return sent, reached


async def test_what_is_allowed_is_answered_with_a_policy():
    [start, body], reached = await answered()
    headers = dict(start["headers"])
    assert (start["status"], body["body"], reached) == (200, b"page", ["http"])
    policy = headers[b"content-security-policy"].decode()
    assert policy.startswith("default-src 'none'; ")
    assert "unsafe" not in policy
    assert "frame-ancestors 'none'" in policy
    assert headers[b"cache-control"] == b"no-store"
    assert len(start["headers"]) == len(headers)


@pytest.mark.parametrize(
    "hosts", [[b"evil.example"], [], [b"localhost", b"evil.example"], [b"\xff"]]
)
async def test_another_host_is_refused_before_anything_is_read(hosts):
    [start, body], reached = await answered(hosts=hosts)
    assert (start["status"], reached) == (421, [])
    assert b"localhost alone" in body["body"]
    assert b"content-security-policy" in dict(start["headers"])


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "CONNECT"])
async def test_nothing_can_be_changed(method):
    [start, _], reached = await answered(method=method)
    assert (start["status"], reached) == (405, [])


async def test_sockets_are_not_spoken_to_and_the_servers_own_events_pass():
    assert await answered(kind="websocket") == ([], [])
    assert (await answered(kind="lifespan"))[1] == ["lifespan"]
