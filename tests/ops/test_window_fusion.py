"""How two membranes become one: the projection and its facts, the sine it stands on, and the links between windows."""

import math

import pytest
import torch
from torch import Tensor

from spikefit.errors import OptionError, ShapeError
from spikefit.ops.window_scan import (
    FUSIONS,
    NOTHING,
    Link,
    Links,
    across,
    across_release,
    apart,
    behind,
    in_turn,
    omega,
    over_activation,
)
from spikefit.ops.window_scan.sine import cosine, sine
from window_runs import fused

# phi -> (S, D) at threshold 0.5
OVER_ACTIVATION = {
    0.1: (0.05833, -0.31667),
    0.3: (0.16161, -0.21339),
    0.5: (0.22802, -0.14698),
    0.7: (0.24301, -0.13199),
    0.9: (0.20443, -0.17057),
}


def grid(low: float, high: float, points: int) -> tuple[Tensor, Tensor]:
    """A square of points in float64, (a, c)."""
    side = torch.linspace(low, high, points, dtype=torch.float64)
    return torch.meshgrid(side, side, indexing="ij")  # type: ignore[return-value]


@pytest.mark.parametrize(("function", "wanted"), [(sine, torch.sin), (cosine, torch.cos)])
def test_sine_and_cosine_are_right_to_the_last_bits(function, wanted):
    torch.manual_seed(0)
    for width in (1, 4, 50, 1000):
        y = (2 * torch.rand(200_000) - 1) * width
        y = torch.cat([y, torch.arange(-40, 41) * (math.pi / 4)]).clamp(-width, width)
        assert (function(y).double() - wanted(y.double())).abs().max() <= 2e-7
    y = torch.randn(100, dtype=torch.float64)
    assert torch.equal(function(y), wanted(y))


def test_sine_and_cosine_at_special_values():
    assert sine(torch.zeros(1)).item() == 0
    assert cosine(torch.zeros(1)).item() == 1
    assert sine(torch.tensor([math.nan, math.inf])).isnan().all()
    y = torch.randn(50).bfloat16()
    assert torch.equal(sine(y), sine(y.float()).bfloat16())
    assert torch.equal(cosine(y), cosine(y.float()).bfloat16())


def test_derivatives_of_the_sine_are_the_same_polynomials():
    y = torch.randn(100, requires_grad=True)
    for function, first, second in (
        (sine, lambda y: cosine(y), lambda y: -sine(y)),
        (cosine, lambda y: -sine(y), lambda y: -cosine(y)),
    ):
        (one,) = torch.autograd.grad(function(y).sum(), y, create_graph=True)
        (two,) = torch.autograd.grad(one.sum(), y)
        assert torch.equal(one, first(y))
        assert torch.equal(two, second(y))


@pytest.mark.parametrize("phi", [0.1, 0.5, 0.9])
def test_facts_of_the_projection(phi):
    x = torch.linspace(-3, 3, 101, dtype=torch.float64)
    torch.testing.assert_close(omega(x, x, phi), torch.sin(phi * math.pi * x))
    a, c = grid(-6, 6, 301)
    assert omega(a, c, phi).abs().max() <= 2
    assert omega(torch.zeros_like(c), c, phi).abs().max() == 0, "a = 0 erases c"
    for dtype in (torch.float32, torch.float64):
        a, c = (torch.zeros(1, dtype=dtype, requires_grad=True) for _ in range(2))
        da, dc = torch.autograd.grad(omega(a, c, phi), [a, c])
        assert dc.item() == 0
        assert da.item() == pytest.approx(phi * math.pi, rel=1e-6)


def test_the_bound_is_met_off_the_diagonal():
    assert omega(torch.tensor([2.0]), torch.tensor([0.0]), 0.5).item() == pytest.approx(2)


def test_gradients_of_the_projection():
    a, c = (torch.randn(20, dtype=torch.float64, requires_grad=True) for _ in range(2))
    phi = torch.tensor(0.6, dtype=torch.float64, requires_grad=True)
    for name in ("omega", "omega_release"):
        assert torch.autograd.gradcheck(FUSIONS[name], (a, c, phi))
    assert torch.autograd.gradgradcheck(omega, (a, c, phi))
    exact = torch.autograd.grad(omega(a, c, 0.6).sum(), [a, c])
    inner = [t.detach().float().requires_grad_() for t in (a, c)]
    for got, wanted in zip(torch.autograd.grad(omega(*inner, 0.6).sum(), inner), exact, strict=True):
        torch.testing.assert_close(got.double(), wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", FUSIONS)
def test_each_fusion(name):
    a, c = (torch.randn(500, dtype=torch.float64) for _ in range(2))
    torch.testing.assert_close(FUSIONS[name](a, c, 0.7), fused(name, a, c, 0.7))


@pytest.mark.parametrize(("phi", "wanted"), OVER_ACTIVATION.items())
def test_over_activation(phi, wanted):
    assert over_activation(phi) == pytest.approx(wanted, abs=1e-5)
    a, c = grid(0.5, 1.0, 1001)
    volumes = [torch.trapezoid(torch.trapezoid(f, dx=0.0005), dx=0.0005) for f in (omega(a, c, phi), a + c)]
    assert float(volumes[0]) == pytest.approx(wanted[0], abs=1e-4)
    assert float(volumes[0] - volumes[1]) == pytest.approx(wanted[1], abs=1e-4)


def test_over_activation_at_another_threshold():
    a, c = grid(0.8, 1.6, 1001)
    volume = torch.trapezoid(torch.trapezoid(omega(a, c, 0.3), dx=0.0008), dx=0.0008)
    s, d = over_activation(0.3, 0.8)
    assert s == pytest.approx(float(volume), abs=1e-5)
    assert d == pytest.approx(s - 3 * 0.8**3)


@pytest.mark.parametrize(("width", "wanted"), [(2.0, 0.4210), (1.0, 0.054), (0.5, 0.003)])
def test_the_parenthesis_of_the_release(width, wanted):
    a, c = grid(-width, width, 1001)
    difference = (omega(a, c) - FUSIONS["omega_release"](a, c, 0.5)).abs()
    assert float(difference.max()) == pytest.approx(wanted, abs=5e-5 if width == 2 else 5e-4)
    if width == 2:
        pair = torch.tensor([-2.0]).double(), torch.tensor([-1.242]).double()
        assert float((omega(*pair) - FUSIONS["omega_release"](*pair, 0.5)).abs()) == pytest.approx(0.4210, abs=5e-5)


def test_links_as_they_are_named():
    g, m, o = (lambda p: Link("given", p)), (lambda p: Link("made", p)), NOTHING
    assert in_turn(3).pairs == ((o, o), (m(0), o), (m(1), o))
    assert behind(3).pairs == ((o, o), (g(0), m(0)), (g(1), m(1)))
    assert across(3).pairs == ((g(0), g(0)), (m(0), g(1)), (m(1), g(2)))
    assert across_release().pairs == ((g(0), g(1)), (m(0), g(1)), (g(2), m(1)), (g(3), m(2)))
    assert apart(2).pairs == ((o, o), (o, o))


@pytest.mark.parametrize("links", [in_turn(4), behind(4), across(1), across_release(), apart(3)])
def test_links_are_values(links):
    assert links.codes == [link.code for pair in links.pairs for link in pair]
    assert Links.decode(links.codes) == links
    assert hash(Links.decode(links.codes)) == hash(links)
    assert len(links) == len(links.pairs)
    assert links.only(True, True) == links
    assert links.only(False, False) == apart(len(links))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: omega(torch.zeros(1), torch.zeros(1), 1.0), OptionError, r"omega: phi must lie in \(0, 1\), got 1.0"),
        (lambda: omega(torch.zeros(1), torch.zeros(1), torch.tensor(0.0)), OptionError, r"got 0.0. The default is 0.5"),
        (lambda: omega(torch.zeros(1), torch.zeros(1), torch.ones(2)), ShapeError, r"0-d tensor, got a tensor \(2,\)"),
        (lambda: omega(torch.zeros(1), torch.zeros(1), "0.5"), OptionError, "phi must be a number or a 0-d tensor"),
        (lambda: over_activation(0.0), OptionError, r"over_activation: phi must lie in \(0, 1\), got 0.0"),
        (lambda: over_activation(0.5, -1), OptionError, "over_activation: v_threshold must be a finite number > 0"),
        (lambda: in_turn(0), OptionError, "in_turn: expected a whole number of windows, at least 1, got 0"),
        (lambda: across(2.0), OptionError, "across: expected a whole number of windows, at least 1, got 2.0"),
        (lambda: Links(()), OptionError, r"at least one window, got none; in_turn\(4\) links four"),
        (
            lambda: Links(((Link("made", 0), NOTHING),)),
            OptionError,
            "window 0 of 1 reads made 0, expected an earlier window; windows count from 0",
        ),
        (lambda: Links(((Link("given", 1), NOTHING),)), OptionError, "reads given 1, expected one of windows 0 to 0"),
        (lambda: Links(((Link("other", 0), NOTHING),)), OptionError, "a source among zeros, given, made, got 'other'"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
