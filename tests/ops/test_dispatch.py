"""Choice of a backend: `auto` takes what can run, a wish by name runs or raises with its reason."""

import pytest
import torch

from spikefit import use_backend
from spikefit.errors import BackendError, OptionError
from spikefit.ops import dispatch
from spikefit.ops.lif import lif
from spikefit.ops.surrogate import FORMS, Form, Surrogate
from support import TRITON, backends_called

X = torch.ones(2, 1, 3)


def test_auto_takes_numba_on_cpu_also_where_triton_is_interpreted():
    assert backends_called(lambda: lif(X)) == {"numba"}
    assert backends_called(lambda: lif(X, backend="reference")) == set()


@pytest.mark.parametrize("backend", ["reference", "numba", TRITON])
def test_use_backend_is_the_default_of_a_block(backend):
    with use_backend(backend):
        assert backends_called(lambda: lif(X)) == {backend} - {"reference"}
        assert backends_called(lambda: lif(X, backend="numba")) == {"numba"}, "a wish by name comes first"
    assert backends_called(lambda: lif(X)) == {"numba"}


@pytest.mark.parametrize("backend", ["numba", TRITON])
def test_backward_runs_on_the_backend_of_forward(backend):
    x = X.clone().requires_grad_()
    spikes, _ = lif(x, backend=backend)
    assert backends_called(lambda: spikes.sum().backward()) == {backend}


def test_names_are_checked():
    assert [dispatch.check_backend(name) for name in dispatch.BACKENDS] == list(dispatch.BACKENDS)
    with pytest.raises(OptionError, match="expected one of auto, reference, numba, triton, got 'Numba'"):
        dispatch.check_backend("Numba")


def test_the_wish_that_counts():
    assert dispatch.resolve("auto") == "auto"
    with use_backend("reference"):
        assert dispatch.resolve("auto") == "reference"
        assert dispatch.resolve("numba") == "numba"
        with use_backend("auto"):
            assert dispatch.resolve("auto") == "auto"
    with pytest.raises(RuntimeError, match="inside"), use_backend("reference"):
        raise RuntimeError("inside")
    assert dispatch.resolve("auto") == "auto"


@pytest.mark.parametrize(
    ("backend", "triton", "numba", "wanted"),
    [
        ("auto", None, None, "triton"),
        ("auto", "no.", None, "numba"),
        ("auto", "no.", "no.", "reference"),
        ("reference", None, None, "reference"),
        ("numba", None, None, "numba"),
        ("triton", None, "no.", "triton"),
    ],
)
def test_choice(backend, triton, numba, wanted):
    assert dispatch.choose(backend, triton=triton, numba=numba) == wanted


def test_a_choice_that_cannot_run_gives_its_reason():
    with pytest.raises(BackendError, match=r"backend='numba': it rains\. Use backend='auto'"):
        dispatch.choose("numba", triton=None, numba="it rains.")
    with use_backend("triton"), pytest.raises(BackendError, match="backend='triton': no GPU"):
        dispatch.choose("auto", triton="no GPU.", numba=None)


def test_unknown_name():
    with pytest.raises(OptionError, match="expected one of auto, reference, numba, triton, got 'cuda'"):
        lif(X, backend="cuda")
    with pytest.raises(OptionError, match="expected one of"), use_backend("cuda"):
        pass


def test_missing_packages(monkeypatch):
    monkeypatch.setitem(dispatch._installed, "numba", False)
    monkeypatch.setitem(dispatch._installed, "triton", False)
    assert backends_called(lambda: lif(X)) == set()
    with pytest.raises(BackendError, match=r"numba is not installed; pip install 'spikefit\[cpu\]'"):
        lif(X, backend="numba")
    with pytest.raises(BackendError, match=r"triton is not installed; pip install 'spikefit\[cuda\]'"):
        lif(X, backend="triton")


def test_triton_on_cpu_tensors_needs_the_interpreter(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(BackendError, match=r"got a tensor on cpu \(TRITON_INTERPRET=1 .*backend='auto'"):
        lif(X, backend="triton")


def test_triton_has_no_float64():
    pytest.importorskip("triton")
    with pytest.raises(BackendError, match="compute in float32, got float64 input"):
        lif(X.double(), backend="triton")


def test_numba_takes_cpu_tensors_only():
    with pytest.raises(BackendError, match="numba kernels run on CPU tensors, got a tensor on meta"):
        lif(X.to("meta"), backend="numba")


def test_a_surrogate_without_kernel_runs_on_the_reference(monkeypatch):
    monkeypatch.setitem(FORMS, "mine", Form(FORMS["atan"].slope, FORMS["atan"].primitive))
    assert backends_called(lambda: lif(X, surrogate=Surrogate("mine", 1.0))) == set()
    with pytest.raises(BackendError, match="surrogate mine has no compiled slope"):
        lif(X, surrogate=Surrogate("mine", 1.0), backend="numba")
