"""Which membranes a window starts from: two sources per window, as a value."""

from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

from spikefit.errors import OptionError

Source = Literal["zeros", "given", "made"]
SOURCES: tuple[str, ...] = get_args(Source)


class Link(NamedTuple):
    """One source of a window: `Link("given", k)` is the tensor given for window k, `Link("made", k)` the membrane that
    window k of this scan hands on, `Link("zeros")` nothing. Windows count from 0.
    """

    source: Source
    window: int = 0

    @property
    def code(self) -> int:
        """The link as one whole number: 0 for zeros, k + 1 for given k, -(k + 1) for made k."""
        return {"zeros": 0, "given": self.window + 1, "made": -self.window - 1}[self.source]

    @classmethod
    def decode(cls, code: int) -> "Link":
        """The inverse of `code`."""
        if code == 0:
            return NOTHING
        return cls("given", code - 1) if code > 0 else cls("made", -code - 1)


NOTHING = Link("zeros")


@dataclass(frozen=True)
class Links:
    """The sources (A, C) of every window of a scan; make them with `in_turn`, `behind`, `across`, ..., or by hand.

    Attributes:
        pairs: (link of A, link of C) for each of the P windows, in their order.

    Raises:
        OptionError: no window, an unknown source, or a membrane that does not exist yet when its window starts.
    """

    pairs: tuple[tuple[Link, Link], ...]

    def __post_init__(self) -> None:
        if not self.pairs:
            raise OptionError("links: expected at least one window, got none; in_turn(4) links four.")
        for p, pair in enumerate(self.pairs):
            for link in pair:
                _check_link(link, p, len(self.pairs))

    def __len__(self) -> int:
        return len(self.pairs)

    @property
    def codes(self) -> list[int]:
        """A_0, C_0, A_1, C_1, ... as `Link.code`."""
        return [link.code for pair in self.pairs for link in pair]

    @classmethod
    def decode(cls, codes: list[int]) -> "Links":
        """The inverse of `codes`."""
        links = [Link.decode(code) for code in codes]
        return cls(tuple(zip(links[::2], links[1::2], strict=True)))

    @property
    def reads_given(self) -> bool:
        """Whether a window reads a given tensor."""
        return any(link.source == "given" for pair in self.pairs for link in pair)

    def only(self, a: bool, c: bool) -> "Links":
        """The same with zeros in the place of A unless `a`, and of C unless `c`."""
        return Links(tuple((A if a else NOTHING, C if c else NOTHING) for A, C in self.pairs))


def _check_link(link: Link, p: int, windows: int) -> None:
    if link.source not in SOURCES:
        raise OptionError(f"links: expected a source among {', '.join(SOURCES)}, got {link.source!r} at window {p}.")
    # a window starts before its own membrane exists; every given tensor is there from the start
    end = {"zeros": 1, "given": windows, "made": p}[link.source]
    if isinstance(link.window, bool) or not isinstance(link.window, int) or not 0 <= link.window < end:
        kind = "an earlier window" if link.source == "made" else f"one of windows 0 to {end - 1}"
        raise OptionError(
            f"links: window {p} of {windows} reads {link.source} {link.window!r}, expected {kind}; windows count from "
            "0, and Link('zeros') reads nothing."
        )


def _given(p: int) -> Link:
    return Link("given", p)


def _made(p: int) -> Link:
    return Link("made", p)


def _check_windows(who: str, windows: int) -> None:
    if isinstance(windows, bool) or not isinstance(windows, int) or windows < 1:
        raise OptionError(f"{who}: expected a whole number of windows, at least 1, got {windows!r}.")


def in_turn(windows: int) -> Links:
    """A_p = m_{p-1}, zeros at the first window; no C.

    Used with fuse="a": a plain leaky chain over the windows, as in the first neuron layer of a convolutional block.
    """
    _check_windows("in_turn", windows)
    return Links(tuple((_made(p - 1) if p else NOTHING, NOTHING) for p in range(windows)))


def behind(windows: int) -> Links:
    """A_p = g_{p-1} and C_p = m_{p-1}, both zeros at the first window.

    Used by a neuron layer behind another one of the same block: g are the membranes of that layer.
    """
    _check_windows("behind", windows)
    return Links(tuple((_given(p - 1), _made(p - 1)) if p else (NOTHING, NOTHING) for p in range(windows)))


def across(windows: int) -> Links:
    """A_p = m_{p-1} and C_p = g_p; at the first window both are g_1.

    Used where membranes are carried from block to block: g are those of the layer before, at the same window.
    """
    _check_windows("across", windows)
    return Links(tuple((_made(p - 1) if p else _given(0), _given(p)) for p in range(windows)))


def across_release() -> Links:
    """(g_1, g_2), (m_1, g_2), (g_3, m_2), (g_4, m_3): the pairs of the published code, for four windows.

    Used in the place of `across(4)` to reproduce the published recurrent network.
    """
    g, m = _given, _made
    return Links(((g(0), g(1)), (m(0), g(1)), (g(2), m(1)), (g(3), m(2))))


def apart(windows: int) -> Links:
    """No sources at all: every window starts from zero. Used with fuse="none"."""
    _check_windows("apart", windows)
    return Links(((NOTHING, NOTHING),) * windows)
