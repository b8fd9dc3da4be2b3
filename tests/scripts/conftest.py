"""Fixtures that the tests of pages share."""

import json
import re
import shutil
import subprocess
from html import escape, unescape
from pathlib import Path

import pytest

HEIGHT = 4000  # pixels of a screenshot
# Counts the faults that a reader would notice, after the browser has laid out the page.
PROBE = """<script>addEventListener("load", () => {
  const seen = [...document.querySelectorAll("h1, h2, p, li, figure, table, summary")].filter(e => e.offsetHeight);
  const overlap = (a, b) => !a.contains(b) && !b.contains(a) && (() => {
    const p = a.getBoundingClientRect(), q = b.getBoundingClientRect();
    return Math.min(p.right, q.right) - Math.max(p.left, q.left) > 1 &&
           Math.min(p.bottom, q.bottom) - Math.max(p.top, q.top) > 1; })();
  const images = [...document.images];
  parent.document.body.setAttribute("data-probe", JSON.stringify({
    width: innerWidth,
    wide: document.documentElement.scrollWidth,
    images: images.length,
    broken: images.filter(i => !i.naturalWidth).length,
    remote: [...document.querySelectorAll("[src], [href]")].filter(
      e => /^(https?:)?\\/\\//.test(e.getAttribute("src") || e.getAttribute("href"))).length,
    overlaps: seen.flatMap((a, i) =>
      seen.slice(i + 1).filter(b => overlap(a, b)).map(b => a.tagName + "/" + b.tagName)),
    text: document.body.innerText.length,
  }));
});</script>"""


@pytest.fixture(scope="session")
def in_browser(tmp_path_factory):
    """Opens a page in headless Chromium at a given width and returns its faults. Skips the test without Chromium."""
    browser = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")
    if browser is None:
        pytest.skip("no Chromium here to open pages with: apt-get install chromium")

    def look(path: Path, width: int, screenshot: Path | None = None) -> dict:
        folder = tmp_path_factory.mktemp("browser")
        # In a frame of that width, since Chromium's window is never narrower than 500.
        content = Path(path).read_text(encoding="utf-8").replace("</body>", PROBE + "</body>")
        frame = f'<iframe style="border:0;width:{width}px;height:{HEIGHT}px" srcdoc="{escape(content)}"></iframe>'
        probed = folder / "page.html"
        probed.write_text(f'<meta charset="utf-8"><body style="margin:0">{frame}</body>', encoding="utf-8")
        options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}"]
        options += [f"--window-size={max(width, 500)},{HEIGHT}", "--virtual-time-budget=10000", "--hide-scrollbars"]
        if screenshot:
            subprocess.run([browser, *options, f"--screenshot={screenshot}", probed.as_uri()], capture_output=True)
        process = subprocess.run(
            [browser, *options, "--dump-dom", probed.as_uri()], capture_output=True, text=True, timeout=120
        )
        return json.loads(unescape(re.search(r'data-probe="(.*?)"', process.stdout)[1]))

    return look
