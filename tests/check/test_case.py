import pytest

from aiosgd.check.case import Case, parse
from aiosgd.errors import ConfigError

CASES = [
    Case(check="a"),
    Case(check="b", mode="async", exchange="weights", workers=3, servers=2, redundancy=2, seed=7),
    Case(check="a", steps=9, size=5, schedule=3, jitter=0.005, slow="1:2"),
    Case(check="a", workers=3, faults="cut:0|1,2@0.002190030-0.502190030"),
]


@pytest.mark.parametrize("case", CASES)
def test_a_case_is_its_text(case):
    assert parse(str(case), ["a", "b"]) == case


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "there is no check ''; checks: a, b"),
        ("c", "there is no check 'c'"),
        ("a worker=3", r"--case has 'worker=3'; expected any of mode=…"),
        ("a workers", "--case has 'workers'"),
        ("a workers=x", "--case: workers is 'x'; expected a whole number"),
        ("a workers=0", r"workers is 0; expected 1\.\.64"),
        ("a redundancy=3", r"redundancy is 3; expected 1\.\.2"),
        ("a mode=fast", "--case: mode is 'fast'"),
        ("a schedule=-1", "0 or more"),
        ("a faults=crash:5@1", "there is no node 5"),
        ("a slow=7:2", "--case: slow"),
    ],
)
def test_what_is_no_case_is_refused(text, message):
    with pytest.raises(ConfigError, match=message):
        parse(text, ["a", "b"])
