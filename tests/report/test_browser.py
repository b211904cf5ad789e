"""The report in headless Chromium, offline: what is safe, what moves, what can be reached, what can be read."""

import re
import shutil

import pytest
from report import samples

from lightning_mixprec.report.writing import render

webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium: pip install selenium")
ActionChains, Keys = webdriver.ActionChains, webdriver.Keys

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
CHROMEDRIVER = shutil.which("chromedriver")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not CHROMIUM, reason="needs chromium, and there is none on the PATH"),
    pytest.mark.skipif(not CHROMEDRIVER, reason="needs chromedriver, and there is none on the PATH"),
]

BREAK_IN = """
for (const name of ["alert", "confirm", "prompt"]) window[name] = () => { window.pwned = name; };
window.requested = [];
document.addEventListener("securitypolicyviolation", (event) => window.requested.push(event.violatedDirective));
"""
TEXT_COLOURS = {
    "ink": ("bg", "card", "faint", "errorbg", "warningbg", "notebg"),
    "muted": ("bg", "card", "faint", "errorbg", "warningbg", "notebg"),
    "error": ("bg", "errorbg"),
    "warning": ("bg", "warningbg"),
    "note": ("bg", "notebg"),
    "good": ("bg",),
    "onformat": ("f64", "f32", "fbf", "f16", "f43", "f52", "fi8", "fot"),
    "bg": ("ink",),
}


class Browser:
    """A page in Chromium and what a user can do with it."""

    def __init__(self, driver, folder):
        self.driver, self.folder = driver, folder

    def open(self, content, width=1280, scheme="light", media=""):
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": media, "features": features})
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        path = self.folder / "report.html"
        path.write_text(render(content), encoding="utf-8")
        self.driver.get(path.as_uri())

    def run(self, script, *arguments):
        return self.driver.execute_script(script, *arguments)

    def texts(self, selector):
        """The texts of the elements that are visible."""
        script = """return [...document.querySelectorAll(arguments[0])].filter((each) => each.checkVisibility())
            .map((each) => each.textContent.trim())"""
        return self.run(script, selector)

    def css(self, selector, name):
        return self.run("return getComputedStyle(document.querySelector(arguments[0]))[arguments[1]]", selector, name)

    def press(self, *keys):
        ActionChains(self.driver).send_keys(*keys).perform()

    def type_filter(self, text):
        self.driver.find_element("id", "filter").clear()
        self.driver.find_element("id", "filter").send_keys(text)

    def focused(self):
        return self.run("const e = document.activeElement; return e.id || e.getAttribute('aria-label') || e.tagName")

    def tip(self):
        return self.texts("#tip:not([hidden]) div")


@pytest.fixture(scope="module")
def driver():
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    options.unhandled_prompt_behavior = "ignore"
    for argument in ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "proxy-server=127.0.0.1:9"):
        options.add_argument("--" + argument)
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(CHROMEDRIVER))
    driver.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": BREAK_IN})
    yield driver
    driver.quit()


@pytest.fixture
def browser(driver, tmp_path):
    for kind in ("browser", "performance"):
        driver.get_log(kind)
    return Browser(driver, tmp_path)


def requests_of(driver):
    messages = [entry["message"] for entry in driver.get_log("performance")]
    found = [
        re.search(r'"Network.requestWillBeSent".*?"request":\{.*?"url":"([^"]*)"', message) for message in messages
    ]
    return [match[1] for match in found if match]


@pytest.mark.parametrize("make", [samples.hostile, samples.sample, samples.pair, samples.empty])
def test_nothing_runs_and_nothing_is_fetched(browser, make):
    browser.open(make())
    browser.run("for (const each of document.querySelectorAll('*')) { each.focus?.(); }")
    browser.type_filter("script")
    assert browser.run("return window.pwned") is None
    assert browser.run("return window.requested") == []
    assert browser.driver.get_log("browser") == []
    assert [url.rpartition("/")[2] for url in requests_of(browser.driver)] == ["report.html"]
    assert browser.run("return performance.getEntriesByType('resource').length") == 0


def test_hostile_names_are_seen_as_they_are(browser):
    browser.open(samples.hostile())
    seen = browser.texts("#assignment td:first-child")
    names = [" ".join(name.encode("utf-8", "replace").decode().split()) for name in samples.HOSTILE_NAMES]
    assert [" ".join(name.split()) for name in seen] == names
    browser.run("document.querySelector('#precision .pane').focus()")
    browser.press(Keys.ARROW_DOWN)
    assert browser.tip()[0] == names[1]


def test_the_filter_hides_what_does_not_match_and_counts(browser):
    browser.open(samples.sample())
    sections = ("#precision tbody th", "#underflow_rate tbody th", "#assignment td:first-child", "figcaption bdi")
    before = {section: browser.texts(section) for section in sections}
    assert browser.texts("#count") == ["24 layers"]
    browser.type_filter("ATTN.qkv")
    for section in sections:
        wanted = [name for name in before[section] if "attn.qkv" in name]
        assert wanted
        assert browser.texts(section) == wanted
    assert browser.texts("#count") == ["4 of 24 layers"]
    assert browser.texts("#moves td:first-child") == ["88", "176"]
    assert browser.texts("#alerts .alert") == []
    assert browser.texts("#alerts .none") == ["No alert names a layer that matches the filter."]
    browser.press(Keys.ESCAPE)
    assert browser.texts("#count") == ["24 layers"]
    assert {section: browser.texts(section) for section in sections} == before
    assert browser.texts(".none") == []


def test_the_filter_takes_no_notice_of_case(browser):
    content = samples.sample()
    for each in content["runs"][0]["assignment"]:
        each["layer"] = each["layer"].replace("attn", "Attn")
    browser.open(content)
    browser.type_filter("ATTN.qkv")
    assert len(browser.texts("#assignment td:first-child")) == 4


def test_the_filter_finds_the_layers_of_a_row_of_many(browser):
    browser.open(samples.large())
    browser.type_filter("blocks.8.norm2")
    assert browser.texts("#count") == ["1 of 1,000 layers"]
    assert browser.texts("#assignment td:first-child") == ["model.blocks.8.norm2"]
    assert len(browser.texts("#precision tbody th")) == 1


def test_zoom_changes_all_time_axes_and_reset_brings_them_back(browser):
    browser.open(samples.pair())
    axes = "return [...document.querySelectorAll('.pane:not([data-h]) .ax')].map((e) => e.textContent)"
    boxes = "return [...document.querySelectorAll('svg.t')].map((e) => e.getAttribute('viewBox'))"
    before = browser.run(axes), browser.run(boxes)
    served = re.findall(r'<svg class="?t\b[^>]*? viewBox="([^"]*)"', render(samples.pair()))
    for old, new in zip(served, before[1], strict=True):
        assert [float(x) for x in new.split()] == pytest.approx([float(x) for x in old.split()], abs=0.01)
    browser.run("document.getElementById('in').click()")
    after = browser.run(axes), browser.run(boxes)
    assert browser.texts("#range") == ["steps 83 to 248"]
    assert len(set(after[0])) == 1
    for old, new in zip(before, after, strict=True):
        assert all(a != b for a, b in zip(old, new, strict=True))
    for old, new in zip(before[1], after[1], strict=True):
        (start, _, width, _), (new_start, _, new_width, _) = (map(float, box.split()) for box in (old, new))
        assert new_width / width == pytest.approx(165 / 330)
        assert (new_start - start) / width == pytest.approx(83 / 330)
    browser.run("document.getElementById('reset').click()")
    assert (browser.run(axes), browser.run(boxes)) == before
    assert browser.run("return document.getElementById('reset').disabled")


def test_dragging_across_a_chart_zooms_to_it(browser):
    browser.open(samples.sample())
    plot = browser.driver.find_element("css selector", "#loss .tall svg.t")
    quarter = plot.rect["width"] / 4
    ActionChains(browser.driver).move_to_element_with_offset(plot, int(-quarter), 0).click_and_hold().move_to_element(
        plot
    ).release().perform()
    start, end = map(int, re.findall(r"\d+", browser.texts("#range")[0]))
    assert abs(start - 66) <= 2
    assert abs(end - 132) <= 2


def test_hovering_tells_the_exact_value(browser):
    browser.open(samples.sample())
    row = samples.sample()["runs"][0]["rows"][0]
    plot = browser.driver.find_element("css selector", "#underflow_rate tbody svg.t")
    ActionChains(browser.driver).move_to_element(plot).pause(0.1).move_by_offset(1, 0).perform()
    name, when, value = browser.tip()
    first = int(re.search(r"\d+", when)[0])
    cell = samples.sample()["runs"][0]["samples"]["edges"].index(first)
    assert name == row["label"]
    rate = 100 * row["underflow_rate"][cell]
    assert value == f"{float(f'{rate:.2g}'):g}\xa0%"


def test_the_keyboard_reaches_all_and_reads_values(browser):
    browser.open(samples.sample())
    reached = []
    for _ in range(14):
        browser.press(Keys.TAB)
        reached.append(browser.focused())
        if reached[-1].startswith("step "):
            break
    assert reached[:2] == ["filter", "in"]  # nothing to zoom out from yet
    assert any(each.startswith("loss and loss scale") for each in reached)
    assert reached[-1].startswith("step 88; fp16 → bf16")
    assert browser.tip()[0] == "step 88"
    assert browser.css(".mk:focus path", "strokeWidth") == "3px"
    browser.press(Keys.ARROW_RIGHT)
    assert browser.tip()[0] == "step 176"
    browser.press("+")
    assert browser.texts("#range") == ["steps 66 to 198"]
    browser.run("document.querySelector('#headroom_bits .pane').focus()")
    browser.press(Keys.ARROW_DOWN, Keys.ARROW_RIGHT)
    assert browser.tip()[0] == "model.blocks.0.norm1"
    assert browser.tip()[-1] == "100 bits"
    ActionChains(browser.driver).key_down(Keys.SHIFT).send_keys(Keys.ARROW_RIGHT).key_up(Keys.SHIFT).perform()
    assert browser.texts("#range") == ["steps 99 to 231"]
    browser.press(Keys.ESCAPE)
    assert browser.tip() == []


@pytest.mark.parametrize(("scheme", "is_dark"), [("light", False), ("dark", True)])
def test_the_page_follows_the_colour_scheme_and_its_texts_can_be_read(browser, scheme, is_dark):
    browser.open(samples.sample(), scheme=scheme)
    red, green, blue = map(int, re.findall(r"\d+", browser.css("body", "backgroundColor")))
    assert (red + green + blue < 150) is is_dark
    variable = "return getComputedStyle(document.documentElement).getPropertyValue('--' + arguments[0]).trim()"
    for text, grounds in TEXT_COLOURS.items():
        for ground in grounds:
            pair = browser.run(variable, text), browser.run(variable, ground)
            assert contrast(*pair) >= 4.5, (scheme, text, ground, pair)


def contrast(first, second):
    """The contrast ratio of two colours such as #a0b1c2, as WCAG 2 defines it."""
    low, high = sorted(luminance(each) for each in (first, second))
    return (high + 0.05) / (low + 0.05)


def luminance(colour):
    shares = [int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)]
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in shares]
    return sum(weight * x for weight, x in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_on_paper_there_are_no_controls_and_all_is_open(browser):
    browser.open(samples.large(), media="print", scheme="dark")
    assert browser.css("#tools", "display") == "none"
    assert browser.css("body", "backgroundColor") == "rgb(255, 255, 255)"
    assert browser.css("#assignment .pane", "maxHeight") == "none"
    browser.run("for (const each of document.querySelectorAll('details')) each.open = false")
    browser.run("dispatchEvent(new Event('beforeprint'))")
    assert browser.run("return document.querySelectorAll('details:not([open])').length") == 0


@pytest.mark.parametrize("width", [400, 700, 1000])
@pytest.mark.parametrize("make", [samples.sample, samples.pair, samples.hostile, samples.empty])
def test_a_narrow_window_has_no_horizontal_scroll(browser, make, width):
    browser.open(make(), width=width)
    assert browser.run("return document.documentElement.scrollWidth") <= width


def test_without_its_script_the_page_still_says_everything(browser):
    browser.driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        browser.open(samples.sample())
        text = browser.driver.find_element("tag name", "body").text
    finally:
        browser.driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})
    assert "part of a name" not in text
    assert "Filter by layer" not in text
    for words in (
        "The forward overflows in fp16",
        "model.blocks.3.attn.proj",
        "Underflow rate",
        "NVIDIA H100",
        "100 bits",
    ):
        assert words in text.replace("\xa0", " ")
