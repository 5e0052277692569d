"""The handshake as a value: what goes through, and everything that must not."""

import itertools

import numpy as np
import pytest

from aiosgd import __version__
from aiosgd.errors import LocalProtocolError, RemoteProtocolError
from aiosgd.runtime import handshake
from aiosgd.runtime.frame import WIRE_VERSION, Kind, decode, decode_header, encode
from aiosgd.runtime.handshake import Answerer, Caller, greeting, read_hello, refusal
from aiosgd.runtime.hello import STRANGER

KEY, OTHER_KEY = b"k" * 32, b"K" * 32
FACTS = {"role": "peer", "job_id": "20250102-030405-test-0123", "node": 3, "token": "t" * 32}
OFFERS = {"unix": {"name": "aiosgd-" + "0" * 32, "host": "1" * 32}}

nonces = (bytes([i]) * handshake.NONCE_SIZE for i in itertools.cycle(range(1, 256)))


def caller(key=KEY, nonce=None, facts=FACTS):
    return Caller(facts, key, nonce or next(nonces))


def answerer(key=KEY, nonce=None, offers=OFFERS):
    return Answerer(key, nonce or next(nonces), offers)


def sent(hello):
    """Return a HELLO as the other end gets it; it must be small enough for a stranger's."""
    head, *body = encode(hello, Kind.HELLO).buffers
    assert not body
    size = decode_header(head, 0, STRANGER).metadata_size
    return decode(memoryview(head)[-size:], np.empty(0, np.uint8))


def recorded(ours, theirs):
    """Run a whole handshake; return its first three HELLOs as they were sent."""
    first = sent(ours.hello())
    second = sent(theirs.receive(first))
    third = sent(ours.answer(second))
    assert theirs.receive(third) is None
    return first, second, third


@pytest.mark.parametrize("key", [None, KEY])
def test_both_ends_learn_who_the_other_is(key):
    ours, theirs = caller(key), answerer(key)
    first, second, third = recorded(ours, theirs)
    assert theirs.caller == third
    assert {name: theirs.caller[name] for name in FACTS} == FACTS
    assert ours.offers["unix"] == OFFERS["unix"]
    ours.check_welcome(sent(greeting()))
    for hello in (first, second, third):
        assert (hello["wire"], hello["version"]) == (WIRE_VERSION, __version__)
    assert [("proof" in hello) for hello in (first, second, third)] == [False, bool(key), bool(key)]


def test_no_hello_contains_the_key_and_no_proof_is_ever_repeated():
    both = [recorded(caller(), answerer()) for _ in range(2)]
    proofs = [hello["proof"] for hellos in both for hello in hellos if "proof" in hello]
    assert len(set(proofs)) == len(proofs) == 4
    assert not any(KEY in encode(hello, Kind.HELLO).buffers[0] for h in both for hello in h)


def test_nobody_is_known_before_the_third_hello():
    ours, theirs = caller(), answerer()
    assert theirs.caller is None
    second = theirs.receive(ours.hello())
    assert theirs.caller is None
    assert ours.offers == {}
    ours.answer(second)
    assert theirs.caller is None


# One of two has a secret, or another one ------------------------------------------------------


def test_a_caller_without_the_nodes_secret_stops_at_the_second_hello():
    ours, theirs = caller(None), answerer(KEY)
    with pytest.raises(RemoteProtocolError, match=r"the caller has none: .*secret_file.*AIOSGD_"):
        ours.answer(theirs.receive(ours.hello()))
    assert ours.offers == {}


def test_a_node_without_the_callers_secret_gets_no_more_than_a_nonce():
    ours, theirs = caller(KEY), answerer(None)
    with pytest.raises(RemoteProtocolError, match="the node has none: start the node with --secr"):
        ours.answer(theirs.receive(ours.hello()))
    assert ours.offers == {}


def test_a_node_with_another_secret_gets_no_proof():
    ours, theirs = caller(KEY), answerer(OTHER_KEY)
    with pytest.raises(RemoteProtocolError, match="different secrets: give both the same"):
        ours.answer(theirs.receive(ours.hello()))
    assert ours.offers == {}


@pytest.mark.parametrize(
    ("proof", "reason"),
    [
        ({}, "the node has a secret and the caller has none"),
        ({"proof": None}, "different secrets"),
        ({"proof": b""}, "different secrets"),
        ({"proof": bytes(32)}, "different secrets"),
        ({"proof": "x" * 32}, "different secrets"),
        ({"proof": bytes(31)}, "different secrets"),
    ],
)
def test_a_caller_that_proves_nothing_is_refused(proof, reason):
    ours, theirs = caller(), answerer()
    theirs.receive(ours.hello())
    with pytest.raises(RemoteProtocolError, match=reason):
        theirs.receive({**greeting(**FACTS), **proof})
    assert theirs.caller is None


def test_a_caller_with_another_secret_is_refused_even_if_it_goes_on():
    ours, theirs = caller(KEY), answerer(KEY)
    second = theirs.receive(ours.hello())
    liar = caller(OTHER_KEY, nonce=ours.hello()["nonce"])
    liar.hello()
    impostor = answerer(OTHER_KEY, nonce=second["nonce"])
    third = liar.answer(impostor.receive(ours.hello()))
    with pytest.raises(RemoteProtocolError, match="different secrets"):
        theirs.receive(third)
    assert theirs.caller is None


def test_a_proof_that_nobody_asked_for_is_refused():
    theirs = answerer(None)
    theirs.receive(caller(None).hello())
    with pytest.raises(RemoteProtocolError, match="the node has none"):
        theirs.receive({**greeting(**FACTS), "proof": bytes(32)})
    assert theirs.caller is None


# Attacks --------------------------------------------------------------------------------------


def test_a_recorded_caller_is_refused():
    first, _, third = recorded(caller(), answerer())
    theirs = answerer()
    theirs.receive(first)
    with pytest.raises(RemoteProtocolError, match="different secrets"):
        theirs.receive(third)
    assert theirs.caller is None


def test_a_recorded_node_is_refused():
    _, second, _ = recorded(caller(), answerer())
    ours = caller()
    ours.hello()
    with pytest.raises(RemoteProtocolError, match="different secrets"):
        ours.answer(second)


def test_a_node_does_not_take_its_own_proof_for_the_callers():
    theirs = answerer()
    second = theirs.receive(caller().hello())
    for third in (second, {**greeting(**FACTS), "proof": second["proof"]}):
        with pytest.raises(RemoteProtocolError, match="different secrets"):
            theirs.receive(third)
        assert theirs.caller is None


def test_a_caller_does_not_take_its_own_words_for_the_nodes():
    ours = caller()
    first = ours.hello()
    with pytest.raises(RemoteProtocolError, match="the node has none"):
        ours.answer(first)


def test_what_proves_one_end_never_proves_the_other():
    said = handshake._Transcript()
    assert said.proof(KEY, "node") != said.proof(KEY, "caller")


CHANGES = {
    "nonce": lambda hello: {**hello, "nonce": bytes(32)},
    "version": lambda hello: {**hello, "version": "0.0.0"},
    "more": lambda hello: {**hello, "more": 1},
    "order": lambda hello: dict(reversed(hello.items())),
    "unix": lambda hello: {**hello, "unix": {"name": "trap", "host": "1" * 32}},
    "role": lambda hello: {**hello, "role": "submitter"},
    "less": lambda hello: {k: v for k, v in hello.items() if k not in ("unix", "token")},
}


@pytest.mark.parametrize(
    ("change", "place"),
    [pair for pair in itertools.product(CHANGES, (1, 2, 3)) if pair != ("less", 1)],
)
def test_whatever_is_changed_on_the_way_ends_the_handshake(change, place):
    ours, theirs = caller(), answerer()

    def carry(hello, number):
        return CHANGES[change](hello) if number == place else hello

    with pytest.raises(RemoteProtocolError, match="different secrets"):
        theirs.receive(carry(ours.answer(carry(theirs.receive(carry(ours.hello(), 1)), 2)), 3))
    assert theirs.caller is None


@pytest.mark.parametrize("place", [1, 2])
def test_without_a_secret_nothing_of_this_is_noticed(place):
    """TLS is for that; this holds the documentation to it."""
    ours, theirs = caller(None), answerer(None)
    change = CHANGES["nonce"]
    first = ours.hello()
    second = theirs.receive(change(first) if place == 1 else first)
    theirs.receive(ours.answer(change(second) if place == 2 else second))
    assert theirs.caller is not None


def test_a_handshake_is_for_one_caller():
    ours, theirs = caller(), answerer()
    _, _, third = recorded(ours, theirs)
    with pytest.raises(LocalProtocolError, match="the handshake is over"):
        theirs.receive(third)


# What is no HELLO -----------------------------------------------------------------------------

WRONG = [
    (None, "sent no HELLO"),
    (7, "sent no HELLO"),
    ([1], "sent no HELLO"),
    ({}, "sent no HELLO"),
    ({"wire": 99, "version": "9.9"}, f"speaks wire version 99 .aiosgd 9.9., .* {__version__}"),
    ({"wire": "1"}, "speaks wire version 1 .aiosgd None"),
    ({"wire": WIRE_VERSION}, "has no nonce of 32 bytes"),
    (greeting(nonce=b"short"), "has no nonce of 32 bytes"),
    (greeting(nonce="x" * 32), "has no nonce of 32 bytes"),
    (refusal("not today"), "^not today$"),
    (greeting(error=7), "^7$"),
    (greeting(error="\x1b[2Jgone\n"), r"^\?\[2Jgone\?$"),
    ({"wire": 10**12, "error": "old"}, "speaks wire version 1000000000000"),
]


@pytest.mark.parametrize(("content", "reason"), WRONG)
@pytest.mark.parametrize("key", [None, KEY])
def test_a_caller_says_what_is_wrong_with_the_nodes_hello(key, content, reason):
    ours = caller(key)
    ours.hello()
    with pytest.raises(RemoteProtocolError, match=reason):
        ours.answer(content)


@pytest.mark.parametrize(("content", "reason"), WRONG)
@pytest.mark.parametrize("key", [None, KEY])
def test_a_node_says_what_is_wrong_with_the_callers_hello(key, content, reason):
    theirs = answerer(key)
    with pytest.raises(RemoteProtocolError, match=reason):
        theirs.receive(content)
    assert theirs.caller is None


@pytest.mark.parametrize(("content", "reason"), [w for w in WRONG if "nonce" not in w[1]])
def test_the_third_and_the_fourth_hello_are_checked_as_well(content, reason):
    theirs = answerer()
    theirs.receive(caller().hello())
    with pytest.raises(RemoteProtocolError, match=reason):
        theirs.receive(content)
    assert theirs.caller is None
    with pytest.raises(RemoteProtocolError, match=reason):
        Caller.check_welcome(content)


def test_what_cannot_be_repeated_cannot_be_proved():
    ours, theirs, strange = caller(), answerer(), {"strange": object()}
    with pytest.raises(RemoteProtocolError, match=r"cannot be repeated: .*object cannot be sent"):
        theirs.receive(ours.hello() | strange)
    with pytest.raises(RemoteProtocolError, match=r"cannot be repeated: .*object cannot be sent"):
        ours.answer(greeting(nonce=bytes(32), **strange))


def test_facts_that_cannot_be_sent_are_our_own_mistake():
    ours = caller(facts={"strange": object()})
    with pytest.raises(LocalProtocolError, match="object cannot be sent"):
        ours.answer(answerer().receive(ours.hello()))


def test_who_speaks_which_wire_version_is_said_the_right_way_round():
    for end, other in (("node", "caller"), ("caller", "node")):
        with pytest.raises(RemoteProtocolError) as error:
            read_hello({"wire": 99, "version": "9.9"}, end)
        assert str(error.value) == (
            f"the {end} speaks wire version 99 (aiosgd 9.9), the {other} {WIRE_VERSION} (aiosgd "
            f"{__version__}): install the same version on both"
        )


@pytest.mark.parametrize("reason", ["x" * 5000, "\N{GRINNING FACE}" * 5000])
def test_a_reason_of_any_length_fits_into_a_hello(reason):
    with pytest.raises(RemoteProtocolError) as error:
        Caller.check_welcome(sent(refusal(reason)))
    assert str(error.value) == reason[: handshake.REASON_LIMIT]


@pytest.mark.parametrize("reason", ["ONLY_NODE", "ONLY_CALLER", "DIFFERENT"])
def test_our_own_reasons_are_sent_whole(reason):
    text = getattr(handshake, reason)
    with pytest.raises(RemoteProtocolError) as error:
        Caller.check_welcome(sent(refusal(text)))
    assert str(error.value) == text


@pytest.mark.parametrize("size", [0, 31, 33])
def test_a_nonce_of_another_size_is_our_own_mistake(size):
    for make in (caller, answerer):
        with pytest.raises(LocalProtocolError, match=f"a nonce has {size} bytes; expected 32"):
            Caller({}, None, bytes(size)) if make is caller else Answerer(None, bytes(size), {})
