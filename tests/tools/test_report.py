import io
from html.parser import HTMLParser

import pytest
from PIL import Image

from lwfed.config import load_config
from lwfed.tools import figure
from lwfed.tools.demo import make_report
from lwfed.tools.page import page
from lwfed.tools.screen import Screen

from .test_account import EVENTS


@pytest.fixture
def report():
    found = make_report(load_config("demo", ["run.seed=7"]), EVENTS, EVENTS)
    return {**found, "seconds": 12.3, "command": "lwfed demo --seed 7 & <more>", "encoder_sha256": "ab" * 32}


class Elements(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.sources, self.rows, self.open = [], 0, []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.sources += [value for name, value in attributes if name in ("src", "href")]
        self.rows += tag == "tr"
        if tag not in ("meta", "link", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_report_has_what_others_read(report):
    assert set(report["random"]) == set(report["raw_pixels"]) == {"knn", "probe"}
    figures = {"knn", "probe", "worker_peak_mb", "worker_baseline_mb", "bytes_down", "bytes_up", "seconds"}
    assert set(report["end_to_end"]) == figures
    assert all(set(stage) == figures | {"stage"} for stage in report["stages"])
    assert report["seed"] == 7


def test_the_page_needs_nothing_beside_it(report):
    elements = Elements(page(report, figure.draw(report)))
    assert elements.open == []
    assert elements.rows == 1 + 2 + len(report["stages"]) + 2
    assert all(source.startswith("data:") for source in elements.sources)


def test_the_page_says_what_was_measured(report):
    text = page(report, b"")
    for shown in ("70.0&nbsp;%", "30.0&nbsp;%", "90.0&nbsp;%", "--config cifar10", "lwfed demo --seed 7 &amp; &lt;more&gt;", "ab" * 32):
        assert shown in text


def test_the_picture_is_one(report):
    assert Image.open(io.BytesIO(figure.draw(report))).size == (1800, 600)


def test_few_bytes_are_labelled_to_a_tenth_of_a_megabyte(report):
    axes = figure.Figure().subplots()
    stage = {**report["end_to_end"], "bytes_down": 300_000, "bytes_up": 250_000}
    figure._traffic(axes, {**report, "stages": [{**stage, "stage": 1}], "end_to_end": {**stage, "bytes_down": 30_400_000}})
    assert [text.get_text() for text in axes.texts] == ["0.6", "0.6", "31"]


def test_without_a_terminal_there_are_plain_lines_and_a_table(report, tmp_path, capsys):
    screen = Screen(live=False)
    with screen.run(load_config("demo")):
        screen.show("server", {"event": "round", "status": "started", "text": "too much"})
        screen.show("server", {"event": "round", "status": "closed", "text": "round 1 done"})
        screen.show("device-0", {"event": "warning", "text": "not the server's"})
    screen.table(report, tmp_path)
    shown = capsys.readouterr().out
    assert "round 1 done" in shown
    assert "too much" not in shown
    assert "after stage 2       70.0%" in shown
    assert str(tmp_path / "report.html") in shown
