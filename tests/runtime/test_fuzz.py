"""Nonsense from outside: bytes, handshakes, orders and messages; it ends, with a reason, or passes.

The same inputs as in tests/fuzz, where long runs are, but few of them.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import random
import re
import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aiosgd.errors import AiosgdError, RemoteProtocolError
from aiosgd.plugins.compressors import chain
from aiosgd.plugins.kinds import COMPRESSORS
from aiosgd.runtime import node
from aiosgd.runtime.connection import STAGING_SIZE, Link
from aiosgd.runtime.frame import Kind
from aiosgd.runtime.handshake import Answerer, Caller
from aiosgd.runtime.hello import STRANGER, greeting, introduce
from aiosgd.runtime.security import Security, load_tls
from aiosgd.runtime.simulation.world import VirtualTransport
from tests.fuzz import frames, handshake
from tests.fuzz.draws import VALUES, Draws, nonsense
from tests.runtime.certificates import Authority
from tests.runtime.links import turns
from tests.runtime.simulation import test_swarm as swarm
from tests.runtime.test_node import JOB, QUESTION, Submitter, assignment, free

inputs = settings(derandomize=True, max_examples=400, deadline=None, database=None)


# Bytes and handshakes -------------------------------------------------------------------------


@inputs
@given(st.binary(max_size=300))
def test_any_bytes_are_frames_or_the_links_end(data):
    feed_in_a_loop(data)


def feed_in_a_loop(data: bytes) -> None:
    async def run() -> None:
        frames.one_input(data)

    asyncio.run(run())


def test_random_streams_are_frames_or_the_links_end_soon_and_without_much_memory():
    """Of 800 streams of up to 1 MB none takes more than 0.5 s or 4 MB."""
    rng, slowest, most = random.Random(3), 0.0, 0.0

    async def run() -> None:
        nonlocal slowest, most
        for _ in range(800):
            data = rng.randbytes(rng.randrange(2000))
            started = time.process_time()
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            frames.one_input(data)
            most = max(most, tracemalloc.get_traced_memory()[1] - before)
            slowest = max(slowest, time.process_time() - started)

    tracemalloc.start()
    try:
        asyncio.run(run())
    finally:
        tracemalloc.stop()
    print(f"slowest {slowest:.4f} s, most {most / 1e6:.3f} MB")
    assert slowest < 0.5
    assert most < 4e6


@pytest.mark.parametrize("announced", [0, 1 << 20, 1 << 32, (1 << 64) - 1])
@pytest.mark.parametrize("metadata", [0, 1024, 1 << 16, (1 << 32) - 1])
def test_a_stranger_gets_no_memory_whatever_it_announces(announced, metadata):
    async def run() -> int:
        heard = frames.Heard(STRANGER, 0)
        before = tracemalloc.get_traced_memory()[0]
        head = frames.HEADER.pack(frames.MAGIC, Kind.HELLO, 0, metadata, announced)
        heard.feed(head + bytes(2000), [50])
        return tracemalloc.get_traced_memory()[1] - before

    tracemalloc.start()
    try:
        assert asyncio.run(run()) < STAGING_SIZE
    finally:
        tracemalloc.stop()


async def test_a_link_that_is_gone_pins_no_memory():
    tracemalloc.start()
    try:
        links = []
        for _ in range(50):
            heard = frames.Heard(STRANGER, 0)
            heard.feed(frames.VALID[1] * 3, [7])
            links.append(heard.link)
        never_made = [Link(None, lambda *_: None, STRANGER) for _ in range(50)]
        for link in never_made:
            link.abort()
        assert tracemalloc.get_traced_memory()[0] < 100 * STAGING_SIZE / 4
    finally:
        tracemalloc.stop()


async def test_what_comes_behind_a_refused_frame_is_dropped_however_much_it_is():
    heard = frames.Heard(STRANGER, 1)
    heard.feed(frames.VALID[0] + bytes(3 * STAGING_SIZE), [1 << 20])
    assert (len(heard.contents), heard.reasons) == (1, [None])


@inputs
@given(st.binary(max_size=120))
def test_nobody_is_deceived_in_any_handshake(data):
    handshake.one_input(data)


def test_random_handshakes_deceive_nobody_and_some_succeed():
    rng, trusting = random.Random(5), 0
    for _ in range(3000):
        play = handshake.Play(Draws(rng.randbytes(rng.randrange(300))))
        play.run()
        play.check()
        trusting += sum(one.trusts and one.key is not None for one in play.ends)
    assert trusting > 50


def test_nobody_may_add_a_proof_to_the_first_hello():
    """It would be no part of what is proved; found by tests/fuzz/handshake.py."""
    first = Caller(handshake.FACTS, handshake.KEY, bytes(32)).hello()
    for key in (handshake.KEY, None):
        with pytest.raises(RemoteProtocolError, match="nothing to prove"):
            Answerer(key, bytes(32), {}).receive({**first, "proof": b""})


# What a node with a secret hears ----------------------------------------------------------------


async def test_nonsense_from_strangers_leaves_a_node_as_it_was(running):
    rng = random.Random(7)
    security = Security(key=handshake.KEY)
    errors: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, about: errors.append(about))
    hello = handshake.written(greeting(nonce=bytes(32)))
    async with running(security=security) as (own, address):
        for i in range(150):
            reader, writer = await asyncio.open_connection(address.host, address.port)
            draws = Draws(rng.randbytes(200))
            words = frames.mutated(draws, hello * (1 + i % 3), frames.VALID)
            writer.write(words + bytes(1 << 17 if i % 10 == 0 else 0))
            writer.write_eof()
            with contextlib.suppress(ConnectionError):
                await reader.read()
            writer.close()
        while own._pending:
            await asyncio.sleep(0)
        link = await introduce(address, greeting(role="submitter"), security=security)
        link.close()
    assert not errors


async def test_many_slow_strangers_do_not_keep_an_honest_caller_out(running):
    security = Security(key=handshake.KEY)
    hello = handshake.written(greeting(nonce=bytes(32)))
    async with running(security=security) as (own, address), contextlib.AsyncExitStack() as stack:
        writers = []
        for _ in range(100):
            _, writer = await asyncio.open_connection(address.host, address.port)
            stack.callback(writer.transport.abort)
            writers.append(writer)
        times = []
        for byte in hello[:5]:
            for writer in writers:
                writer.write(bytes([byte]))
            started = time.perf_counter()
            link = await introduce(address, greeting(role="submitter"), security=security)
            times.append(time.perf_counter() - started)
            link.close()
        assert len(own._pending) <= 64
        assert sorted(times)[2] < 1


@pytest.mark.parametrize("with_tls", [False, True])
async def test_callers_that_were_dropped_pin_no_memory(running, tmp_path, monkeypatch, with_tls):
    """Each is known to a timer for 5 s; then a flood must not pin a staging area for each."""
    monkeypatch.setattr(node.logger, "disabled", True)  # pytest keeps what is logged, errors too
    tls = load_tls(**Authority(tmp_path).issue("node")) if with_tls else None
    errors: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, about: errors.append(about))
    async with running(security=Security(handshake.KEY, tls)) as (own, address):
        tracemalloc.start()
        try:
            for _ in range(200):
                _, writer = await asyncio.open_connection(address.host, address.port)
                writer.write(bytes([0x16, 3, 1, 64]) if with_tls else handshake.written(greeting()))
                writer.transport.abort()
            while own._pending:
                await asyncio.sleep(0)
            gc.collect()  # what TLS leaves refers to itself
            pinned = tracemalloc.get_traced_memory()[0]
        finally:
            tracemalloc.stop()
    assert pinned < 200 * STAGING_SIZE / 4
    assert not errors


# Orders of an authenticated peer ----------------------------------------------------------------

# numbers that a job may not take seriously: so large that they are refused, never just large
ODD = (*VALUES, np.zeros(0), np.arange(3), np.float32(1), [["codec", "plain", "x", "1"]], 1 << 62)
JOB_LIFE = ["can_commit", "prepare", "link", "start", "finish", "collect"]


def orders(address: Any) -> list[dict[str, Any]]:
    facts = {"can_commit": QUESTION, "prepare": assignment(address), "collect": {"weights": True}}
    return [{"order": order, "job_id": JOB, **facts.get(order, {})} for order in JOB_LIFE]


def odd_order(draws: Draws, address: Any) -> Any:
    extra = [
        {"order": "file", "job_id": JOB, "sha256": "0" * 64, "data": np.zeros(3, np.uint8)},
        {"order": "verdict", "job_id": JOB, "epoch": 0, "stop": False},
        {"order": "go_on", "job_id": JOB, "whole": 3},
        {"order": "save", "job_id": JOB, "step": 1},
        {"order": "adopt", "job_id": JOB, "token": "secret"},
        {"order": "drain", "job_id": JOB},
        {"order": "abort", "job_id": JOB, "reason": "x"},
    ]
    return nonsense(draws, draws.choice([*orders(address), *extra]), ODD)


async def test_nonsense_in_any_order_leaves_a_node_that_takes_the_next_job(running, caplog):
    """A job goes on until a nonsensical order; its submitter leaves, and the node is free again."""
    rng, errors = random.Random(11), []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, about: errors.append(about))
    async with running() as (own, address):
        for i in range(60):
            draws = Draws(rng.randbytes(120))
            job_id = f"20250102-030405-fuzz-{i:04x}"
            async with Submitter(address) as submitter:
                for content in orders(address)[: draws.number(7)]:
                    await submitter.order(**{**content, "job_id": job_id})
                for _ in range(1 + draws.number(3)):
                    content = odd_order(draws, address)
                    if isinstance(content, dict) and str(content.get("job_id")) == JOB:
                        content["job_id"] = job_id
                    if not submitter.link.is_closed:
                        submitter.send(content)
                    await turns()
            await own.leave("the next one")
            await free(own, address)
        async with Submitter(address) as submitter:
            for content in orders(address):
                report = await submitter.order(**content)
                assert report["report"] not in ("refused", "failed"), report
    # a handler of a frame may fail; then that link is closed, and the loop's handler is told
    assert all("handling a frame" in about["message"] for about in errors), errors


# Messages of a peer within a job ----------------------------------------------------------------

# shapes of up to 2**31 elements are taken at their word; larger ones are refused
SMALL_ODD = (
    *VALUES,
    np.zeros(0, np.float32),
    np.full(8, np.nan, np.float32),
    np.arange(3),
    1 << 40,
)


def compressor(name: str) -> Any:
    inner = {
        "ef": "ef(topk)",
    }.get(name, name)
    return chain.factory(COMPRESSORS, inner, {})(np.random.default_rng(0))


@pytest.mark.parametrize("name", [entry.name for entry in COMPRESSORS.entries()])
def test_a_payload_with_nonsense_is_an_array_or_a_value_error(name):
    rng, made = random.Random(13), compressor(name)
    made.shapes = {"w": (8, 16)}
    payload = made.compress(np.linspace(-1, 1, 128, dtype=np.float32), "a stream")
    for _ in range(300):
        odd = payload
        draws = Draws(rng.randbytes(60))
        for _ in range(1 + draws.number(2)):
            odd = nonsense(draws, odd, SMALL_ODD)
        try:
            restored = made.decompress(odd)
        except ValueError:
            continue
        assert isinstance(restored, np.ndarray), (odd, restored)


@pytest.mark.proof
@pytest.mark.parametrize("name", swarm.names())
def test_nonsense_from_a_peer_ends_a_job_or_does_not_matter(name, monkeypatch):
    """One node's messages have something else in them, now and then: in virtual time."""
    rng = random.Random(name)
    take = VirtualTransport.take

    def take_nonsense(self: VirtualTransport, sender: int, content: Any, size: int) -> None:
        if sender in (1, -1) and rng.random() < 0.2:
            content = nonsense(Draws(rng.randbytes(60)), content, SMALL_ODD)
        try:
            take(self, sender, content, size)
        except AiosgdError as error:  # as the mesh does: the link is closed, the peer is lost
            self._world._lost(sender, str(error))

    draws = np.random.default_rng(1)
    trials = [job for job in (swarm.draw_job(draws) for _ in range(1500)) if job.codec == name]
    trials = [trial for trial in trials if trial.workers > 1][:6]
    assert trials
    monkeypatch.setattr(VirtualTransport, "take", take_nonsense)
    with np.errstate(all="ignore"):
        for trial in trials:
            played = swarm.play_once(trial)
            assert not played.endless, (str(trial), played.error)
            assert not played.problems, (str(trial), played.problems)
            if played.state != "done":
                assert swarm.NAMED.search(played.error), played.error


# What is said of it ------------------------------------------------------------------------------


def test_the_page_on_security_names_tests_that_there_are():
    tests = Path(__file__).parents[1]
    text = (tests.parent / "docs" / "security.md").read_text(encoding="utf-8")
    files = {path.name: path.read_text(encoding="utf-8") for path in tests.rglob("test_*.py")}
    whole = "\n".join(files.values())
    named = set(re.findall(r"`(test_\w+)`", text))
    assert len(named) > 30
    assert not {name for name in named if f"def {name}(" not in whole}
    assert set(re.findall(r"`(test_\w+\.py)`", text)) <= files.keys()
