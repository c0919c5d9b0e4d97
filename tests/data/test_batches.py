"""Batches: an order that can be made again from any point, and augmentations that do what they say."""

import pytest
import torch

from spikefit.data import batches, horizontal_flip, load_dataset, random_crop
from spikefit.data.batches import count_batches, seeded
from spikefit.errors import OptionError


@pytest.fixture(scope="module")
def digits():
    return load_dataset("digits", limit=50)


def collect(digits, **options):
    return [(i, x, y) for i, x, y in batches(digits, 8, seed=3, shuffle=True, **options)]


def test_an_epoch_holds_every_sample_once(digits):
    seen = collect(digits, epoch=1)
    assert [i for i, _, _ in seen] == list(range(7))
    assert [len(y) for _, _, y in seen] == [8] * 6 + [2]
    rows = torch.cat([x for _, x, _ in seen]).flatten(1)
    everything = digits.batch(range(50))[0].flatten(1)
    assert torch.equal(rows.sort(0).values, everything.sort(0).values)
    assert not torch.equal(rows, everything)
    assert len(collect(digits, drop_last=True)) == 6


def test_the_order_depends_on_seed_and_epoch_only(digits):
    first, again, other = (collect(digits, epoch=e) for e in (1, 1, 2))
    assert all(torch.equal(a[1], b[1]) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a[1], b[1]) for a, b in zip(first, other, strict=True))
    plain = torch.cat([y for _, _, y in batches(digits, 8, seed=9)])
    assert torch.equal(plain, digits.targets)


def test_a_run_that_goes_on_sees_the_same_batches(digits):
    augment = [random_crop(2), horizontal_flip()]
    whole, rest = collect(digits, augment=augment), collect(digits, augment=augment, start=4)
    assert [i for i, _, _ in rest] == [4, 5, 6]
    for (_, x, y), (_, a, b) in zip(whole[4:], rest, strict=True):
        assert torch.equal(x, a)
        assert torch.equal(y, b)
    plain = collect(digits, start=4)
    assert not torch.equal(plain[0][1], rest[0][1])


def test_crop_shifts_and_flip_mirrors():
    x = torch.arange(1.0, 65.0).view(1, 1, 8, 8).repeat(40, 1, 1, 1)
    shifted = random_crop(2)(x, seeded(0))
    wide = torch.nn.functional.pad(x[0, 0], (2, 2, 2, 2))
    windows = [wide[r : r + 8, c : c + 8] for r in range(5) for c in range(5)]
    hits = {next(i for i, w in enumerate(windows) if torch.equal(w, image[0])) for image in shifted}
    assert len(hits) > 10
    flipped = horizontal_flip(0.5)(x, seeded(1))
    mirrored = [torch.equal(image, x[0].flip(-1)) for image in flipped]
    assert all(m or torch.equal(image, x[0]) for m, image in zip(mirrored, flipped, strict=True))
    assert 5 < sum(mirrored) < 35
    assert torch.equal(horizontal_flip(0.0)(x, seeded(1)), x)


def test_neighbouring_seeds_are_unrelated():
    draws = [torch.rand(1000, generator=seeded(0, 0, i)) for i in range(5)]
    correlation = torch.corrcoef(torch.stack(draws)) - torch.eye(5)
    assert correlation.abs().max() < 0.15


def test_refuses(digits):
    for call, message in [
        (lambda: count_batches(digits, 0), "at least 1"),
        (lambda: count_batches(digits, 51, drop_last=True), "leaves no batch of 50 samples"),
        (lambda: random_crop(0), "at least 1 pixel"),
        (lambda: horizontal_flip(2.0), r"\[0, 1\]"),
    ]:
        with pytest.raises(OptionError, match=message):
            call()
