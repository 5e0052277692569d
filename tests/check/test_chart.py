import itertools
import re
from xml.etree import ElementTree as ET

import pytest

from aiosgd.check import chart
from aiosgd.check.drawing import CHARACTER, SVG_ROWS
from aiosgd.check.story import Moment

DEADLOCK = [
    Moment(0.0, "update", 0, None, 0, "block 0"),
    Moment(0.0, "update", 1, None, 0, "block 1"),
    Moment(0.0, "update", 2, None, 0, "block 2"),
    Moment(0.0001, "send", 0, 1, 0, "part 0", 1),
    Moment(0.0001, "send", 1, 2, 0, "part 1", 2),
    Moment(0.0001, "send", 2, 0, 0, "part 2", 3),
    Moment(0.0003, "deliver", 1, 0, 0, "part 0", 1),
    Moment(0.0003, "deliver", 2, 1, 0, "part 1", 2),
    Moment(0.0004, "send", 1, 2, 0, "sum of 0, 1", 4),
    Moment(0.0004, "deliver", 0, 2, 0, "part 2", 3),
    Moment(0.0005, "send", 0, 1, 0, "sum of 2, 0", 5),
    Moment(0.0005, "drop", 1, 2, 0, "sum of 0, 1", 4),
    Moment(0.0006, "deliver", 1, 0, 0, "sum of 2, 0", 5),
    Moment(0.0006, "result", 1, None, 0, ""),
    Moment(0.0008, "send", 1, 0, 1, "part 1", 6),
    Moment(10.0, "wait", 0, None, 0, "a sum from worker 2"),
    Moment(10.0, "wait", 2, None, 0, "a sum from worker 1"),
]
CHART = """\
time      worker 0      worker 1      worker 2
            │             │             │
0.000000    ■             │             │             update block 0, step 0
0.000000    │             ■             │             update block 1, step 0
0.000000    │             │             ■             update block 2, step 0
0.000300    ├────────────▶│             │             part 0, step 0
0.000300    │             ├────────────▶│             part 1, step 0
0.000400    │◀────────────┼─────────────┤             part 2, step 0
0.000500    │             ├╌╌╌╌╌╌╌╌╌╌╌╌✗│             lost: sum of 0, 1, step 0
0.000600    ├────────────▶│             │             sum of 2, 0, step 0
0.000600    │             ●             │             result of step 0
0.000800    │○╌╌╌╌╌╌╌╌╌╌╌╌┤             │             undelivered: part 1, step 1
          waits         done          waits

worker 0  waits in step 0 for a sum from worker 2; undelivered: 1 of later steps
worker 1  done, last result of step 0
worker 2  waits in step 0 for a sum from worker 1; undelivered: sum of 0, 1, step 0, from worker 1
          (lost)
"""


def rounds(workers, steps):
    """Return a parameter server's story; at the end it crashes and everybody waits for it."""
    numbers, story = itertools.count(1), []

    def exchange(step, *links):
        sent = [(sender, to, next(numbers)) for sender, to in links]
        for sender, to, number in sent:
            story.append(Moment(len(story), "send", sender, to, step, "weights", number))
        for sender, to, number in reversed(sent):
            story.append(Moment(len(story), "deliver", to, sender, step, "weights", number))

    for step in range(steps):
        for worker in range(workers):
            story.append(Moment(len(story), "update", worker, None, step, f"block {worker}"))
        exchange(step, *((worker, -1) for worker in range(workers)))
        if step < steps - 1:
            exchange(step, *((-1, worker) for worker in range(workers)))
    story.append(Moment(len(story), "crash", -1, None, steps - 1, ""))
    for worker in range(workers):
        story.append(Moment(len(story), "wait", worker, None, steps - 1, "weights of -1"))
    return story


STORIES = {
    "deadlock": DEADLOCK,
    "server": rounds(3, 3),
    "long": rounds(4, 60),
    "wide": rounds(60, 2),
    "nobody": [],
    "alone": [Moment(0, "send", 0, 0, 0, "to myself", 1), Moment(1, "deliver", 0, 0, 0, "it", 1)],
    "unpaired": [Moment(0, "deliver", 0, 1, 0, "from before", 7)],
    "failed": [Moment(0, "fail", -2, None, 3, "ValueError: <a> & \x00 'b'\nnext")],
    "talkative": [
        Moment(0, "send", 0, 1, 3, "x" * 300, 1),
        Moment(1, "send", 1, 0, 3, "y" * 300, 2),
        Moment(2, "deliver", 0, 1, 3, "y" * 300, 2),
        Moment(3, "wait", 1, None, 3, "z " * 300),
    ],
}
every_story = pytest.mark.parametrize("story", STORIES.values(), ids=STORIES)


def test_a_deadlock_is_plain_to_see():
    assert chart.text(DEADLOCK) == CHART


def test_texts_go_between_the_lifelines_where_all_fit():
    story = [
        Moment(0, "send", 0, 1, 0, "a", 1),
        Moment(1, "deliver", 1, 0, 0, "a", 1),
        Moment(2, "update", 1, None, 0, "b"),
        Moment(3, "send", 1, 0, 0, "c", 2),
    ]
    assert chart.text(story, 80).splitlines()[1:5] == [
        "       │                             │",
        "1      ├── a, step 0 ───────────────▶│",
        "2      │                             ■ update b, step 0",
        "3      │○╌ undelivered: c, step 0 ╌╌╌┤",
    ]


@every_story
@pytest.mark.parametrize("width", [1, 60, 79, 100, 200])
def test_no_line_is_too_long(story, width):
    assert max(map(len, chart.text(story, width).splitlines())) <= max(width, 60)


@every_story
def test_every_node_has_its_last_word(story):
    nodes = {node for one in story for node in (one.node, one.peer) if node is not None}
    lines = chart.text(story, 400).partition("\n\n")[2].splitlines()
    drawing = chart.svg(story)
    for node in nodes if len(nodes) < 16 else ():
        name = f"{'server' if node < 0 else 'worker'} {node}"
        assert sum(line.startswith(f"{name} ") for line in lines) == 1
        assert name in drawing


def test_what_ended_a_node_is_said():
    story = [
        Moment(0, "crash", 0, None, 2, "the host is gone"),
        Moment(1, "fail", 1, None, 2, "ValueError: no"),
        Moment(2, "result", 2, None, 2, ""),
        Moment(3, "wait", 3, None, 2, "waits in step 2; heard from nobody"),
        Moment(4, "update", 4, None, 2, "b"),
    ]
    assert chart.text(story).splitlines()[-5:] == [
        "worker 0  crashed in step 2: the host is gone",
        "worker 1  failed in step 2: ValueError: no",
        "worker 2  done, last result of step 2",
        "worker 3  waits in step 2; heard from nobody",
        "worker 4  no result, no error",
    ]


def test_a_crashed_node_has_no_lifeline_any_more():
    story = [
        Moment(0, "crash", 0, None, 0, ""),
        Moment(1, "update", 1, None, 0, "b"),
    ]
    lines = chart.text(story).splitlines()
    column = lines[2].index("✗")
    assert [line[column] for line in lines[1:4]] == ["│", "✗", " "]


def test_why_a_message_was_not_handled_is_said():
    story = [
        Moment(0, "send", 0, 1, 0, "a", 1),
        Moment(1, "drop", 0, 1, 0, "came too late", 1),
        Moment(2, "wait", 1, None, 0, "a"),
    ]
    text = chart.text(story)
    assert "came too late: a, step 0" in text
    assert "undelivered: a, step 0, from worker 0 (came too late)" in text


def test_many_undelivered_messages_are_counted():
    story = [Moment(i, "send", 0, 1, 0, f"m{i}", i) for i in range(9)]
    text = chart.text([*story, Moment(9, "wait", 1, None, 0, "more")], 300)
    assert text.endswith("m2, step 0, from worker 0 (under way); 6 more\n")


def test_the_middle_of_a_long_story_is_left_out_and_counted():
    story = rounds(4, 60)
    text = chart.text(story)
    rows = [line for line in text.splitlines() if re.match(r"\d+ ", line)]
    gap = re.search(r"… (\d+) events left out, (\d+) to (\d+) …", text)
    all_rows = sum(moment.kind not in ("wait", "send") for moment in story)
    assert len(rows) == chart.TEXT_ROWS
    assert len(rows) + int(gap[1]) == all_rows
    times = [int(row.split()[0]) for row in rows]
    between = range(int(gap[2]), int(gap[3]) + 1)
    assert not set(times) & {*between}
    assert {between.start - 1, between.stop} <= {moment.time for moment in story}
    assert times[0] == 0
    assert "crashes" in text


def test_svg_leaves_out_and_counts_the_same_way():
    story = rounds(4, 60)
    gap = re.search(r"… (\d+) events left out, (\d+) to (\d+) …", chart.svg(story))
    assert int(gap[1]) == sum(m.kind != "wait" for m in story) - SVG_ROWS
    assert int(gap[3]) - int(gap[2]) + 1 == int(gap[1])


def test_of_many_nodes_those_in_trouble_are_shown():
    story = [Moment(i, "update", i, None, 0, "b") for i in range(100)]
    story.append(Moment(100, "wait", 77, None, 0, "the end"))
    text, drawing = chart.text(story), chart.svg(story)
    assert "worker 77  waits in step 0 for the end" in text
    assert "… 86 of 100 nodes left out, with 86 events …" in text
    assert "worker 77" in drawing
    assert "… 84 of 100 nodes left out, with 84 events …" in drawing


def test_servers_have_a_column_before_workers_in_trouble():
    story = [Moment(i, "send", i, -1, 0, "m", i) for i in range(99)]
    story += [Moment(99, "wait", i, None, 0, "m") for i in range(99)]
    assert chart.text(story).startswith("time s-1 ")


def texts(drawing):
    """Return each text's string and box, as wide as the widest of the fonts."""
    root = ET.fromstring(drawing)
    for element in root.iter("{http://www.w3.org/2000/svg}text"):
        said, kind = element.text, element.get("class", "")
        width = len(said) * CHARACTER
        x, y = float(element.get("x")), float(element.get("y"))
        anchor = element.get("text-anchor", "start")
        anchor = "middle" if "badge" in kind else "end" if kind == "time" else anchor
        left = x - width * {"start": 0, "middle": 0.5, "end": 1}[anchor]
        yield said, (left, y - 10, left + width, y + 3)


@every_story
def test_svg_texts_never_overlap_and_are_inside(story):
    drawing = chart.svg(story)
    width, height = map(float, re.search(r'viewBox="0 0 (\d+) (\d+)"', drawing).groups())
    found = list(texts(drawing))
    for said, (left, top, right, bottom) in found:
        assert left >= 0, said
        assert top >= 0, said
        assert right <= width, said
        assert bottom <= height, said
    for (one, a), (other, b) in itertools.combinations(found, 2):
        apart = a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]
        assert apart, (one, other)


@every_story
def test_svg_is_self_contained(story):
    drawing = chart.svg(story)
    ET.fromstring(drawing)
    rest = drawing.replace("http://www.w3.org/2000/svg", "")
    assert not re.search(r"<script|href|url\(|@import|https?:|\bon\w+=", rest)


def test_svg_draws_nothing_of_messages_in_the_gap():
    story = [Moment(i, "update", 0, None, 0, "b") for i in range(SVG_ROWS)]
    middle = SVG_ROWS // 3 + 3
    story[middle] = Moment(middle, "send", 0, 1, 0, "m", 1)
    assert len(lines(chart.svg(story), "lost")) == 1
    story += [Moment(SVG_ROWS + i, "update", 1, None, 0, "b") for i in range(9)]
    assert lines(chart.svg(story), "lost") == []


def lines(drawing, style):
    found = ET.fromstring(drawing).iter("{http://www.w3.org/2000/svg}line")
    ends = ("x1", "y1", "x2", "y2")
    return [tuple(float(one.get(k)) for k in ends) for one in found if one.get("class") == style]


def test_svg_arrows_go_from_sending_to_arrival_and_lost_ones_do_not_arrive():
    drawing = chart.svg(DEADLOCK)
    at = {said: box for said, box in texts(drawing) if said.startswith("worker")}
    x = [sum(at[f"worker {node}"][::2]) / 2 for node in range(3)]
    arrows = lines(drawing, None)
    assert [(x.index(a[0]), x.index(a[2])) for a in arrows] == [(0, 1), (1, 2), (2, 0), (0, 1)]
    assert all(a[3] > a[1] for a in arrows)
    lost, under_way = lines(drawing, "lost")
    assert (lost[0], under_way[0]) == (x[1], x[1])
    assert x[1] < lost[2] < x[2]
    assert x[0] < under_way[2] < x[1]
    found = dict(texts(drawing))
    assert x[1] < found["part 0, step 0"][0]
    assert found["part 2, step 0"][2] < x[0]


def test_svg_lifelines_of_waiting_nodes_are_marked_from_their_last_moment_on():
    drawing = chart.svg(DEADLOCK)
    waits = lines(drawing, "waits")
    life = {line[0]: line for line in lines(drawing, "life")}
    assert len(waits) == 2
    assert waits[1][1] == lines(drawing, None)[1][3]  # where part 1 arrives
    for x, start, _, end in waits:
        assert life[x][1] < start < end == life[x][3]
