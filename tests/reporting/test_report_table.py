"""The printed table: units, ratios, conditions."""

import pytest

from spikefit.reporting import table, table_text
from spikefit.reporting.table import cells
from spikefit.reporting.units import error, significant


@pytest.mark.parametrize(
    ("x", "text"),
    [
        (0, "0"),
        (1234.56, "1,235"),
        (12.345, "12.3"),
        (0.012345, "0.0123"),
        (None, "–"),
        (-2.5, "-2.50"),
        (999.9, "1,000"),
        (1e30, "1.00e+30"),
        (-3.21e-9, "-3.21e-09"),
        (1e-6, "0.00000100"),
        (123456789.0, "123,456,789"),
    ],
)
def test_three_significant_digits(x, text):
    assert significant(x) == text


def test_error_keeps_zero_apart_from_small():
    assert error(0.0) == "0"
    assert error(3.2e-7) == "3.2e-07"
    assert error(None) == "–"


def test_units_and_ratios(rows):
    bptt, checkpoint, _ = cells(rows)
    # 14 MiB * 1.5 of saved bytes, a quarter of it under checkpoint; 40 ms and twice that
    assert bptt == ("bptt", "yes", "97.25", "0.1234", "24.0", "21.0", "40.0", "0")
    assert checkpoint[4:] == ("8.25 (0.34x)", "5.25 (0.25x)", "80.0 (2.00x)", "3.0e-07")


def test_ratios_carry_their_conditions(rows):
    text = table_text(rows)
    assert "(x) = ratio to bptt at T = 8, batch 32, soft reset (detached), float32, on cpu." in text
    assert all(word in text for word in ("peak MiB", "saved MiB", "step ms", "max gradient error"))
    assert max(map(len, text.splitlines())) <= 120


def test_without_bptt_there_is_no_ratio(rows):
    assert "x)" not in table_text(rows[1:])


def test_unmeasured_numbers_are_dashes(rows):
    del rows[1]["peak_bytes"]
    assert cells(rows)[1][4] == "–"


def test_approximate_is_said(rows):
    rows[1]["exact"] = False
    assert cells(rows)[1][1] == "approximate"


def test_table_is_a_rich_renderable(rows):
    assert table(rows).row_count == 3
