"""The dashboard as people meet it: its command, what it answers over HTTP, and its page in Chromium."""

import http.client
import re
import signal
import socket

import pytest
from browser import Browser, binary

from aiosgd.dashboard.page import View, files
from aiosgd.dashboard.stream import VIEWERS
from aiosgd.runtime.config import Address, Cluster

pytest.importorskip("starlette", reason="the extra `dashboard` is not installed")
pytest.importorskip("uvicorn", reason="the extra `dashboard` is not installed")
pytestmark = pytest.mark.extra

needs_chromium = pytest.mark.skipif(binary() is None, reason="no Chromium on this machine")


@pytest.fixture
def shown(start_nodes, cluster_of, write_cluster, start_command):
    """`shown(count)`: nodes, their cluster.toml, the dashboard's process and its address."""

    def start(count=1):
        nodes = start_nodes(count)
        path = write_cluster(cluster_of(nodes))
        process = start_command("dashboard", path, "--port", 0)
        address = process.wait_for(r"^dashboard on http://(127\.0\.0\.1:\d+)\n$")[1]
        return nodes, path, process, address

    return start


def ask(address, path="/", method="GET", **headers):
    link = http.client.HTTPConnection(address, timeout=10)
    link.request(method, path, headers=headers)
    answer = link.getresponse()
    return answer, link


def check_refused_elsewhere(port):
    """No address of this machine but loopback has that port open."""
    found = socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)
    for host in {info[4][0] for info in found}:
        if not host.startswith("127."):
            with pytest.raises(OSError, match="refused"):
                socket.create_connection((host, port), 5)


def test_what_is_asked_over_http_is_answered_or_refused(shown):
    _, path, process, address = shown()
    answer, link = ask(address)
    assert (answer.status, answer.headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert "unsafe" not in answer.headers["content-security-policy"]
    assert path.name in answer.read().decode()
    link.close()
    for name, (text, kind) in files().items():
        answer, link = ask(address, f"/{name}")
        assert answer.headers["content-type"].startswith(kind)
        assert answer.read().decode() == text
        link.close()
    for words, status in (
        (("/nothing",), 404),
        (("/../../etc/passwd",), 404),
        (("/", "POST"), 405),
        (("/events", "DELETE"), 405),
    ):
        answer, link = ask(address, *words)
        assert answer.status == status
        link.close()
    heads = [ask(address, "/events", "HEAD") for _ in range(VIEWERS + 1)]  # none takes a place
    for answer, link in heads:
        assert answer.status == 200
        assert answer.headers["content-type"].startswith("text/event-stream")
        link.close()
    answer, link = ask(address, Host="evil.example")
    assert answer.status == 421
    link.close()
    answer, link = ask(address, f"/events?by={View().by}")
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.readline() == b"retry: 1000\n"
    check_refused_elsewhere(int(address.rpartition(":")[2]))
    process.signal(signal.SIGINT)  # the open stream does not keep it
    assert process.end() == 0
    assert process.err == ""
    link.close()


def test_a_port_that_is_taken_is_named(command, write_cluster):
    path = write_cluster(Cluster((Address("127.0.0.1", 9001),)))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = command("dashboard", path, "--port", port)
    assert (done.code, done.out) == (3, "")
    assert done.err == (
        f"aiosgd: cannot listen on 127.0.0.1:{port}: Address already in use; --port 0 picks a free "
        "one\n"
    )


def test_a_secret_of_the_cluster_is_used(
    start_nodes, cluster_of, write_cluster, start_command, tmp_path
):
    secret = tmp_path / "secret"
    secret.write_bytes(b"x" * 32)
    secret.chmod(0o600)
    nodes = start_nodes(1, "--secret-file", secret)
    path = write_cluster(cluster_of(nodes), f'[security]\nsecret_file = "{secret}"\n')
    process = start_command("dashboard", path, "--port", 0)
    answer, link = ask(process.wait_for(r"http://(\S+)\n")[1], "/events")
    while b"workers[0]" not in (line := answer.readline()):
        pass
    assert b"free" in line
    link.close()


# In a browser -------------------------------------------------------------------------------------

HEAD = "document.getElementById('head').innerText"


def contains(part, text):
    return f"document.getElementById('{part}').innerText.includes({text!r})"


@needs_chromium
def test_a_page_follows_a_cluster_through_everything(shown, start_command):
    nodes, path, process, address = shown(2)
    with Browser() as page:
        page.open(f"http://{address}")
        page.until(contains("head", "no job runs, and there was none yet"))
        # a job begins
        job = start_command("submit", path, "--epochs", 1_000_000, "--title", "first")
        page.until(contains("head", "running"))
        page.until("document.querySelectorAll('#curves svg.by-step').length >= 4")
        assert page.read("document.querySelector('#curves').innerText.includes('Training loss')")
        # what the reader does outlives new contents
        page.until("!!document.querySelector('#about summary')")
        page.read("document.querySelector('#about summary').click()")
        page.read("document.querySelector('#about summary').focus()")
        page.read("document.getElementById('by-time').click()")
        page.until("document.querySelectorAll('#curves svg.by-time').length >= 4")
        page.until("!document.querySelector('#curves svg.by-step')")
        before = page.read("document.querySelector('#head .progress').innerText")
        page.until(f"document.querySelector('#head .progress').innerText !== {before!r}")
        assert page.read("document.querySelector('#about details').open")
        assert page.read("document.activeElement.tagName") == "SUMMARY"
        # it ends, and the next begins
        job.signal(signal.SIGINT)
        assert job.end() == 130
        page.until(contains("head", "cancelled"))
        other = start_command("submit", path, "--epochs", 1_000_000, "--title", "second")
        page.until(contains("head", "-second-"))
        # a node is lost, with the job
        nodes[1].process.signal(signal.SIGTERM)
        page.until(contains("nodes", "no answer"))
        other.end()
        page.until(contains("head", "failed"))
        # all are, and one comes back
        nodes[0].process.signal(signal.SIGTERM)
        page.until(contains("head", "No node answers"))
        assert [node.process.end() for node in nodes] == [0, 0]
        back = start_command("node", "--port", nodes[0].address.port, "--run-dir", nodes[0].run_dir)
        page.until(f"!{contains('head', 'No node answers')}")
        assert page.problems == []
        assert {re.sub(r"/[^/]*$", "", url) for url in page.asked} == {f"http://{address}"}
        # the dashboard itself goes and comes back
        process.signal(signal.SIGTERM)
        assert process.end() == 0
        page.until(contains("link", "no connection"))
        again = start_command("dashboard", path, "--port", address.rpartition(":")[2])
        page.until("document.getElementById('link').innerText === 'live'")
        for one in (again, back):
            one.signal(signal.SIGTERM)
            assert one.end() == 0


@needs_chromium
def test_a_page_has_room_on_a_phone_in_light_and_dark(shown, command):
    _, path, _, address = shown()
    assert command("submit", path, "--epochs", 3).code == 0
    with Browser(360, 740) as page:
        page.open(f"http://{address}")
        page.until(contains("head", "done"))
        page.until("!!document.querySelector('#about .facts')")
        assert page.read("document.documentElement.scrollWidth") == 360
        light, dark = brightness(page, "light"), brightness(page, "dark")
        assert dark < 60 < 200 < light
        assert page.problems == []


def brightness(page, scheme):
    """Return how bright the page is, 0 to 255."""
    page.prefer(scheme)
    colour = page.read("getComputedStyle(document.body).backgroundColor")
    return sum(map(int, re.findall(r"\d+", colour)[:3])) / 3
