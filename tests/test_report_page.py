"""The page of all results: self-contained, complete, and sorted by the browser without errors."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

from src.benchmarking import page, plots, report, results, sweep, timing, workloads
from src.benchmarking.sweep import Contestant

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
ENVIRONMENT = {"device": "A card", "driver": "1", "cuda": "13", "torch": "2", "python": "3"}
ENVIRONMENT |= {"commit": "c" * 40, "dirty": False, "utc": "2025-01-01T00:00:00+00:00"}
ENVIRONMENT |= {"copy_gb_s": 1000.0, "command": "python test_batch_sizes.py"}


def row(name, batch, latency):
    """A row as a run would make it; its figures stand in."""
    cell = workloads.Workload(batch, 8, 1000)
    if latency is None:
        return sweep.empty_row(cell, Contestant(name, name, None, reason="not <here>", command="x"))
    made = sweep.empty_row(cell, Contestant(name, f"{name} & co", len))
    return made | {"latency_us": timing.summary([latency]), "bytes": 10**6}


@pytest.fixture
def recorded(tmp_path):
    rows = [row("b", 1, 9.0), row("a", 1, 10.0), row("c", 1, None), row("a", 16, 100.0)]
    folder = tmp_path / "benchmark_results" / "a-card"
    folder.mkdir(parents=True)
    result = results.make("test_batch_sizes", ENVIRONMENT, rows)
    (folder / "test_batch_sizes.json").write_text(results.dumps(result))
    (folder / "test_batch_sizes-smoke.json").write_text(results.dumps(result))
    plots.over_batch(result, folder / "test_batch_sizes.png")
    (folder / "broken.json").write_text("{}")
    return folder.parent


class Reader(HTMLParser):
    """Open tags, the cells of every table by its id, and what the page would fetch."""

    VOID = {"meta", "br", "img"}

    def __init__(self, text):
        super().__init__()
        self.open, self.tables, self.addresses, self.ids, self.text = [], {}, [], set(), ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "table":
            self.rows = self.tables[attributes["id"]] = []
        elif tag == "tr":
            self.rows.append([])
        elif tag == "td":
            self.rows[-1].append(attributes["data-value"])
        elif tag == "th":
            self.rows[-1].append(attributes["data-key"])
        self.ids |= {attributes["id"]} if "id" in attributes else set()
        self.addresses += [attributes[name] for name in ("src", "href") if name in attributes]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data):
        self.text += data


def test_the_page_is_well_formed_self_contained_and_complete(recorded):
    assert report.main([str(recorded)]) == 0
    read = Reader((recorded / "index.html").read_text())
    assert read.open == []
    assert all(a.startswith(("#", "data:image/png;base64,", "a-card/")) for a in read.addresses)
    assert {a[1:] for a in read.addresses if a.startswith("#")} <= read.ids
    for address in read.addresses:
        if address.startswith("a-card/"):
            assert json.loads((recorded / address).read_text()) is not None
    assert sum(address.startswith("data:") for address in read.addresses) == 1
    heads, *body = read.tables["a-card-test_batch_sizes-table"]
    assert heads.index("label") == 0 and "latency_us" in heads and "gpu_us" not in heads
    assert [cells[0] for cells in body] == ["b & co", "a & co", "c", "a & co"]
    assert [cells[heads.index("latency_us")] for cells in body] == ["9.0", "10.0", "", "100.0"]
    assert "c skipped: not <here>; run: x" in read.text and "copy 1000.0 GB/s" in read.text
    assert "python test_batch_sizes.py" in read.text
    assert "broken in a-card" in read.text and "not a result file" in read.text
    assert "smoke" not in read.text.replace("-smoke", "")  # a real result is there


def test_nothing_on_the_page_comes_from_a_network(recorded):
    text = re.sub(r'src="data:[^"]*"', "", page.page(recorded))
    assert (
        "http:" not in text
        and "https:" not in text
        and "//" not in re.sub(r"^ *//.*$", "", text, flags=re.M)
    )


def test_a_smoke_result_is_shown_where_there_is_no_other(recorded):
    (recorded / "a-card" / "test_batch_sizes.json").unlink()
    assert "(smoke run: tiny sizes)" in page.page(recorded)


def test_rows_of_another_kind_have_a_table_too(recorded):
    made = {"label": "Ours", "status": "ok", "reason": "a note", "tokens_per_s": 120.5}
    made |= {"method": "draft", "mode": "eager", "acceptance_by_position": [0.5, 0.2]}
    environment = {key: value for key, value in ENVIRONMENT.items() if key != "driver"}
    result = results.make("demo_with_real_llm", environment, [made])
    (recorded / "a-card" / "demo_with_real_llm.json").write_text(results.dumps(result))
    heads, cells = Reader(page.page(recorded)).tables["a-card-demo_with_real_llm-table"]
    assert cells[heads.index("tokens_per_s")] == "120.5" and "acceptance_by_position" not in heads


@pytest.mark.parametrize(
    "folder, message", [("none", "No such file"), ("empty", "no result files")]
)
def test_a_folder_without_results_is_an_error(tmp_path, capsys, folder, message):
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit) as stop:
        report.main([str(tmp_path / folder)])
    assert stop.value.code == 2 and message in capsys.readouterr().err


def browsed(recorded, tmp_path, fragment=""):
    """The page's document as headless Chromium leaves it, and what it said on the console."""
    report.main([str(recorded)])
    address = (recorded / "index.html").as_uri() + fragment
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", address]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium (Debian's package)")
TABLE = "a-card-test_batch_sizes-table"


@needs_chromium
@pytest.mark.parametrize(
    "order, wanted",
    [
        ("latency_us:ascending", ["9.0", "10.0", "100.0", ""]),
        ("latency_us:descending", ["100.0", "10.0", "9.0", ""]),
    ],
)
def test_a_browser_sorts_the_table_by_number_without_console_errors(
    recorded, tmp_path, order, wanted
):
    dom, console = browsed(recorded, tmp_path, f"#{TABLE}:{order}")
    heads, *body = Reader(dom).tables[TABLE]
    assert [cells[heads.index("latency_us")] for cells in body] == wanted
    assert console == []
    assert f'aria-sort="{order.split(":")[1]}"' in dom


@needs_chromium
def test_a_click_on_a_head_sorts_and_a_second_one_turns_it_round(recorded, tmp_path):
    script = (
        'for (const times of [1, 2]) document.querySelector("th[data-key=label] button").click();'
    )
    original = page.page

    def clicking(folder):
        return original(folder).replace("</body>", f"<script>{script}</script></body>")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page, "page", clicking)
        dom, console = browsed(recorded, tmp_path)
    _, *body = Reader(dom).tables[TABLE]
    assert [cells[0] for cells in body] == ["c", "b & co", "a & co", "a & co"] and console == []
