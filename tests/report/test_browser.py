"""The page in a real browser: headless Chromium, on a phone and on a desk, in light and in dark."""

import html
import json
import re
import shutil
import subprocess

import pytest

from batchnorm.report.page import render

from . import sample

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
WIDTHS = (360, 1280)

# Each page stands in a frame of its width, for a window cannot be made as narrow as a phone. What is measured:
# how far it reaches, what it loaded, its colours, the least contrast of any text, the smallest letters of a picture.
MEASURE = r"""
const parts = colour => colour.match(/[\d.]+/g).map(Number);
const luminance = colour => {
  const [r, g, b] = parts(colour).slice(0, 3).map(v => v / 255)
    .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const contrast = (a, b) => {
  const [low, high] = [luminance(a), luminance(b)].sort((x, y) => x - y);
  return (high + 0.05) / (low + 0.05);
};
function measure(frame) {
  const page = frame.contentDocument, style = element => frame.contentWindow.getComputedStyle(element);
  page.querySelectorAll("details").forEach(details => details.open = true);
  const paper = style(page.body).backgroundColor;
  const worst = {contrast: 99, text: ""};
  let letters = 99, outside = [];
  for (const element of page.body.querySelectorAll("*")) {
    const box = element.getBoundingClientRect();
    if (!box.width || element.closest(".scroll *") || element.closest("defs, .plot g:not(:has(text))")) continue;
    if (box.right > frame.clientWidth + 0.5 || box.left < -0.5) {
      outside.push(element.tagName + " " + element.textContent.slice(0, 40));
    }
  }
  for (const element of page.body.querySelectorAll("*")) {
    const own = [...element.childNodes].some(node => node.nodeType == 3 && node.data.trim());
    if (!own || !element.getBoundingClientRect().width) continue;
    const drawn = element.tagName == "text", colour = drawn ? style(element).fill : style(element).color;
    const seen = contrast(colour, paper);
    if (seen < worst.contrast) Object.assign(worst, {contrast: seen, text: element.textContent.slice(0, 40)});
    if (drawn) letters = Math.min(letters, parseFloat(style(element).fontSize) * element.getScreenCTM().a);
  }
  return {
    width: frame.clientWidth, reach: page.documentElement.scrollWidth, outside, paper, ink: style(page.body).color,
    worst, letters, pictures: page.querySelectorAll("svg.plot").length,
    loaded: frame.contentWindow.performance.getEntriesByType("resource").map(entry => entry.name),
    dark: frame.contentWindow.matchMedia("(prefers-color-scheme: dark)").matches,
  };
}
addEventListener("load", () => {
  const found = [...document.querySelectorAll("iframe")].map(measure);
  document.getElementById("found").textContent = JSON.stringify(found);
});
"""


def look(page, folder, dark):
    """What `MEASURE` finds in `page`, for each of `WIDTHS`."""
    frames = "".join(
        f'<iframe style="width:{width}px;height:900px;border:0" srcdoc="{html.escape(page)}"></iframe>'
        for width in WIDTHS
    )
    wrapper = folder / "wrapper.html"
    wrapper.write_text(
        f'<!DOCTYPE html><meta charset="utf-8">{frames}<pre id="found"></pre><script>{MEASURE}</script>'
    )
    command = [
        BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
        "--disable-component-update", "--disable-sync", "--hide-scrollbars", "--virtual-time-budget=10000",
        f"--user-data-dir={folder / 'profile'}",
        f"--blink-settings=preferredColorScheme={0 if dark else 1}", "--dump-dom", wrapper.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    found = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found, done.stderr[-2000:]
    assert found[1], done.stderr[-2000:]
    return json.loads(html.unescape(found[1]))


@pytest.mark.skipif(BROWSER is None, reason="no chromium, chromium-browser or google-chrome on the path")
def test_reads_well_on_a_phone_and_on_a_desk_in_light_and_in_dark(tmp_path):
    page = render(sample.complete())
    seen = {}
    for dark in (False, True):
        folder = tmp_path / str(dark)
        folder.mkdir()
        seen[dark] = look(page, folder, dark)
        for width, found in zip(WIDTHS, seen[dark], strict=True):
            assert found["width"] == width
            assert found["dark"] is dark
            assert found["reach"] <= width, found["outside"]
            assert found["outside"] == []
            assert found["loaded"] == []
            assert found["pictures"] > 0
            assert found["worst"]["contrast"] >= 4.5, found["worst"]
            assert found["letters"] >= 10, found["letters"]
    assert seen[False][0]["paper"] != seen[True][0]["paper"]
    assert seen[False][0]["ink"] != seen[True][0]["ink"]
