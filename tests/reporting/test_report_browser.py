"""The report in a real browser, headless and offline: all figures are drawn, nothing is asked for or complains."""

import re
import shutil
import subprocess

import pytest

from spikefit.reporting import write_report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here; apt-get install chromium runs this test")


def load(path, profile):
    """(DOM after scripts ran, console messages)."""
    command = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--disable-background-networking",
        "--enable-logging=stderr",
        f"--user-data-dir={profile}",
        "--virtual-time-budget=15000",
        "--window-size=1280,4000",
        "--dump-dom",
        path.as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def test_every_figure_is_drawn_and_the_console_is_silent(report, tmp_path):
    dom, console = load(write_report(tmp_path / "report.html", report), tmp_path / "profile")
    assert console == []
    places = re.split(r'id="figure-\d+"', dom)[1:]
    assert len(places) == 11
    for place in places:
        label = re.search(r'aria-label="([^"]*)"', place)[1]
        assert "main-svg" in place, f"not drawn: {label}"
        # bars are paths in .point groups, lines are .js-line paths; an empty axis has neither
        marks = re.findall(r'class="point"><path|class="js-line"', place)
        assert len(marks) >= 2, f"empty: {label}"
    first = places[0]
    assert all(f">{text}<" in first for text in ("bptt", "checkpoint", "saved for backward", "21.0"))


def test_the_check_above_sees_a_request_and_a_broken_figure(report, tmp_path):
    path = write_report(tmp_path / "report.html", report)
    html = path.read_text(encoding="utf-8")
    path.write_text(html.replace("</main>", '<img src="http://127.0.0.1:9/x.png"></main>'), encoding="utf-8")
    _, console = load(path, tmp_path / "profile")
    assert any("Content Security Policy" in line for line in console)
    path.write_text(html.replace('id="figure-1"', 'id="figure-lost"'), encoding="utf-8")
    dom, console = load(path, tmp_path / "profile2")
    assert console
    assert "main-svg" not in re.split(r'id="figure-lost"', dom)[1].split('id="figure-')[0]
