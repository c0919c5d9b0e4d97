"""Encodings: their equations, their randomness, and what they refuse."""

import numpy as np
import pytest
import torch

from spikefit.data.nmnist import EVENT
from spikefit.encoding import ENCODINGS, create_encoding, event_frames, latency, rate, repeat, sequence
from spikefit.errors import OptionError, ShapeError


def test_repeat_is_a_view_of_one_step():
    x = torch.rand(3, 2, 4)
    out = repeat(x, 5)
    assert out.shape == (5, 3, 2, 4)
    assert out.stride(0) == 0
    assert out.data_ptr() == x.data_ptr()


def test_rate_fires_with_the_probability_given():
    x = torch.tensor([[0.0, 0.1, 0.5, 1.0]]).repeat(50, 1)
    out = rate(x, 200, generator=torch.Generator().manual_seed(0))
    assert set(out.unique().tolist()) == {0.0, 1.0}
    # 10,000 draws: five standard deviations of a mean are 0.025
    torch.testing.assert_close(out.mean((0, 1)), x[0], atol=0.025, rtol=0)
    again = rate(x, 200, generator=torch.Generator().manual_seed(0))
    assert torch.equal(out, again)
    assert not torch.equal(out[0], out[1])


def test_latency_fires_once_and_the_larger_the_earlier():
    x = torch.tensor([[0.0, 0.1, 0.5, 1.0]])
    out = latency(x, 5)[:, 0]
    assert out.sum(0).tolist() == [0, 1, 1, 1]
    assert out.argmax(0).tolist()[1:] == [4, 2, 0]


def test_sequence_transposes_once():
    x = torch.arange(24.0).view(2, 4, 3)
    assert torch.equal(sequence(x), x.transpose(0, 1))
    assert sequence(x).is_contiguous()


def events(*rows):
    return np.array([(t, x, y, p) for t, x, y, p in rows], EVENT)


def test_event_frames_count_every_event_once():
    sample = events((0, 0, 0, 0), (1, 0, 0, 0), (2, 1, 2, 1), (90, 3, 1, 1), (99, 3, 1, 0))
    by_time = event_frames([sample, sample[:0]], 4, height=3, width=4)
    assert by_time.shape == (4, 2, 2, 3, 4)
    assert by_time[:, 0].sum((1, 2, 3)).tolist() == [3, 0, 0, 2]
    assert by_time[0, 0, 0, 0, 0] == 2
    assert by_time[0, 0, 1, 2, 1] == 1
    assert by_time[:, 1].sum() == 0
    by_count = event_frames([sample], 5, height=3, width=4, by="count")
    assert by_count.sum((1, 2, 3, 4)).tolist() == [1] * 5
    binary = event_frames([sample], 4, height=3, width=4, binary=True)
    assert binary.max() == 1
    padded = event_frames([sample], 4, height=3, width=4, pad_to=6)
    assert padded.shape == (4, 1, 2, 6, 6)
    assert torch.equal(padded[..., 1:4, 1:5], by_time[:, :1])
    assert padded.sum() == 5


def test_by_name():
    made = create_encoding("repeat", timesteps=3)
    assert made.timesteps == 3
    assert made(torch.rand(2, 4)).shape == (3, 2, 4)
    drawn = create_encoding("rate", timesteps=3)
    x = torch.rand(2, 4)
    assert torch.equal(drawn(x, torch.Generator().manual_seed(1)), drawn(x, torch.Generator().manual_seed(1)))
    assert create_encoding("sequence").timesteps is None
    assert create_encoding("sequence")(torch.rand(2, 5, 3)).shape == (5, 2, 3)
    assert set(ENCODINGS) == {"repeat", "rate", "latency", "event_frames", "sequence"}


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: repeat(torch.rand(2, 3), 0), OptionError, "at least 1"),
        (lambda: repeat(torch.rand(2, 3), 1.5), OptionError, "whole number"),
        (lambda: repeat(torch.rand(3), 2), ShapeError, r"\[B, ...\]"),
        (lambda: rate(torch.tensor([[1.5]]), 2), OptionError, r"\[0, 1\], got 1.5"),
        (lambda: latency(torch.tensor([[-0.5]]), 2), OptionError, r"\[0, 1\]"),
        (lambda: sequence(torch.rand(2, 3)), ShapeError, "encoding.repeat"),
        (lambda: event_frames([], 2, height=3, width=3, by="size"), OptionError, "'time' or 'count'"),
        (lambda: repeat([np.zeros(3)], 2), ShapeError, "got list; event recordings need encoding.event_frames"),
        (lambda: rate([1.0], 2), ShapeError, "expected a tensor"),
        (lambda: latency([1.0], 2), ShapeError, "expected a tensor"),
        (lambda: sequence([np.zeros(3)]), ShapeError, "expected a tensor"),
        (lambda: event_frames(torch.rand(2, 1, 3, 3), 2, height=3, width=3), ShapeError, "images need encoding.repeat"),
        (lambda: event_frames([np.zeros(3)], 2, height=3, width=3), ShapeError, "fields t, x, y, p .* float64"),
        (lambda: event_frames([[1, 2]], 2, height=3, width=3), ShapeError, "fields t, x, y, p .* got list"),
        (lambda: event_frames([events((0, 0, 0, 2))], 2, height=3, width=3), ShapeError, "polarities p of 0 and 1"),
        (
            lambda: event_frames([events((5, 0, 0, 0), (0, 0, 0, 0))], 2, height=3, width=3),
            ShapeError,
            "ascending order",
        ),
        (lambda: event_frames([], 2, height=0, width=3), OptionError, "height must be a whole number of at least 1"),
        (lambda: create_encoding("event_frames", timesteps=2), OptionError, "height is missing; .* 34 for N-MNIST"),
        (lambda: create_encoding("event_frames", timesteps=2, height=3), OptionError, "width is missing"),
        (
            lambda: create_encoding("event_frames", timesteps=2, height=3, width=-3),
            OptionError,
            "width must be a whole number of at least 1 pixel, got -3",
        ),
        (lambda: event_frames([], 2, height=3, width=3, pad_to=2), OptionError, "smaller than the sensor"),
        (lambda: event_frames([events((0, 5, 0, 0))], 2, height=3, width=3), ShapeError, "x up to 5"),
        (lambda: create_encoding("repat", timesteps=2), OptionError, "Did you mean repeat"),
        (lambda: create_encoding("repeat"), OptionError, "timesteps is missing"),
        (lambda: create_encoding("repeat", timesteps=0), OptionError, "at least 1"),
        (lambda: create_encoding("sequence", timesteps=4), OptionError, "that of the data"),
        (lambda: create_encoding("repeat", timesteps=4, steps=2), OptionError, "unknown option 'steps'"),
    ],
)
def test_refuses(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_none_is_another_word_for_sequence():
    assert create_encoding("none") == create_encoding("sequence")
