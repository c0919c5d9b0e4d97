"""The report as a file: figures carry the numbers of the rows, text is escaped, nothing points to the network."""

import json
import re

import pytest

from spikefit.errors import OptionError
from spikefit.reporting import figures, write_report


def figures_of(html):
    return json.loads(re.search(r'<script type="application/json" id="figures">(.*?)</script>', html, re.S)[1])


def test_memory_by_layer_stacks_categories_on_one_scale(rows):
    plots = figures.memory_by_layer(rows)
    assert len(plots) == 3
    bptt, checkpoint = plots[:2]
    assert [trace["name"] for trace in bptt["data"]] == ["membrane", "spikes"]
    assert bptt["data"][0]["x"] == [9.0, 4.0, 1.0]
    assert bptt["data"][0]["y"][0] == "blocks.0 SpikingConv2d"
    assert checkpoint["data"][1]["x"] == [9 / 8, 4 / 8, 1 / 8]
    assert bptt["layout"]["xaxis"]["range"] == checkpoint["layout"]["xaxis"]["range"]
    assert bptt["data"][0]["marker"]["color"] == checkpoint["data"][0]["marker"]["color"]


def test_memory_and_time_per_strategy(rows):
    memory, time = figures.memory_per_strategy(rows)
    assert {trace["name"]: trace["y"][0] for trace in memory["data"]} == {
        "saved for backward": 21.0,
        "peak, measured": 24.0,
        "peak, predicted": 25.0,
    }
    assert time["data"][0]["y"] == pytest.approx([40, 80, 40 * 2**0.5])


def test_lines_against_T_and_epochs(rows):
    saved, _ = figures.memory_against_timesteps(rows)
    assert (saved["data"][0]["x"], saved["data"][0]["y"]) == ([4, 8, 16, 32], [10.5, 21, 42, 84])
    accuracy, loss = figures.learning_curves(rows)
    assert accuracy["data"][2]["y"][-1] == pytest.approx(94)
    assert loss["data"][0]["y"][1] == 0.5


def test_equal_rates_share_a_bar_and_different_ones_do_not(rows):
    (plot,) = figures.spike_rates(rows)
    assert [trace["name"] for trace in plot["data"]] == ["bptt = checkpoint = checkpoint:3"]
    assert plot["data"][0]["x"] == pytest.approx([10, 15, 20])
    rows[2]["layers"][0]["spike_rate"] = 0.3
    (plot,) = figures.spike_rates(rows)
    assert [trace["name"] for trace in plot["data"]] == ["bptt = checkpoint", "checkpoint:3"]


def test_energy_in_microjoules(rows):
    (plot,) = figures.energy_per_layer(rows)
    assert plot["data"][0]["x"][2] == pytest.approx(0.34689024)


def test_both_accountings_of_energy_are_told_where_they_differ(rows, tmp_path):
    html = [write_report(tmp_path / "report.html", {"rows": rows}).read_text(encoding="utf-8")]
    for row in rows:
        row["energy"] |= {"all_spiking_pj": 1.25e6, "all_spiking_rate": 0.083}
    html.append(write_report(tmp_path / "report.html", {"rows": rows}).read_text(encoding="utf-8"))
    for row in rows:
        row["energy"]["all_spiking_pj"] = row["energy"]["snn_pj"]
    html.append(write_report(tmp_path / "report.html", {"rows": rows}).read_text(encoding="utf-8"))
    told = "with accumulates only behind the first layer 1.25 µJ, at a firing rate of 8.30 %"
    assert [told in text for text in html] == [False, True, False]
    assert ["accumulates only" in text for text in html] == [False, True, False]


def test_the_published_accounting_is_told_with_its_ratio(rows, tmp_path):
    html = [write_report(tmp_path / "report.html", {"rows": rows}).read_text(encoding="utf-8")]
    published = {"rate": None, "adds": None, "mults": None, "snn_pj": None, "ann_pj": 5e6, "ratio": None}
    for numbers in ({}, {"rate": 0.083, "adds": 1.0, "mults": 1.0, "snn_pj": 1.25e6, "ratio": 4.0}):
        for row in rows:
            row["energy"] |= {"published": published | numbers}
        html.append(write_report(tmp_path / "report.html", {"rows": rows}).read_text(encoding="utf-8"))
    told = (
        "As published, which flatters the spiking network: 1.25 µJ at a firing rate of 8.30 %; the same network "
        "without spikes 5.00 µJ (4.00x)."
    )
    assert [told in text for text in html] == [False, False, True]
    assert ["As published" in text for text in html] == [False, False, True]


def test_report_is_whole(report, tmp_path):
    html = write_report(tmp_path / "report.html", report).read_text(encoding="utf-8")
    assert len(figures_of(html)) == 3 + 2 + 2 + 2 + 1 + 1
    for text in (
        "Strategies on digits",
        "spikefit compare recipes/demo.toml strategies=bptt,checkpoint",
        "checkpoint (exact, max gradient error 3.0e-07) needs 0.25x the saved memory",
        "4.6 pJ per MAC",
        "soft reset (detached)",
        "<dd>2.13.0</dd>",
        "&quot;digits&quot;",
    ):
        assert text in html, text
    assert html.count("plotly.js v") == 1


def test_report_points_nowhere(report, tmp_path):
    html = write_report(tmp_path / "report.html", report).read_text(encoding="utf-8")
    # plotly.js names addresses it never asks without a map or a link; everything around it must name none
    around = re.sub(r"<script>/\*\*?\s.*?plotly\.js.*?</script>", "", html, flags=re.S)
    assert len(around) < 100_000
    assert not re.search(r"https?:|//[a-z]|src=|href=|@import|url\(", around)
    assert "default-src 'none'" in around


def test_names_cannot_break_out(report, tmp_path):
    nasty = "</script><img src=x onerror=alert(1)>"
    report["title"] = report["command"] = nasty
    report["recipe"] = report["environment"] = {nasty: nasty}
    report["rows"][1]["strategy"] = report["rows"][0]["layers"][0]["name"] = nasty
    html = write_report(tmp_path / "report.html", report).read_text(encoding="utf-8")
    assert nasty not in html
    assert figures_of(html)["figure-0"]["data"][0]["x"][1] == nasty


def test_missing_numbers_are_named_not_drawn_empty(report, tmp_path):
    for row in report["rows"]:
        del row["memory_against_T"], row["history"]
        row["peak_bytes"] = None
    html = write_report(tmp_path / "report.html", report).read_text(encoding="utf-8")
    assert "No numbers were given for: memory against time steps, learning curves." in html
    assert "<h2>Learning curves" not in html
    assert len(figures_of(html)) == 7


@pytest.mark.parametrize("rows", [[], [{"accuracy": 0.5}]])
def test_rows_must_be_those_of_compare(rows, tmp_path):
    with pytest.raises(OptionError, match=r"as spikefit\.compare returns them"):
        write_report(tmp_path / "report.html", {"rows": rows})
    assert not list(tmp_path.iterdir())
