"""The page in a browser: on a phone and on a desk, in light and in dark, nothing empty, nothing cut off, no error."""

import json
import re
import shutil
import subprocess
import tempfile
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from planish.compiler.bundle.bundle import Bundle
from planish.compiler.bundle.layout import REPORT_PAGE

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="there is no Chromium to open the page in")

PHONE, DESK = 390, 1280
#: Written into the page: what the browser made of every plot, and whether something is wider than the window.
PROBE = """
<script>
const plots = [...document.querySelectorAll("svg")].map(svg => {
  const box = svg.getBoundingClientRect(), inside = svg.getBBox();
  const texts = [...svg.querySelectorAll("text")].map(text => text.getBoundingClientRect());
  return {name: svg.dataset.plot, width: box.width, height: box.height, drawn: inside.width * inside.height,
    shapes: svg.querySelectorAll("path, use, text").length,
    cut: texts.filter(text => text.left < box.left - 1 || text.right > box.right + 1).length,
    letters: texts.length ? Math.min(...texts.map(text => text.height)) : 0};
});
const probe = {plots, window: window.innerWidth, wide: document.documentElement.scrollWidth - window.innerWidth,
  colour: getComputedStyle(document.body).backgroundColor};
const said = {id: "probe", textContent: JSON.stringify(probe)};
parent.document.body.append(Object.assign(document.createElement("pre"), said));
</script>
"""


def browse(page: Path, width: int, *options: str) -> tuple[str, str]:
    """Return what the browser writes to stdout and stderr."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        return _browse(page, width, profile, *options)


def _browse(page: Path, width: int, profile: str, *options: str) -> tuple[str, str]:
    done = subprocess.run(
        [
            str(BROWSER),
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--hide-scrollbars",
            "--force-device-scale-factor=1",
            "--enable-logging=stderr",
            f"--user-data-dir={profile}",
            f"--window-size={width},4000",
            *options,
            page.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return done.stdout, done.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For pages and pictures."""
    return tmp_path_factory.mktemp("pages")


def probed(page: Path, folder: Path, width: int, dark: bool) -> dict[str, Any]:
    """Return what the probe finds in a page as wide as that, and check that nothing of it is empty or cut off."""
    content = page.read_text(encoding="utf-8").replace("</body>", f"{PROBE}</body>")
    # No window is as narrow as a phone, but a frame is.
    frame = folder / f"framed-{width}.html"
    frame.write_text(f'<body><iframe width={width} height=4000 style="border: 0" srcdoc="{escape(content)}"></iframe>')
    out, err = browse(frame, DESK + 100, "--dump-dom", *(["--blink-settings=preferredColorScheme=0"] if dark else []))
    assert "CONSOLE" not in err
    (text,) = re.findall(r'<pre id="probe">(.*?)</pre>', out, re.DOTALL)
    found: dict[str, Any] = json.loads(text.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))
    assert found["window"] == width
    assert found["wide"] <= 0
    assert found["colour"] == ("rgb(20, 23, 26)" if dark else "rgb(246, 245, 242)")
    for plot in found["plots"]:
        assert min(plot["width"], plot["height"]) > 50, plot
        assert plot["drawn"] > 1000, plot
        assert plot["shapes"] > 10, plot
        assert not plot["cut"], plot
        assert plot["letters"] >= 9, plot
    return found


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [PHONE, DESK])
def test_it_is_whole(flattened: Bundle, folder: Path, width: int, dark: bool) -> None:
    assert len(probed(flattened.path / REPORT_PAGE, folder, width, dark)["plots"]) >= 15


def test_high_impact_channels_are_whole(high_impact: Bundle, folder: Path) -> None:
    drawn = {plot["name"] for plot in probed(high_impact.path / REPORT_PAGE, folder, PHONE, dark=True)["plots"]}
    assert {"high-counts", "high-bits", "high-loss", "high-alone-attn-in", "high-alone-ffn-out"} <= drawn


@pytest.mark.parametrize("width", [PHONE, DESK])
def test_a_screenshot_is_not_empty(flattened: Bundle, folder: Path, width: int) -> None:
    from matplotlib.image import imread

    picture = folder / f"{width}.png"
    browse(flattened.path / REPORT_PAGE, width, f"--screenshot={picture}")
    pixels = np.asarray(imread(picture))[..., :3]
    assert pixels.shape[:2] == (4000, width)
    # In each eighth of the page there is something to see.
    for part in np.split(pixels, 8):
        assert len(np.unique(part.reshape(-1, 3), axis=0)) > 20
