"""The report's HTML, read by a parser: what is in it, what cannot get in, how large it is."""

import base64
import copy
import hashlib
import json
import math
import re
import sys
from html.parser import HTMLParser

import pytest
from report import samples

from lightning_mixprec import MixPrecError
from lightning_mixprec.numerics.formats import FORMATS
from lightning_mixprec.numerics.plots import COLORS, tint
from lightning_mixprec.report import charts, histograms, view
from lightning_mixprec.report.writing import render

ALLOWED_ATTRIBUTES = re.compile(r"[a-z]+(-[a-z]+)*|viewBox|preserveAspectRatio", re.IGNORECASE)


class Page(HTMLParser):
    """All elements with their attributes, and the text outside of style and script."""

    def __init__(self, source):
        super().__init__()
        self.elements, self.words, self.raw = [], [], {}
        self._inside = None
        self.feed(source)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self._inside = (tag, dict(attrs).get("id")) if tag in {"script", "style"} else None

    def handle_endtag(self, tag):
        self._inside = None

    def handle_data(self, data):
        if self._inside:
            self.raw[self._inside] = self.raw.get(self._inside, "") + data
        else:
            self.words.append(data)

    def all(self, tag, **attributes):
        return [attrs for name, attrs in self.elements if name == tag and attributes.items() <= attrs.items()]


def page_of(content):
    return Page(render(content))


def test_the_sample_says_what_its_content_says():
    content = samples.sample()
    run, page = content["runs"][0], page_of(content)
    for alert in run["alerts"]:
        assert alert["title"] in page.text
        assert alert["text"] in page.text
        assert alert["advice"] in page.text
    for fact in run["facts"]:
        assert f"{fact['label']} {fact['value']} {fact['hint']}" in page.text
    for each in run["assignment"]:
        assert each["layer"] in page.text
        assert each["rule"] in page.text
    for name, value in run["environment"]:
        assert f"{name} {value}" in page.text
    assert "1 error, 1 warning, 1 note." in page.text


@pytest.mark.parametrize("make", [samples.sample, samples.pair, samples.hostile, samples.empty])
def test_nothing_in_the_page_can_be_fetched_or_run(make):
    page = page_of(make())
    assert {tag for tag, _ in page.elements} & {
        "img",
        "iframe",
        "link",
        "object",
        "embed",
        "base",
        "form",
        "a",
    } == set()
    assert [tag for tag, _ in page.elements].count("script") == 2
    for tag, attributes in page.elements:
        for name in attributes:
            assert not name.startswith("on"), (tag, name)
            assert name not in {"src", "href", "xlink:href", "style", "srcdoc", "action"}, (tag, name)
            assert ALLOWED_ATTRIBUTES.fullmatch(name), (tag, name)


def test_the_policy_lets_through_this_style_and_this_script_alone():
    page = page_of(samples.hostile())
    policy = page.all("meta", **{"http-equiv": "Content-Security-Policy"})[0]["content"]
    digests = {
        kind: base64.b64encode(hashlib.sha256(page.raw[kind, None].encode()).digest()).decode()
        for kind in ("style", "script")
    }
    assert policy == (
        f"default-src 'none'; style-src 'sha256-{digests['style']}'; script-src 'sha256-{digests['script']}'; "
        "base-uri 'none'; form-action 'none'"
    )


def test_hostile_names_are_texts_and_data():
    content = samples.hostile()
    source = render(content)
    page = Page(source)
    source.encode("utf-8")
    for name in samples.HOSTILE_NAMES:
        seen = " ".join(name.encode("utf-8", "replace").decode().split())
        assert seen in page.text
    data = json.loads(page.raw["script", "data"])
    assert [row["label"] for row in data["runs"][0]["rows"]] == [row["label"] for row in content["runs"][0]["rows"]]
    for character in "<>&'\u2028":
        assert character not in page.raw["script", "data"]


def test_the_script_writes_texts_only():
    script = page_of(samples.sample()).raw["script", None]
    assert (
        re.findall(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|Function\(|fetch\(|XMLHttp", script)
        == []
    )


def odd_contents():
    for change in (
        {"rows": []},
        {"histograms": []},
        {"alerts": []},
        {"moves": []},
        {"assignment": []},
        {"arithmetic": []},
        {"facts": []},
        {"environment": []},
        {"rows": [], "samples": {"edges": []}},
    ):
        yield samples.report(samples.sample_run("odd", layers=5, steps=20) | change)
    yield samples.empty()
    yield samples.report(samples.sample_run("one layer", layers=1, steps=3))
    yield samples.report(samples.sample_run("one step", layers=3, steps=1))
    yield samples.report(samples.sample_run("resumed", layers=3, steps=50, start=7_000_000))
    yield samples.report(samples.sample_run("failed", state="failed"), samples.empty()["runs"][0])
    yield without_some_kinds()
    yield constant_losses()
    yield odd_histograms()


def without_some_kinds():
    run = samples.sample_run("underflow alone")
    for row in run["rows"]:
        row |= {"headroom_bits": [], "grad_cosine": [], "sqnr_db": []}
    return samples.report(run)


def constant_losses():
    run = samples.sample_run("constant", layers=2, steps=4)
    nothing = [None] * 4
    run["curve"] |= {"loss": [-1.0, None, -1.0, -1.0], "loss_min": nothing, "loss_max": nothing, "scale": nothing}
    return samples.report(run)


def odd_histograms():
    run = samples.sample_run("histograms", layers=6)
    kinds = [
        {"lowest": 0, "counts": [], "zeros": 0},
        {"lowest": 0, "counts": [0, 0], "zeros": 7},
        {"lowest": -500, "counts": [1], "zeros": 0},
    ]
    for each, counted in zip(run["histograms"], kinds, strict=True):
        each |= {"gradient": counted, "output": None, "loss_scale": 1.0}
    run["histograms"][0] |= {"gradient": None, "format": "fp32"}
    return samples.report(run)


@pytest.mark.parametrize("content", list(odd_contents()), ids=lambda content: content["runs"][0]["name"])
def test_odd_contents_make_whole_pages(content):
    before = copy.deepcopy(content)
    source = render(content)
    assert source.rstrip().endswith("</html>")
    assert not re.search(r"\b(None|nan|inf|undefined)\b", re.sub(r"(?s)<script>.*?</script>", "", source))
    assert content == before


def test_a_run_in_which_nothing_was_found_says_who_watched():
    run = samples.sample_run("quiet") | {"alerts": []}
    assert (
        "Nothing was found. Watched by OverflowMonitor, UnderflowMonitor, FidelityMonitor."
        in page_of(samples.report(run)).text
    )
    assert "No monitor was watching" in page_of(samples.empty()).text


def test_two_runs_share_their_axes_and_tell_their_differences():
    content = samples.pair()
    page = page_of(content)
    assert "3 of 25 layers compute in different formats at the end" in page.text
    assert (
        len({attrs["viewbox"] for attrs in page.all("svg", **{"class": "t"}) if attrs["viewbox"].endswith("100")}) == 1
    )
    assert json.loads(page.raw["script", "data"])["span"] == [0, 330]


def test_a_thousand_layers_take_less_than_500_kb():
    assert len(render(samples.large()).encode()) < 500_000
    assert len(render(samples.large(noisy=True)).encode()) < 620_000


def test_without_jinja2_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(MixPrecError, match=re.escape("pip install 'lightning_mixprec[report]'")):
        render(samples.empty())


def unpack(key, codes):
    """The script's reading of a packed row, said again."""
    for k in range(0, len(codes), 2):
        code = 64 * view.CODE_DIGITS.index(codes[k]) + view.CODE_DIGITS.index(codes[k + 1])
        if code == 4095:
            yield None
        elif key in ("headroom_bits", "sqnr_db"):
            yield (code - 1000) / 10
        else:
            yield float(f"{10 + (code - 1) % 90}e{(code - 1) // 90 - 31}") if code else 0.0


@pytest.mark.parametrize("value", [0.0, 1e-30, 9.96e-8, 1e-7, 1.04e-3, 0.0995, 0.5, 0.999, 1.0, 2.0])
def test_packed_shares_keep_two_digits(value):
    assert list(unpack("underflow_rate", view.pack("underflow_rate", [value]))) == [float(f"{value:.1e}")]
    (distance,) = unpack("grad_cosine", view.pack("grad_cosine", [1 - value]))
    assert math.isclose(distance, value, rel_tol=0.06, abs_tol=1e-15)


@pytest.mark.parametrize(
    ("value", "read"), [(-3.14, -3.1), (99.96, 100.0), (-500.0, -100.0), (1e6, 309.4), (None, None)]
)
def test_packed_bits_keep_a_tenth(value, read):
    assert list(unpack("sqnr_db", view.pack("sqnr_db", [value]))) == [read]


@pytest.mark.parametrize(
    ("key", "values", "levels"),
    [
        ("underflow_rate", [0, 0.001, 0.0011, 0.1, 0.3, 0.51], [0, 1, 2, 3, 4, 5]),
        ("headroom_bits", [100, 8, 7.9, 2, 0, -0.1], [0, 0, 1, 2, 4, 5]),
        ("grad_cosine", [1, 0.99995, 0.9995, 0.995, 0.95, -1], [0, 1, 2, 3, 4, 5]),
        ("sqnr_db", [60, 45, 35, 25, 15, 5], [0, 1, 2, 3, 4, 5]),
    ],
)
def test_levels(key, values, levels):
    heat = next(heat for heat in charts.HEATS if heat.key == key)
    assert [heat.level(value) for value in values] == levels
    assert len(heat.labels) == len(heat.bounds) + 1


def test_a_strip_joins_neighbours_and_leaves_out_what_was_not_measured():
    heat = charts.HEATS[0]
    assert charts.strip(heat, [0, 0, None, 0, 0.9], [10, 20, 30, 40, 50, 60]) == [(0, "M0 0h2M3 0h1"), (5, "M4 0h1")]
    assert charts.worst(heat, [0.1, None, 0.9]) == "90\xa0%"


def test_a_line_breaks_where_a_value_is_unknown():
    scale = charts.Scale(0, 10)
    assert charts.line_path([0, 2, 4, 6, 8], [0, 10, None, 5], scale) == "M0 100 1 100 3 0 4 0M6 50 7 50 8 50"
    assert charts.stairs_path([0, 2, 4], [10, 0], scale) == "M0 0V0H2V100H4"
    assert charts.line_path([0, 1], [None], scale) == ""


@pytest.mark.parametrize(("start", "end"), [(0, 1), (0, 264), (7, 9), (5_000_000, 5_000_017), (0, 10**7)])
def test_step_ticks_are_few_whole_and_inside(start, end):
    ticks = charts.step_ticks(start, end)
    steps = [int(tick["label"].replace(",", "")) for tick in ticks]
    assert 2 <= len(ticks) <= 6
    assert steps == sorted(set(steps))
    assert all(start <= step <= end for step in steps)


def test_shares_of_a_histogram_against_counting_by_hand():
    counted = {"lowest": -42, "counts": [1, 2, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 8, 5], "zeros": 20}
    held = histograms.range_of(samples.FORMATS["fp16"], 65536.0)
    assert (held.smallest, held.normal, held.largest) == (-40, -30, -1)
    assert histograms.shares(counted, held) == {"below": 3 / 20, "subnormal": 4 / 20, "held": 13 / 20, "above": 0}
    words = histograms.words(counted, "fp16", held, "gradient", 65536.0)
    assert words.replace("\xa0", " ") == (
        "Of the nonzero elements in fp16 at loss scale 65,536: 15 % below 2⁻⁴⁰ and vanish, 20 % subnormal, below 2⁻³⁰. "
        "50 % of all elements are exact zeros."
    )


def test_formats_have_the_colours_of_the_plots_and_are_written_on_in_black():
    style = page_of(samples.sample()).raw["style", None]
    assert {view.format_class(name) for name in FORMATS} == {view.format_class(name) for name in COLORS}
    for name, color in COLORS.items():
        fill = re.search(rf"--{view.format_class(name)}: (#\w+);", style).group(1)
        assert fill == tint(color)
        shares = [int(fill[place : place + 2], 16) / 255 for place in (1, 3, 5)]
        light = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in shares]
        luminance = sum(weight * x for weight, x in zip((0.2126, 0.7152, 0.0722), light, strict=True))
        assert (luminance + 0.05) / 0.05 >= 4.5
    assert "--onformat: #000000" in style
