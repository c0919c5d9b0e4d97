"""Readers: files as their publishers write them, on small files made here and on the real ones, and damaged files."""

import gzip
import os
import pickle
import struct

import numpy as np
import pytest
import torch

from spikefit.data import DATASETS, dataset_options, load_dataset
from spikefit.data.cifar import read_batch
from spikefit.errors import DataError, OptionError


def idx(array):
    return b"\x00\x00\x08" + bytes([array.ndim]) + struct.pack(f">{array.ndim}i", *array.shape) + array.tobytes()


@pytest.fixture
def mnist(tmp_path):
    """A tiny MNIST; the training files zipped, the test files not."""
    folder = tmp_path / "MNIST" / "raw"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for stem, n in (("train", 7), ("t10k", 3)):
        images, labels = rng.integers(0, 256, (n, 28, 28), np.uint8), np.arange(n, dtype=np.uint8)
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            name, raw = f"{stem}-{kind}-ubyte", idx(array)
            if stem == "train":
                (folder / f"{name}.gz").write_bytes(gzip.compress(raw))
            else:
                (folder / name).write_bytes(raw)
    return tmp_path


def test_options_are_those_that_the_reader_takes(mnist):
    assert "download" in dataset_options("mnist")
    for name in DATASETS:
        assert set(dataset_options(name)).isdisjoint({"root", "split", "limit", "mean", "std"})
    with pytest.raises(OptionError, match=r"unknown option 'downlaod'; known: .*download"):
        load_dataset("mnist", mnist, downlaod=True)


def test_idx(mnist):
    train, test = (load_dataset("mnist", mnist, split) for split in ("train", "test"))
    assert (len(train), len(test), train.shape, train.kind) == (7, 3, (1, 28, 28), "image")
    assert test.targets.tolist() == [0, 1, 2]
    wanted = np.random.default_rng(0).integers(0, 256, (7, 28, 28), np.uint8)
    assert np.array_equal(train.inputs[:, 0].numpy(), wanted)
    x, y = train.batch([2, 5])
    assert torch.equal(x[:, 0], torch.from_numpy(wanted[[2, 5]]).float() / 255)
    assert y.tolist() == [2, 5]
    scaled = load_dataset("mnist", mnist, mean=[0.5], std=[0.25])
    torch.testing.assert_close(scaled.batch([2])[0], (x[:1] - 0.5) / 0.25)


def damage(path, change):
    path.write_bytes(change(path.read_bytes()))


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("train-images-idx3-ubyte.gz", lambda b: b[:-20], "no complete gzip file"),
        ("train-images-idx3-ubyte.gz", lambda b: gzip.compress(gzip.decompress(b)[:-1]), "must hold 5504 bytes"),
        ("train-labels-idx1-ubyte.gz", lambda b: gzip.compress(b"\x00\x00\x0b\x01"), "must begin with the bytes 0 0 8"),
        ("train-labels-idx1-ubyte.gz", lambda b: gzip.compress(b"\x00\x00\x08\x01\x00"), "ends inside its header"),
        ("train-labels-idx1-ubyte.gz", lambda b: gzip.compress(idx(np.zeros(5, np.uint8))), "7 samples but 5 labels"),
        (
            "train-labels-idx1-ubyte.gz",
            lambda b: gzip.compress(idx(np.full(7, 12, np.uint8))),
            "labels must lie in 0..9",
        ),
        (
            "train-labels-idx1-ubyte.gz",
            lambda b: gzip.compress(idx(np.zeros((7, 28, 28), np.uint8))),
            "labels-idx1-ubyte.gz must hold an array of 1 axes, got one of 3",
        ),
        ("train-images-idx3-ubyte.gz", lambda b: gzip.compress(idx(np.zeros(7, np.uint8))), "3 axes, got one of 1"),
        (
            "train-images-idx3-ubyte.gz",
            lambda b: gzip.compress(b"\x00\x00\x08\x03" + struct.pack(">3i", -1, -4, 1) + b"    "),
            "bytes for sizes",
        ),
    ],
)
def test_damaged_idx(mnist, file, change, message):
    damage(mnist / "MNIST" / "raw" / file, change)
    with pytest.raises(DataError, match=message):
        load_dataset("mnist", mnist)


def python2_batch(pixels, labels, label_key=b"labels"):
    """A batch with bytes keys, as Python 2 wrote them."""
    return pickle.dumps({b"data": pixels, label_key: labels, b"batch_label": b"one"}, protocol=2)


@pytest.fixture
def cifar(tmp_path):
    rng = np.random.default_rng(0)
    ten = tmp_path / "cifar-10-batches-py"
    ten.mkdir()
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        (ten / name).write_bytes(python2_batch(rng.integers(0, 256, (4, 3072), np.uint8), [0, 1, 2, 9]))
    (ten / "batches.meta").write_bytes(pickle.dumps({b"label_names": list("abcdefghij")}, protocol=2))
    hundred = tmp_path / "cifar-100-python"
    hundred.mkdir()
    for name in ("train", "test"):
        raw = python2_batch(rng.integers(0, 256, (4, 3072), np.uint8), [0, 99, 2, 9], b"fine_labels")
        (hundred / name).write_bytes(raw)
    meta = {b"fine_label_names": [str(i) for i in range(100)]}
    (hundred / "meta").write_bytes(pickle.dumps(meta, protocol=2))
    return tmp_path


def test_cifar(cifar):
    ten, hundred = load_dataset("cifar10", cifar), load_dataset("cifar100", cifar, "test")
    assert (len(ten), len(hundred)) == (20, 4)
    assert (ten.classes[9], hundred.targets.tolist()) == ("j", [0, 99, 2, 9])
    first = read_batch(cifar / "cifar-10-batches-py" / "data_batch_1")["data"][1].reshape(3, 32, 32)
    assert np.array_equal(ten.inputs[1].numpy(), first)


class Harm:
    def __reduce__(self):
        return os.system, ("touch harmed",)


# An array of 12 values whose dtype is one of 8 bytes by its state; numpy's own loading believes such a state.
CRAFTED_DTYPE = (
    b"\x80\x02}U\x04datacnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85U\x01btR"
    b"(K\x01K\x0c\x85cnumpy\ndtype\nU\x02u1\x85R(K\x03U\x01|NNNK\x08K\x08K\x3ftb\x89U\x08abcdefghtbs."
)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (pickle.dumps({"data": Harm()}), "asks for posix.system"),
        (
            pickle.dumps({"data": np.array([Harm], dtype=object)}, protocol=2),
            "which a CIFAR batch never needs|Python objects",
        ),
        (pickle.dumps({"data": np.array([{}], dtype=object)}, protocol=2), "Python objects"),
        (b"\x80\x02}U\x04datacnumpy\nndarray\n(J\x00\x00\x00\x40\x85tRs.", "is damaged.*not callable"),
        (b"\x80\x02}U\x04datacnumpy\nndarray\nK\x05\x85\x81s.", "is damaged.*must be a type"),
        (CRAFTED_DTYPE, "is damaged.*buffer is smaller|is damaged.*cannot reshape"),
        (pickle.dumps([1, 2]), "must hold a dictionary"),
        (python2_batch(np.zeros((2, 3072), np.uint8), [0, 1])[:-40], "is damaged"),
        (python2_batch(np.zeros((2, 3071), np.uint8), [0, 1]), r"'data' as uint8 \[n, 3072\]"),
        (python2_batch(np.zeros((2, 3072), np.int8), [0, 1]), "data_batch_3 must hold 'data'.* got int8"),
        (python2_batch(np.zeros((2, 3072), np.uint8), [0]), "a list of 2 classes"),
        (python2_batch(np.zeros((2, 3072), np.uint8), [0, "cat"]), "numbers from 0 to 9, got a list of 2"),
        (python2_batch(np.zeros((2, 3072), np.uint8), [0, 10]), "numbers from 0 to 9, got a list of 2"),
        (b"", "is damaged"),
    ],
)
def test_unsafe_or_damaged_cifar(cifar, tmp_path, monkeypatch, raw, message):
    monkeypatch.chdir(tmp_path)
    (cifar / "cifar-10-batches-py" / "data_batch_3").write_bytes(raw)
    with pytest.raises(DataError, match=message):
        load_dataset("cifar10", cifar)
    assert not (tmp_path / "harmed").exists()


def test_cifar_without_names(cifar):
    for content in ({}, {"label_names": ["one"]}, {"label_names": 3}):
        (cifar / "cifar-10-batches-py" / "batches.meta").write_bytes(pickle.dumps(content))
        with pytest.raises(DataError, match=r"batches\.meta must hold 'label_names' as a list of 10 names"):
            load_dataset("cifar10", cifar)


@pytest.fixture
def har(tmp_path):
    from spikefit.data.har import CHANNELS

    folder = tmp_path / "UCI HAR Dataset"
    for split, n in (("train", 3), ("test", 2)):
        signals = folder / split / "Inertial Signals"
        signals.mkdir(parents=True)
        for c, channel in enumerate(CHANNELS):
            np.savetxt(signals / f"{channel}_{split}.txt", np.full((n, 128), c + 0.5), fmt="%.7e")
        np.savetxt(folder / split / f"y_{split}.txt", np.arange(n) + 1, fmt="%d")
    (folder / "activity_labels.txt").write_text("1 WALKING\n2 WALKING_UPSTAIRS\n3 SITTING\n")
    return tmp_path


def test_uci_har(har):
    train = load_dataset("uci_har", har)
    assert (tuple(train.inputs.shape), train.shape, train.kind) == ((3, 128, 9), (9,), "sequence")
    assert train.inputs[0, 0].tolist() == [c + 0.5 for c in range(9)]
    assert (train.targets.tolist(), train.classes[1]) == ([0, 1, 2], "WALKING_UPSTAIRS")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t[:-30], "uneven"),
        (lambda t: t.replace("5.0", "x.0", 1), "numbers only"),
        (lambda t: t.replace("5.0000000e-01", "nan", 1), "finite numbers"),
        (lambda t: "", "is empty"),
        (lambda t: "\n".join(t.split("\n")[:2]) + "\n", "differ in size"),
    ],
)
def test_damaged_uci_har(har, change, message):
    path = har / "UCI HAR Dataset" / "train" / "Inertial Signals" / "body_acc_x_train.txt"
    path.write_text(change(path.read_text()))
    with pytest.raises(DataError, match=message):
        load_dataset("uci_har", har)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("train/y_train.txt", "1\n2\n1.5\n", r"y_train\.txt must hold whole numbers from 1 on"),
        ("train/y_train.txt", "0\n1\n2\n", "whole numbers from 1 on, got 0"),
        ("train/y_train.txt", "1 2\n1 2\n1 2\n", "rows of 1, got rows of 2"),
        ("train/y_train.txt", "1\n2\n", "3 samples but 2 labels"),
        ("train/y_train.txt", "1\n2\n4\n", r"labels must lie in 0\.\.2, got 0\.\.3"),
        ("train/y_train.txt", b"\xff\xfe\n", "must be a text file"),
        ("activity_labels.txt", "1\n2 SITTING\n", "rows '<number> <name>'"),
        ("activity_labels.txt", "", "activity_labels.txt must hold rows"),
        ("activity_labels.txt", None, "expected the file activity_labels.txt"),
        ("train/y_train.txt", None, "expected the file y_train.txt"),
    ],
)
def test_malformed_labels_of_uci_har(har, file, content, message):
    path = har / "UCI HAR Dataset" / file
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=message):
        load_dataset("uci_har", har)


@pytest.fixture
def hapt(tmp_path):
    folder = tmp_path / "HAPT Data Set" / "RawData"
    folder.mkdir(parents=True)
    for experiment, user in ((1, 1), (2, 2)):  # user 2 belongs to the test split
        for kind in ("acc", "gyro"):
            rows = np.arange(30)[:, None] + np.array([0.1, 0.2, 0.3]) + (100 if kind == "gyro" else 0)
            np.savetxt(folder / f"{kind}_exp{experiment:02d}_user{user:02d}.txt", rows, fmt="%.9g")
    (folder / "labels.txt").write_text("1 1 2 6 15\n2 2 1 1 30\n")
    (folder.parent / "activity_labels.txt").write_text("1 WALKING\n2 SITTING\n")
    return tmp_path


def test_hapt(hapt):
    train, test = load_dataset("hapt", hapt, length=10), load_dataset("hapt", hapt, "test", length=20, stride=5)
    assert tuple(train.inputs.shape) == (3, 10, 6)
    assert train.inputs[1, 0].tolist() == pytest.approx([10.1, 10.2, 10.3, 110.1, 110.2, 110.3])
    # steps 6 to 15, counted from 1, are SITTING
    assert train.targets[0].tolist() == [-1] * 5 + [1] * 5
    assert train.targets[1].tolist() == [1] * 5 + [-1] * 5
    assert (len(test), test.targets.unique().tolist()) == (3, [0])
    with pytest.raises(DataError, match="no window of 31 steps"):
        load_dataset("hapt", hapt, length=31)
    with pytest.raises(OptionError, match="at least 1 step"):
        load_dataset("hapt", hapt, length=0)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("RawData/labels.txt", "1 1 2 6\n", r"labels\.txt must hold rows of 5, got rows of 4"),
        ("RawData/labels.txt", "1 1 3 6 15\n", r"activities 1\.\.2 .*got 3"),
        ("RawData/labels.txt", "1 1 2 15 6\n", "in this order"),
        ("RawData/labels.txt", "1 1 2 0 15\n", "whole numbers from 1 on, got 0"),
        ("RawData/labels.txt", None, "expected the file labels.txt"),
        ("RawData/acc_expA_user01.txt", "1 2 3\n", "expected files acc_exp<number>_user<number>.txt"),
        ("RawData/gyro_exp01_user01.txt", "1 2 3\n", r"must both be \[steps, 3\]"),
        ("RawData/gyro_exp01_user01.txt", None, "expected the file gyro_exp01_user01.txt"),
        ("activity_labels.txt", "WALKING\n", "rows '<number> <name>'"),
    ],
)
def test_malformed_hapt(hapt, file, content, message):
    path = hapt / "HAPT Data Set" / file
    if content is None:
        path.unlink()
    else:
        path.write_text(content)
    with pytest.raises(DataError, match=message):
        load_dataset("hapt", hapt, length=10)


def test_nmnist(tmp_path):
    folder = tmp_path / "NMNIST" / "Train" / "7"
    folder.mkdir(parents=True)
    # x | y | polarity in bit 7 and 23 bits of microseconds; the last one is an overflow mark (y = 240)
    events = [(3, 4, 1, 5), (33, 33, 0, 70_000), (0, 240, 0, 80_000)]
    raw = b"".join(bytes([x, y, p << 7 | t >> 16, t >> 8 & 255, t & 255]) for x, y, p, t in events)
    (folder / "00001.bin").write_bytes(raw)
    recordings = load_dataset("nmnist", tmp_path)
    (sample,), y = recordings.batch([0])
    assert (y.tolist(), recordings.kind, recordings.shape) == ([7], "events", (2, 34, 34))
    assert [tuple(int(e[k]) for k in ("x", "y", "p", "t")) for e in sample] == events[:2]
    (folder / "00002.bin").write_bytes(raw[:-2])
    with pytest.raises(DataError, match="events of 5 bytes, got 13 bytes"):
        load_dataset("nmnist", tmp_path)
    (folder / "00002.bin").write_bytes(b"")
    with pytest.raises(DataError, match=r"00002\.bin must hold events of 5 bytes, got an empty file"):
        load_dataset("nmnist", tmp_path)
    (folder / "00002.bin").write_bytes(bytes([3, 34, 0, 0, 0]))
    with pytest.raises(DataError, match=r"00002\.bin must hold events on 34x34 pixels, got x up to 3 and y up to 34"):
        load_dataset("nmnist", tmp_path)
    with pytest.raises(DataError, match="found none"):
        load_dataset("nmnist", tmp_path, "test")


def test_npz(tmp_path):
    rng = np.random.default_rng(0)
    np.savez(
        tmp_path / "own.npz",
        x_train=rng.random((6, 5, 2), np.float32),
        y_train=np.arange(6) % 3,
        x_test=np.zeros((0, 5, 2), np.float32),
        y_test=np.zeros(0, np.int64),
        classes=np.array(["a", "b", "c"]),
    )
    own = load_dataset("npz", tmp_path, file="own.npz")
    assert (own.kind, own.shape, own.classes) == ("sequence", (2,), ["a", "b", "c"])
    with pytest.raises(DataError, match="empty"):
        load_dataset("npz", tmp_path, "test", file="own.npz")
    np.savez(tmp_path / "images.npz", x_train=rng.integers(0, 256, (4, 6, 6), np.uint8), y_train=np.arange(4))
    images = load_dataset("npz", tmp_path, file="images.npz")
    assert (images.kind, images.shape, len(images.classes)) == ("image", (1, 6, 6), 4)
    for content, message in [
        ({"x_train": np.zeros((2, 3, 1))}, "must hold y_train"),
        ({"x_train": np.zeros((2, 3, 1)), "y_train": np.zeros(2)}, "whole numbers"),
        ({"x_train": np.zeros((2, 3)), "y_train": np.zeros(2, int)}, r"float \[n, T, C\]"),
        ({"x_train": np.zeros((3, 3, 1)), "y_train": np.zeros(2, int)}, "3 samples but 2 labels"),
        ({"x_train": np.array([{}, {}]), "y_train": np.zeros(2, int)}, "plain arrays"),
        ({"x_train": np.zeros((2, 3, 1)), "y_train": np.zeros((2, 4), int)}, r"\[n, T\] = \[2, 3\].*got \[2, 4\]"),
        ({"x_train": np.zeros((2, 3, 1)), "y_train": np.array(1)}, r"must be \[n\] or \[n, T\], got \[\]"),
        ({"x_train": np.full((2, 1, 3, 3), "a"), "y_train": np.zeros(2, int)}, "finite numbers, got <U1"),
        ({"x_train": np.zeros((2, 3, 1), complex), "y_train": np.zeros(2, int)}, "finite numbers, got complex128"),
        ({"x_train": np.full((2, 3, 1), np.nan), "y_train": np.zeros(2, int)}, "finite numbers, got nan or inf"),
        ({"x_train": np.zeros((2, 3), np.uint8), "y_train": np.zeros(2, int)}, r"images \[n, H, W\]"),
        ({"x_train": np.zeros((2, 3, 1)), "y_train": np.zeros(2, int), "classes": "a"}, "must be a list of names"),
    ]:
        np.savez(tmp_path / "bad.npz", **content)
        with pytest.raises(DataError, match=message):
            load_dataset("npz", tmp_path, file="bad.npz")
    np.save(tmp_path / "one.npy", np.zeros(3))
    with pytest.raises(DataError, match=r"arrays by name, got one array; write it with np\.savez"):
        load_dataset("npz", tmp_path, file="one.npy")
    (tmp_path / "bad.npz").write_bytes((tmp_path / "own.npz").read_bytes()[:100])
    with pytest.raises(DataError, match="plain arrays"):
        load_dataset("npz", tmp_path, file="bad.npz")


def test_image_folder(tmp_path):
    image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    for split, name, colour in (("train", "cat", 10), ("train", "dog", 200), ("test", "dog", 200)):
        folder = tmp_path / split / name
        folder.mkdir(parents=True)
        image.new("RGB", (20, 12), (colour, 0, 0)).save(folder / "one.png")
    train, test = load_dataset("image_folder", tmp_path, side=8), load_dataset("image_folder", tmp_path, "test", side=8)
    x, y = train.batch([0, 1])
    assert (tuple(x.shape), y.tolist(), train.classes) == ((2, 3, 8, 8), [0, 1], ["cat", "dog"])
    assert x[:, 0, 4, 4].tolist() == pytest.approx([10 / 255, 200 / 255])
    assert test.targets.tolist() == [1]
    (tmp_path / "train" / "cat" / "one.png").write_bytes(b"no image")
    with pytest.raises(DataError, match="cannot be read as an image"):
        train.batch([0])


def test_digits():
    train, test = load_dataset("digits"), load_dataset("digits", split="test")
    assert (len(train) + len(test), train.shape) == (1797, (1, 8, 8))
    assert 0.19 < len(test) / 1797 < 0.21
    assert float(train.inputs.min()) == 0
    assert float(train.inputs.max()) == 1
    assert torch.bincount(test.targets).min() >= 34
    few = load_dataset("digits", limit=25)
    assert torch.bincount(few.targets).tolist() == [3] * 5 + [2] * 5
    assert torch.equal(few.inputs, load_dataset("digits", limit=25).inputs)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: load_dataset("minst"), OptionError, "Did you mean mnist"),
        (lambda: load_dataset("digits", split="validation"), OptionError, "'train' or 'test'"),
        (lambda: load_dataset("digits", limit=0), OptionError, "at least 1 sample"),
        (lambda: load_dataset("digits", size=3), OptionError, "unknown option 'size'"),
        (lambda: load_dataset("digits", mean=[0.1, 0.2]), OptionError, "one value for each of 1 channels"),
        (lambda: load_dataset("digits", std=[0.0]), OptionError, "std must be > 0"),
        (lambda: load_dataset("cifar10", "nowhere"), DataError, "expected a folder 'cifar-10-batches-py' in nowhere"),
        (lambda: load_dataset("npz", "nowhere", file="a.npz"), DataError, "expected the file"),
        (lambda: load_dataset("image_folder", "nowhere"), DataError, "found none"),
    ],
)
def test_refuses(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_download_says_what_it_needs(monkeypatch, tmp_path):
    import sys

    monkeypatch.setitem(sys.modules, "torchvision", None)
    monkeypatch.setitem(sys.modules, "torchvision.datasets", None)
    with pytest.raises(DataError, match="pip install torchvision"):
        load_dataset("fashion_mnist", tmp_path, download=True)


REAL = {
    "cifar10": (50_000, 10_000, (3, 32, 32), 10),
    "fashion_mnist": (60_000, 10_000, (1, 28, 28), 10),
    "uci_har": (7_352, 2_947, (9,), 6),
    "nmnist": (1_000, 100, (2, 34, 34), 10),
    "hapt": (None, None, (6,), 12),
}


@pytest.mark.parametrize("name", REAL)
def test_real_files(name):
    if not os.environ.get("SPIKEFIT_DATA"):
        pytest.skip("SPIKEFIT_DATA is not set; it points to real data in their publishers' layouts")
    train, test = load_dataset(name), load_dataset(name, split="test")
    n_train, n_test, shape, classes = REAL[name]
    assert train.shape == test.shape == shape
    assert len(train.classes) == classes
    if n_train is not None:
        assert (len(train), len(test)) == (n_train, n_test)
        assert torch.bincount(train.targets, minlength=classes).min() > 0
    x, _ = test.batch([0, len(test) - 1])
    if isinstance(x, torch.Tensor):
        assert x.isfinite().all()
        assert x.std() > 0.01
    else:
        assert all(len(sample) > 100 and (np.diff(sample["t"]) >= 0).all() for sample in x)


def test_the_table_names_all_readers():
    assert set(DATASETS) == {*REAL, "digits", "mnist", "cifar100", "npz", "image_folder"}
