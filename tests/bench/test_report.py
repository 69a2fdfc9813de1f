"""The page and its tables, from records that the measuring functions themselves make."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from metaembed.bench.claims import BUDGETS, judge_claims
from metaembed.bench.claims import Point as ClaimPoint
from metaembed.bench.dataset import Dataset, Item
from metaembed.bench.efficiency import encoder_costs, scoring_costs
from metaembed.bench.quality import measure_quality
from metaembed.bench.records import make_record, read_records
from metaembed.bench.report import write_report
from metaembed.bench.report_advice import make_advice
from metaembed.bench.report_plots import draw_parity
from metaembed.bench.report_tables import MISSING, TABLES, fill_tables
from metaembed.bench.table import to_markdown
from metaembed.runtime.cascade import Stage
from metaembed.runtime.errors import UsageError
from metaembed.runtime.known_models import KNOWN

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def records():
    rng = np.random.default_rng(0)
    queries, candidates = (rng.standard_normal(shape, np.float32) for shape in ((9, 16, 5), (20, 64, 5)))
    items = tuple(Item(str(k), "text", None) for k in range(20))
    dataset = Dataset("a <b> & c", items, items[:9], tuple({k: 1.0} for k in range(9)))
    quality = measure_quality(dataset, queries, candidates, [[Stage(budget)] for budget in BUDGETS])
    costs = scoring_costs("7b", KNOWN["7b"].geometry)
    return [
        *(make_record("quality", values) for values in quality),
        *(make_record("scoring_cost", values) for values in costs),
        *(make_record("encoder_cost", values) for values in encoder_costs("7b", KNOWN["7b"].geometry)),
    ]


class _Links(HTMLParser):
    """Everything a page would fetch, and every id."""

    def __init__(self):
        super().__init__()
        self.fetched, self.ids, self.open = [], [], []

    def handle_starttag(self, tag, attrs):
        named = dict(attrs)
        self.ids += [named["id"]] if "id" in named else []
        self.fetched += [value for key, value in attrs if key in ("src", "data") or (key == "href" and tag == "link")]
        self.fetched += [tag] if tag in ("script", "iframe", "img") else []


def test_the_page_needs_nothing_else_and_has_no_id_twice(records, tmp_path):
    page = write_report(records, tmp_path).read_text(encoding="utf-8")
    found = _Links()
    found.feed(page)
    assert not found.fetched
    assert "@import" not in page
    assert not re.search(r"url\((?!#)", page)
    assert len(found.ids) == len(set(found.ids))
    references = set(re.findall(r'(?:href="#|url\(#)([^")]+)', page))
    assert references <= set(found.ids)


def test_the_page_holds_every_measured_figure_as_text(records, tmp_path):
    page = write_report(records, tmp_path).read_text(encoding="utf-8")
    for record in records:
        if record["kind"] == "quality":
            assert f"<td>{record['ndcg_at_5']:.3f}</td>" in page
    assert "a &lt;b&gt; &amp; c" in page
    assert "a <b>" not in page


def test_plots_follow_light_and_dark(records, tmp_path):
    page = write_report(records, tmp_path).read_text(encoding="utf-8")
    (svg, *_) = re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)
    assert "var(--s1)" in svg
    assert not re.search(r"#1f5fbf|#59616d", svg)
    assert (tmp_path / "plots" / "quality.png").read_bytes()[:4] == b"\x89PNG"
    assert not (tmp_path / "plots" / "roofline.png").exists()
    assert "roofline of scoring" in page.rsplit("Not measured here", 1)[1]


def test_the_advice_says_whose_quality_it_is_and_what_a_first_stage_may_lose():
    """By hand: of 16,64, 0.9, a first stage of 1,1, 0.5, may lose up to 0.4; the curve knows 2,000 candidates, not a million."""
    values = dict(zip(map(str, BUDGETS), (0.5, 0.6, 0.7, 0.8, 0.9), strict=True))
    about = {"kind": "quality", "cascade": None, "dataset": "pages", "artefact": "ours", "candidates": 2000}
    table = make_advice([about | {"budget": budget, "ndcg_at_5": value} for budget, value in values.items()])
    rows = {row[0]: row for row in table.rows}
    assert rows["Jetson AGX Orin 64 GB, 3b"][1].startswith("cascade 1,1:1000 16,64;")
    assert rows["Jetson AGX Orin 64 GB, 3b"][4:] == ("0.500 to 0.900", "0.000 to 0.400")
    assert "ours on pages, over 2,000 candidates" in table.note


def test_no_two_curves_of_parity_look_alike():
    records = [
        {"kind": "parity", "model": "m", "precision": precision, "side": side, "image_tokens": 4, "min_cosine": 0.99}
        for precision in ("fp32", "bf16", "fp16", "int8", "fp8")
        for side in ("query", "candidate")
    ]
    lines = [line for line in draw_parity(records).axes[0].lines if not line.get_label().startswith("_")]
    looks = {(line.get_color(), line.get_marker(), line.get_fillstyle()) for line in lines}
    assert len(lines) == len(looks) == 10


def test_tables_between_markers_are_made_again(records):
    text = "before\n<!-- table: demo_quality -->\nold\n<!-- /table -->\nafter\n"
    once = fill_tables(text, records)
    assert once == fill_tables(once, records)
    assert "old" not in once
    assert once.startswith("before\n<!-- table: demo_quality -->\n| budget |")
    assert to_markdown(TABLES["demo_quality"].make(records)) in once
    assert once.endswith("<!-- /table -->\nafter\n")
    assert MISSING in fill_tables("<!-- table: claims -->\n<!-- /table -->\n", records)


@pytest.mark.parametrize("text", ["<!-- table: nonsense -->\n<!-- /table -->\n", "<!-- table: claims -->\nno end\n"])
def test_a_wrong_marker_is_a_usage_error(records, text):
    with pytest.raises(UsageError):
        fill_tables(text, records)


@pytest.mark.parametrize(
    "path", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda path: path.name
)
def test_documented_tables_equal_the_records(path):
    """Expected: bench/results, which the commands named in it wrote. Mend with: metaembed-bench tables README.md --records ..."""
    results = ROOT / "bench" / "results"
    text = path.read_text(encoding="utf-8")
    recorded = read_records([results]) if any(results.glob("*.jsonl")) else []
    blocks = re.findall(r"<!-- table: \w+ -->\n(.*?)<!-- /table -->", text, flags=re.DOTALL)
    if recorded and any(block.strip() for block in blocks):
        assert fill_tables(text, recorded) == text


def test_documented_pictures_show_the_records(tmp_path):
    """Expected: what bench/results draws now. Mend with: metaembed-bench report bench/results -o DIR, then plots/*.svg."""

    def words(path):
        return re.findall(r"<text[^>]*>([^<]*)</text>", path.read_text(encoding="utf-8"))

    write_report(read_records([ROOT / "bench" / "results"]), tmp_path)
    for name, some in (("budgets", {"nDCG@5", "16,64"}), ("scaling", {"ms a query", "16,64"})):
        drawn = words(tmp_path / "plots" / f"{name}.svg")
        assert some < set(drawn)
        assert words(ROOT / "docs" / f"{name}.svg") == drawn


def _point(name, budget, values):
    return ClaimPoint(name, budget, True, ({"ndcg_at_5": np.array(values)},), budget.candidate)


def test_a_claim_holds_only_when_its_whole_interval_is_above_zero():
    """Expected by hand: +0.5 for every query holds, -0.5 does not, and +-0.5 in turn decides nothing."""
    ups = {budget: [0.1 * k] * 8 for k, budget in enumerate(BUDGETS)}
    points = {("MMR", budget): _point("MMR", budget, values) for budget, values in ups.items()}
    rival = {0: [-0.5] * 8, 1: [0.6] * 8, 2: [0.2 + 0.5, 0.2 - 0.5] * 4}
    for k, values in rival.items():
        points["NoMMR", BUDGETS[k]] = _point("NoMMR", BUDGETS[k], values)
    verdicts = {verdict["claim"]: verdict["verdict"] for verdict in judge_claims(points)}
    assert verdicts["quality rises from 1,1 to 2,4"] == "held"
    assert verdicts["MMR beats NoMMR at 1,1"] == "held"
    assert verdicts["MMR beats NoMMR at 2,4"] == "did not hold"
    assert verdicts["MMR beats NoMMR at 4,8"] == "not decided"
    assert "MMR beats NoMMR at 8,16" not in verdicts
