"""Checkpoints: whole or absent, checked, and never another model's."""

import json

import pytest
import torch

from spikefit.errors import CheckpointError
from spikefit.training import latest, load_checkpoint, save_checkpoint
from spikefit.training.checkpoint import checkpoints, clean_up, fill_model, fill_optimizer, optimizer_tensors


def tensors():
    image = torch.arange(120.0).view(2, 3, 4, 5)
    return {"model": {"plain": image, "last": image.contiguous(memory_format=torch.channels_last), "view": image[:, 1]}}


def test_round_trip_keeps_every_bit_and_order(tmp_path):
    state = {"update": 3, "value": 0.1 + 0.2, "history": [{"epoch": 1}]}
    path = save_checkpoint(tmp_path / "run", 3, state, tensors())
    found = load_checkpoint(tmp_path / "run")
    assert found.path == path
    assert {k: found.state[k] for k in state} == state
    for name, tensor in tensors()["model"].items():
        assert torch.equal(found.tensors["model"][name], tensor)
    assert not [p for p in path.parent.rglob("*") if p.suffix in (".pt", ".pkl", ".bin")]


def test_files_have_the_rights_of_ordinary_files(tmp_path):
    save_checkpoint(tmp_path / "run", 1, {}, tensors())
    (tmp_path / "plain").touch()
    plain = (tmp_path / "plain").stat().st_mode
    files = list((tmp_path / "run" / "checkpoint-00000001").iterdir())
    assert len(files) > 1
    assert {f.stat().st_mode for f in files} == {plain}


def test_the_newest_two_are_kept_and_leftovers_go(tmp_path):
    for number in (1, 2, 100000000, 3):
        save_checkpoint(tmp_path, number, {}, tensors())
    assert [p.name for p in checkpoints(tmp_path)] == ["checkpoint-00000003", "checkpoint-100000000"]
    assert latest(tmp_path).name == "checkpoint-100000000"
    (tmp_path / ".checkpoint-00000009.part").mkdir()
    (tmp_path / ".checkpoint-00000009.part" / "model.safetensors").write_bytes(b"half")
    assert latest(tmp_path).name == "checkpoint-100000000"
    clean_up(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-00000003", "checkpoint-100000000"]


def test_writing_over_a_checkpoint_replaces_it(tmp_path):
    save_checkpoint(tmp_path, 1, {"update": 1}, tensors())
    save_checkpoint(tmp_path, 1, {"update": 2}, tensors())
    assert load_checkpoint(tmp_path).state["update"] == 2


@pytest.mark.parametrize("file", ["state.json", "model.safetensors"])
@pytest.mark.parametrize("how", ["flipped", "truncated", "missing", "empty"])
def test_damage_is_told(tmp_path, file, how):
    target = save_checkpoint(tmp_path, 1, {"update": 1, "text": "abcdefgh"}, tensors()) / file
    content = bytearray(target.read_bytes())
    if how == "missing":
        target.unlink()
    elif how == "empty":
        target.write_bytes(b"")
    elif how == "truncated":
        target.write_bytes(content[:-20])
    else:
        place = content.index(b"abcd") if file == "state.json" else len(content) - 9
        content[place] ^= 1
        target.write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged or incomplete"):
        load_checkpoint(tmp_path)


def test_nothing_there_and_another_format(tmp_path):
    with pytest.raises(CheckpointError, match="found none"):
        load_checkpoint(tmp_path)
    path = save_checkpoint(tmp_path, 1, {"format": 99}, tensors())
    with pytest.raises(CheckpointError, match="expected format 1, got 99"):
        load_checkpoint(path)


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot write"):
        save_checkpoint(tmp_path / "file", 1, {}, tensors())


def test_a_failed_write_leaves_nothing(tmp_path):
    with pytest.raises(TypeError):
        save_checkpoint(tmp_path, 1, {"bad": object()}, tensors())
    assert list(tmp_path.iterdir()) == []


def test_another_model_is_named(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    path = save_checkpoint(tmp_path, 1, {}, {"model": model.state_dict()})
    found = load_checkpoint(path).tensors["model"]
    with pytest.raises(CheckpointError, match=r"another model.*1\.weight \(2, 4\) instead of \(5, 4\)"):
        fill_model(torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 5)), found, path)
    with pytest.raises(CheckpointError, match=r"2\.weight missing"):
        fill_model(torch.nn.Sequential(*model, torch.nn.Linear(2, 2)), found, path)
    with pytest.raises(CheckpointError, match=r"1\.weight unknown to it"):
        fill_model(torch.nn.Sequential(torch.nn.Linear(3, 4)), found, path)


@pytest.mark.parametrize("make", [lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), torch.optim.AdamW])
def test_optimiser_state_goes_on_bit_for_bit(tmp_path, make):
    def updates(model, optimizer, seeds):
        for seed in seeds:
            x = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(seed))
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()

    def fresh():
        torch.manual_seed(0)
        # channels-last weights, whose optimiser state has that order too
        return torch.nn.Conv2d(3, 5, 3).to(memory_format=torch.channels_last)

    whole = fresh()
    updates(whole, make(whole.parameters()), range(6))
    first = fresh()
    optimizer = make(first.parameters())
    updates(first, optimizer, range(3))
    groups = {"model": first.state_dict(), "optimizer": optimizer_tensors(first, optimizer)}
    save_checkpoint(tmp_path, 3, {}, groups)
    second = fresh()
    optimizer, found = make(second.parameters()), load_checkpoint(tmp_path)
    fill_model(second, found.tensors["model"], tmp_path)
    fill_optimizer(second, optimizer, found.tensors["optimizer"], tmp_path)
    assert all(v.stride() == p.stride() for p, s in optimizer.state.items() for v in s.values() if v.ndim == p.ndim)
    updates(second, optimizer, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), second.parameters(), strict=True))
    with pytest.raises(CheckpointError, match="fits nothing"):
        fill_optimizer(torch.nn.Linear(2, 2), optimizer, found.tensors["optimizer"], tmp_path)


def test_the_json_part_is_plain(tmp_path):
    path = save_checkpoint(tmp_path, 1, {"update": 1}, tensors())
    body = json.loads((path / "state.json").read_text())
    assert body["format"] == 1
    assert set(body["files"]) == {"model"}
