"""Surrogates: each slope is the derivative of its primitive; names as recipes write them; clear refusals."""

import math

import pytest
import torch

from spikefit.errors import OptionError
from spikefit.ops.surrogate import FORMS, Surrogate, atan, fast_sigmoid, parse_surrogate, rect, sigmoid, triangle

CASES = [atan(2), atan(0.7), triangle(1), triangle(2.5), rect(1), rect(0.3), rect(1, closed=True), sigmoid(4)]
CASES += [sigmoid(11), fast_sigmoid(25), fast_sigmoid(2)]


@pytest.mark.parametrize("surrogate", CASES, ids=str)
def test_slope_is_the_derivative_of_the_primitive(surrogate):
    # an irregular grid meets no edge of a rectangle and no corner of a triangle
    d, h = torch.linspace(-3, 3, 4001, dtype=torch.float64) + math.pi / 1e4, 1e-6
    wanted = (surrogate.primitive(d + h) - surrogate.primitive(d - h)) / (2 * h)
    slope = surrogate.slope(d)
    assert slope.min() >= 0
    assert slope.max() > 0.1
    torch.testing.assert_close(slope, wanted, rtol=1e-4, atol=1e-5)
    assert surrogate.primitive(torch.zeros(1)) == 0.5


@pytest.mark.parametrize("surrogate", [s for s in CASES if s.name != "fast_sigmoid"], ids=str)
def test_primitive_is_a_step_from_0_to_1(surrogate):
    ends = surrogate.primitive(torch.tensor([-1e6, 1e6], dtype=torch.float64))
    torch.testing.assert_close(ends, torch.tensor([0.0, 1.0], dtype=torch.float64), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("surrogate", "d", "wanted"),
    [
        (atan(2), 0.0, 1.0),
        (atan(2), 1 / math.pi, 0.5),
        (triangle(2), 1.0, 0.25),
        (triangle(2), 2.0, 0.0),
        (rect(2), 0.999, 0.5),
        (rect(1), 0.5, 0.0),
        (rect(1), -0.5, 0.0),
        (rect(1, closed=True), 0.5, 1.0),
        (rect(1, closed=True), -0.5, 1.0),
        (rect(1, closed=True), 0.501, 0.0),
        (sigmoid(4), 0.0, 1.0),
        (fast_sigmoid(25), 0.04, 0.25),
    ],
    ids=str,
)
def test_known_slopes(surrogate, d, wanted):
    got = surrogate.slope(torch.tensor([d], dtype=torch.float64))
    torch.testing.assert_close(got, torch.tensor([wanted], dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("surrogate", CASES, ids=str)
def test_keeps_dtype_and_shape(surrogate, dtype):
    d = torch.zeros(2, 3, dtype=dtype)
    for result in (surrogate.slope(d), surrogate.primitive(d)):
        assert result.dtype == dtype
        assert result.shape == d.shape


def test_kernels_know_each_form_by_its_own_number():
    assert sorted(form.kernel for form in FORMS.values()) == list(range(len(FORMS)))


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("atan", atan(2)),
        ("atan(3)", atan(3)),
        (" triangle( 0.5 ) ", triangle(0.5)),
        ("rect()", rect(1)),
        ("rect(2)", rect(2)),
        ("rect(1, closed=True)", rect(1, closed=True)),
        ("rect(closed = true)", rect(1, closed=True)),
        ("rect(1, closed=false)", rect(1)),
        ("sigmoid(1e1)", sigmoid(10)),
        ("fast_sigmoid(25)", fast_sigmoid(25)),
        (sigmoid(4), sigmoid(4)),
    ],
    ids=str,
)
def test_parse(text, wanted):
    assert parse_surrogate(text) == wanted


@pytest.mark.parametrize("surrogate", CASES, ids=str)
def test_written_form_reads_back(surrogate):
    assert parse_surrogate(str(surrogate)) == surrogate


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: parse_surrogate("atn(2)"), r"expected one of atan, .*got 'atn\(2\)'; did you mean atan"),
        (lambda: parse_surrogate("???"), "expected one of atan"),
        (lambda: parse_surrogate("atan(2"), r"cannot read 'atan\(2'; write it as atan\(2\)"),
        (lambda: parse_surrogate("rect(a=1)"), r"cannot read .*write it as rect\(1\) or rect\(1, closed=True\)"),
        (lambda: parse_surrogate("atan(x)"), r"cannot read the number in 'atan\(x\)'"),
        (lambda: parse_surrogate("atan(-1)"), r"^surrogate atan: the parameter must be finite and > 0, got -1.0"),
        (lambda: parse_surrogate("atan(nan)"), "atan: the parameter must be finite and > 0, got nan"),
        (lambda: parse_surrogate(None), "expected text such as 'atan"),
        (lambda: atan("2"), "must be finite and > 0, got '2'"),
        (lambda: parse_surrogate("atan(1e)"), r"cannot read the number in 'atan\(1e\)'"),
        (lambda: parse_surrogate("atan(2, closed=True)"), "only rect takes closed"),
        (lambda: parse_surrogate("rect(2, closed=perhaps)"), "only rect takes closed"),
        (lambda: parse_surrogate("triangle(0)"), "triangle: the parameter must be finite and > 0, got 0.0"),
        (lambda: atan(-1), "atan: the parameter must be finite and > 0, got -1"),
        (lambda: sigmoid(math.nan), "sigmoid: the parameter must be finite and > 0, got nan"),
        (lambda: rect(math.inf), "rect: the parameter must be finite and > 0, got inf"),
        (lambda: Surrogate("step", 1.0), "unknown name 'step'; known: atan"),
    ],
)
def test_refusals(make, message):
    with pytest.raises(OptionError, match=message):
        make()
