"""Losses: their equations, single steps, labels of every step, and what they refuse."""

import math

import pytest
import torch
from torch.nn import functional as F

from spikefit.errors import OptionError, ShapeError
from spikefit.losses import LOSSES, create_loss, labels_per_step

T, B, K = 5, 4, 3
# auxiliary logits of three heads, and the weights of all four
AUXILIARY = torch.randn(3, B, K, generator=torch.Generator().manual_seed(1))
HEAD_WEIGHTS = (0.25, 0.5, 0.75, 2.0)


def sample():
    torch.manual_seed(0)
    return torch.randn(T, B, K, requires_grad=True), torch.tensor([0, 2, 1, 1])


def of_logits(name, **options):
    """The loss `name` as a function of logits and targets; a loss that reads auxiliary logits gets `AUXILIARY`."""
    loss = create_loss(name, **options)
    return (lambda o, y: loss(o, y, AUXILIARY)) if loss.reads_auxiliary else loss


def test_equations():
    o, y = sample()
    steps = torch.stack([F.cross_entropy(o_t, y) for o_t in o]).mean()
    torch.testing.assert_close(create_loss("ce_mean")(o, y), F.cross_entropy(o.mean(0), y))
    torch.testing.assert_close(create_loss("ce_steps")(o, y), steps)
    tet = create_loss("tet", mse_weight=0.25, mse_target=0.5)(o, y)
    torch.testing.assert_close(tet, 0.75 * steps + 0.25 * ((o - 0.5) ** 2).mean())
    rate = ((o.mean(0) - F.one_hot(y, K)) ** 2).mean()
    torch.testing.assert_close(create_loss("rate_mse")(o, y), rate)


@pytest.mark.parametrize("name", LOSSES)
def test_gradient_against_finite_differences(name):
    o, y = sample()
    make = of_logits(name)
    wanted = torch.autograd.grad(make(o, y), o)[0]
    i, e = (2, 1, 0), 1e-2
    up, down = o.detach().clone(), o.detach().clone()
    up[i] += e
    down[i] -= e
    assert float(wanted[i]) == pytest.approx(float(make(up, y) - make(down, y)) / (2 * e), rel=2e-3, abs=1e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_steps_make_the_whole_where_a_loss_splits(name):
    o, y = sample()
    loss = create_loss(name)
    if not loss.splits_per_step:
        with pytest.raises(ShapeError, match="all steps at once"):
            loss.step(o[0], y)
        return
    torch.testing.assert_close(torch.stack([loss.step(o_t, y) for o_t in o]).mean(), loss(o, y))


def test_heads_by_hand():
    o, y = sample()
    o = o[:1]  # networks with auxiliary heads have logits of one step
    for label_smoothing in (0.0, 0.1):
        parts = [F.cross_entropy(a, y, label_smoothing=label_smoothing) for a in (*AUXILIARY, o[0])]
        for weights in (None, [0.5, 1, 1.5, 3], (2.0, 0.25, 0.5, 1.0)):
            wanted = sum(w * ce for w, ce in zip(weights or HEAD_WEIGHTS, parts, strict=True))
            loss = create_loss("ce_heads", weights=weights, label_smoothing=label_smoothing)
            torch.testing.assert_close(loss(o, y, AUXILIARY), wanted)
    # one head at half of the plain weight, and logits of several steps as ce_mean takes them
    long, y = sample()
    wanted = 0.5 * F.cross_entropy(AUXILIARY[0], y) + 2 * create_loss("ce_mean")(long, y)
    torch.testing.assert_close(create_loss("ce_heads")(long, y, AUXILIARY[:1]), wanted)


@pytest.mark.parametrize("classes", [3, 10, 1000])
def test_heads_of_equal_logits(classes):
    o, y = torch.full((1, B, classes), 0.25), torch.arange(B) % classes
    value = create_loss("ce_heads")(o, y, torch.zeros(3, B, classes))
    assert float(value) == pytest.approx(3.5 * math.log(classes), rel=1e-6)


def test_every_head_gets_the_gradient_of_its_own_term():
    o = sample()[0].detach()[:1].requires_grad_()
    auxiliary = AUXILIARY.clone().requires_grad_()
    part = torch.tensor([0, -1, 1, 2])
    got = torch.autograd.grad(create_loss("ce_heads")(o, part, auxiliary), [auxiliary, o])
    labelled = part >= 0
    for weight, logits, gradient in zip(HEAD_WEIGHTS, (*auxiliary, o[0]), (*got[0], got[1][0]), strict=True):
        wanted = weight * (logits.softmax(-1) - F.one_hot(part.clamp(min=0), K)) / 3
        torch.testing.assert_close(gradient, torch.where(labelled[:, None], wanted, 0))


def test_smoothing_and_missing_labels():
    o, y = sample()
    smooth = create_loss("ce_mean", label_smoothing=0.2)(o, y)
    torch.testing.assert_close(smooth, F.cross_entropy(o.mean(0), y, label_smoothing=0.2))
    part = torch.tensor([0, -1, 1, -1])
    keep = part >= 0
    for name in ("ce_mean", "ce_steps", "rate_mse"):
        torch.testing.assert_close(create_loss(name)(o, part), create_loss(name)(o[:, keep], part[keep]))
    per_step = torch.randint(0, K, (T, B))
    per_step[0] = -1
    wanted = F.cross_entropy(o[1:].flatten(0, 1), per_step[1:].flatten())
    torch.testing.assert_close(create_loss("ce_steps")(o, per_step), wanted)


@pytest.mark.parametrize("name", ["ce_steps", "tet"])
def test_shares_of_unevenly_labelled_steps_make_the_whole(name):
    o, _ = sample()
    targets = torch.tensor([[0, 2, 1, 1], [-1, -1, -1, -1], [0, -1, -1, -1], [2, 1, -1, -1], [1, 1, 0, -1]])
    loss, labels = create_loss(name), labels_per_step(targets)
    assert float(labels) == 2.0
    shares = torch.stack([loss.step(o_t, y_t, labels=labels) for o_t, y_t in zip(o, targets, strict=True)])
    torch.testing.assert_close(shares.mean(), loss(o, targets))
    # the shares alone weigh every step alike, however few labels it has
    alone = torch.stack([loss.step(o_t, y_t) for o_t, y_t in zip(o, targets, strict=True)])
    assert abs(float((alone.mean() - loss(o, targets)).detach())) > 1e-2


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_without_any_label_the_loss_is_zero(name, label_smoothing):
    o, y = sample()
    options = {} if name == "rate_mse" else {"label_smoothing": label_smoothing}
    if name == "tet":
        options["mse_weight"] = 0.0
    loss = of_logits(name, **options)
    per_step = [torch.full((T, B), -1)] if LOSSES[name].splits_per_step else []
    for targets in [torch.full_like(y, -1), *per_step]:
        value = loss(o, targets)
        assert float(value.detach()) == 0
        assert torch.equal(torch.autograd.grad(value, o)[0], torch.zeros_like(o))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda o, y: create_loss("ce_mean")(o[0], y), ShapeError, r"\[T, B, K\]"),
        (lambda o, y: create_loss("ce_mean")(o, y[:2]), ShapeError, r"targets \(4,\)"),
        (lambda o, y: create_loss("ce_mean")(o, y.expand(T, -1)), ShapeError, r"targets \(4,\)"),
        (lambda o, y: create_loss("tet")(o, y.float()), ShapeError, "int64"),
        (lambda o, y: create_loss("ce"), OptionError, "Did you mean ce_mean|Did you mean ce_steps"),
        (lambda o, y: create_loss("ce_mean", smoothing=0.1), OptionError, "unknown option 'smoothing'"),
        (lambda o, y: create_loss("ce_mean", label_smoothing=1.0), OptionError, r"\[0, 1\)"),
        (lambda o, y: create_loss("tet", mse_weight=2.0), OptionError, r"\[0, 1\]"),
        (lambda o, y: create_loss("tet", mse_target=float("nan")), OptionError, "finite number, got nan"),
        (lambda o, y: create_loss("ce_mean")(o, y + 1), ShapeError, r"0\.\.2 as targets .* got 1\.\.3"),
        (lambda o, y: create_loss("ce_heads")(o, y), ShapeError, r"as third argument, got none; call .*auxiliary=True"),
        (lambda o, y: create_loss("ce_heads")(o, y, AUXILIARY[0]), ShapeError, r"\[n, 4, 3\].*got \(4, 3\)"),
        (lambda o, y: create_loss("ce_heads")(o, y, AUXILIARY[:, 1:]), ShapeError, r"\[n, 4, 3\].*got \(3, 3, 3\)"),
        (lambda o, y: create_loss("ce_heads")(o, y, AUXILIARY[:0]), ShapeError, r"n of at least 1.*got \(0, 4, 3\)"),
        (lambda o, y: create_loss("ce_heads")(o, y + 1, AUXILIARY), ShapeError, r"0\.\.2 as targets .* got 1\.\.3"),
        (
            lambda o, y: create_loss("ce_heads", weights=[1, 2, 3])(o, y, AUXILIARY),
            OptionError,
            r"expected 4 weights, for 3 auxiliary heads and the final one, got 3.* for 0\.25, 0\.5, 0\.75, 2\.",
        ),
        (lambda o, y: create_loss("ce_heads", weights=[1.0]), OptionError, r"positive numbers.*got \[1\.0\]"),
        (lambda o, y: create_loss("ce_heads", weights=[1, 0]), OptionError, r"positive numbers.*got \[1, 0\]"),
        (lambda o, y: create_loss("ce_heads", weights=(1, float("inf"))), OptionError, "positive numbers.*inf"),
        (lambda o, y: create_loss("ce_heads", weights=2.0), OptionError, "positive numbers.*got 2.0"),
        (lambda o, y: create_loss("ce_heads", label_smoothing=1.0), OptionError, r"\[0, 1\)"),
        (lambda o, y: create_loss("tet")(o, y - 2), ShapeError, r"0\.\.2 as targets .* got -2\.\.0"),
    ],
)
def test_refuses(call, error, message):
    with pytest.raises(error, match=message):
        call(*sample())
