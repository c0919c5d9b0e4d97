"""Files are whole or absent."""

import json
import os

import pytest

from spikefit.errors import OptionError
from spikefit.training.files import check_folder, write_json, write_text


def test_writes_and_replaces(tmp_path):
    path = tmp_path / "deep" / "rows.json"
    write_json(path, [1])
    write_json(path, [{"µ": 2.5}])
    assert json.loads(path.read_text(encoding="utf-8")) == [{"µ": 2.5}]
    assert [p.name for p in path.parent.iterdir()] == ["rows.json"]
    plain = tmp_path / "plain"
    plain.touch()
    assert path.stat().st_mode == plain.stat().st_mode


def test_a_failed_write_leaves_the_file_before_it(tmp_path, monkeypatch):
    path = write_text(tmp_path / "page.html", "before")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OptionError, match=r"cannot write .*page\.html \(No space left"):
        write_text(path, "after")
    assert path.read_text() == "before"
    assert os.listdir(tmp_path) == ["page.html"]


def test_nan_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError):
        write_json(tmp_path / "rows.json", [float("nan")])
    assert not list(tmp_path.iterdir())


def test_a_folder_is_checked_before_work_begins(tmp_path):
    check_folder(tmp_path / "deep" / "run")
    assert not (tmp_path / "deep" / "run").exists()
    (tmp_path / "taken").write_text("")
    for folder in (tmp_path / "taken", tmp_path / "taken" / "run"):
        with pytest.raises(OptionError, match=r"cannot write into .*taken.*--out"):
            check_folder(folder)


def test_a_folder_that_is_a_file_is_named(tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(OptionError, match="taken"):
        write_text(tmp_path / "taken" / "page.html", "x")
