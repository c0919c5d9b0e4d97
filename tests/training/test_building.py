"""From recipe to model, data and optimiser; averaged weights and the learning rate."""

import math

import numpy as np
import pytest
import torch

from spikefit.errors import DataError, OptionError, RecipeError, StrategyError
from spikefit.layers import GlobalAveragePool, Readout, SpikingConv2d
from spikefit.models import SpikingNetwork
from spikefit.training import (
    AveragedWeights,
    build_augmentation,
    build_data,
    build_encoding,
    build_loss,
    build_model,
    build_optimizer,
    build_step,
    derive_seed,
    learning_rate,
    load_recipe,
    train,
)


def my_factory(num_classes, input_shape, width=4):
    blocks = [SpikingConv2d(input_shape[0], width), GlobalAveragePool(), Readout(width, num_classes)]
    return SpikingNetwork(blocks, input_shape=input_shape)


def no_network():
    return torch.nn.Sequential(torch.nn.Flatten(2), torch.nn.Linear(64, 10))


def test_shapes_come_from_the_data_unless_written(small):
    model = build_model(small())
    assert model.input_shape == (1, 8, 8)
    assert model.blocks[-1].linear.out_features == 10
    written = build_model(small(image="3x4x4", classes="7"))
    assert (written.input_shape, written.blocks[-1].linear.out_features) == ((3, 4, 4), 7)
    assert build_model(load_recipe({"model": {"name": "vgg6", "width": 0.1}})).input_shape == (3, 32, 32)


def test_weights_depend_on_the_seed_only(small):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    a, b = build_model(small()), build_model(small(strategy="checkpoint", lr="0.3"))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    other = build_model(small(seed="1"))
    assert not torch.equal(next(a.parameters()), next(other.parameters()))
    assert str(b.strategy) == "checkpoint"


def test_neuron_norm_and_strategy_reach_the_model(small):
    model = build_model(small(tau="4", v_reset="0", norm="step_bn", strategy="checkpoint:2"))
    unit = model.blocks[1]
    assert (unit.neuron.tau, unit.neuron.v_reset, unit.norm.time_scope) == (4.0, 0.0, "step")
    assert (model.strategy.name, model.strategy.option) == ("checkpoint", "2")


def test_momentum_of_running_statistics(small):
    def momenta(**changes):
        return {m.momentum for m in build_model(small(**changes)).modules() if hasattr(m, "running_mean")}

    assert momenta() == {0.1}
    assert momenta(norm="step_bn", **{"norm.momentum": "0.01"}) == {0.01}
    # the flat key is that of the optimiser
    assert momenta(momentum="0.01") == {0.1}
    with pytest.raises(OptionError, match=r"momentum=0\.01 is of running statistics, .* use norm=bn or step_bn"):
        build_model(small(norm="ws", **{"norm.momentum": "0.01"}))
    with pytest.raises(RecipeError, match=r"norm\.momentum: expected .*got 0"):
        small(**{"norm.momentum": "0"})


def test_encoding_and_loss_are_those_of_the_recipe(small):
    image = torch.rand(2, 1, 8, 8)
    encoding = build_encoding(small(timesteps="5"))
    assert (encoding.name, encoding.timesteps) == ("repeat", 5)
    assert torch.equal(encoding(image), image.expand(5, *image.shape))
    drawn = build_encoding(small(encoding="rate"))
    assert drawn(image, torch.Generator().manual_seed(0)).unique().tolist() == [0, 1]
    logits, targets = torch.randn(3, 4, 10), torch.arange(4)
    steps, mean = (build_loss(small(loss=name)) for name in ("ce_steps", "ce_mean"))
    assert (steps.splits_per_step, mean.splits_per_step) == (True, False)
    wanted = torch.nn.functional.cross_entropy(logits.mean(0), targets)
    torch.testing.assert_close(mean(logits, targets), wanted)
    torch.testing.assert_close(
        steps(logits, targets), torch.stack([steps.step(logits_t, targets) for logits_t in logits]).mean()
    )


def test_own_factory(small):
    recipe = load_recipe({**small().to_dict(), "model": {"name": f"{__name__}:my_factory", "width": 6}})
    model = build_model(recipe)
    assert model.input_shape == (1, 8, 8)
    assert model.blocks[0].synapse.out_channels == 6
    for name, told in ((":nothing", "importable"), (":my_factory", "refused")):
        wrong = load_recipe({**small().to_dict(), "model": {"name": __name__ + name, "depth": 3}})
        with pytest.raises(OptionError, match=told):
            build_model(wrong)


def test_any_module_runs_under_bptt_and_no_other_strategy(small):
    plain = load_recipe({**small(epochs="1").to_dict(), "model": {"name": f"{__name__}:no_network"}})
    assert math.isfinite(train(plain).loss)
    with pytest.raises(StrategyError, match="contains no SpikingNetwork"):
        build_model(plain.override({"strategy": "checkpoint"}))


def test_the_step_of_a_recipe(small):
    step = build_step(small(batch="5"))
    assert (step.x.shape, step.y.shape) == ((3, 5, 1, 8, 8), (5,))
    assert step.loss(step.model(step.x), step.y).isfinite()
    double = build_step(small(precision="64-true", model="mlp"), shapes_only=True)
    assert {t.dtype for t in (double.x, *double.model.parameters())} == {torch.float64}
    for key, value in (("precision", "16-mixed"), ("accelerator", "cuda")):
        with pytest.raises(OptionError, match=rf"train\.{key}.*{value}"):
            build_step(small(**{key: value}))


def test_encoding_and_data_fit(small, sensors, tmp_path):
    har = load_recipe({**sensors, "model": "har_conv", "encoding": {"name": "repeat", "timesteps": 8}})
    with pytest.raises(OptionError, match=r"expected sequence for npz train.*got 'repeat'; encoding=sequence"):
        build_data(har)
    with pytest.raises(OptionError, match=r"expected repeat or rate or latency .*give encoding=repeat timesteps=8"):
        build_data(small(encoding="sequence"))
    folder = tmp_path / "NMNIST" / "Train" / "3"
    folder.mkdir(parents=True)
    (folder / "1.bin").write_bytes(bytes([3, 4, 0, 0, 5]))
    events = {"model": "vgg6", "data": {"name": "nmnist", "root": str(tmp_path)}}
    with pytest.raises(OptionError, match="give encoding=event_frames timesteps=10 height=34 width=34"):
        build_data(load_recipe(events))
    with pytest.raises(RecipeError, match="height is missing"):
        load_recipe({**events, "encoding": {"name": "event_frames", "timesteps": 4}})


def test_classes_hold_the_labels(small):
    assert len(build_data(small(classes="11")).train) == 40
    with pytest.raises(OptionError, match="labels up to 9 and needs at least 10 classes, got 7; leave it out"):
        build_data(small(classes="7"))


def test_data_without_any_label(small, tmp_path):
    x, y = np.zeros((3, 4, 2), np.float32), np.full((3, 4), -1)
    np.savez(tmp_path / "none.npz", x_train=x, y_train=y, x_test=x, y_test=y, classes=["a", "b"])
    data = {"name": "npz", "root": str(tmp_path), "file": "none.npz"}
    with pytest.raises(DataError, match="npz train: expected at least one label"):
        build_data(load_recipe({"model": "har_mlp", "data": data, "encoding": "sequence"}))


def test_data_and_augmentation(small):
    data = build_data(small())
    assert (len(data.train), len(data.test)) == (40, 40)
    shifted = build_augmentation(small(augment="crop:1,flip"), data.train)
    images = data.train.batch(range(8))[0]
    for function in shifted:
        assert function(images, torch.Generator().manual_seed(0)).shape == images.shape
    with pytest.raises(OptionError, match="Did you mean flip"):
        build_augmentation(small(augment="flp"), data.train)
    with pytest.raises(OptionError, match="crop:x"):
        build_augmentation(small(augment="crop:x"), data.train)
    with pytest.raises(RecipeError, match=r"data\.name is missing"):
        build_data(load_recipe({"model": "mlp"}))
    with pytest.raises(DataError):
        build_data(load_recipe({"model": "mlp", "data": {"name": "cifar10", "root": "/nowhere"}}))


def test_weight_decay_spares_biases_norms_and_time_constants(small):
    model = build_model(small(neuron="plif"))
    for name, kind in (("sgd", torch.optim.SGD), ("adamw", torch.optim.AdamW)):
        optimizer = build_optimizer(small(optimizer=name, weight_decay="0.5", lr="0.25"), model)
        assert isinstance(optimizer, kind)
        decayed = [p for g in optimizer.param_groups if g["weight_decay"] == 0.5 for p in g["params"]]
        assert {p.ndim for p in decayed} == {2}
        assert sum(len(g["params"]) for g in optimizer.param_groups) == len(list(model.parameters()))


def test_learning_rate(small):
    section = small(lr="0.8", epochs="10", warmup_epochs="2").train
    rates = [learning_rate(section, u, 4) for u in range(40)]
    assert rates[:8] == pytest.approx([0.8 * (u + 1) / 9 for u in range(8)])
    assert rates[8] == 0.8
    assert rates[24] == pytest.approx(0.4)
    assert rates[-1] == pytest.approx(0.4 * (1 + math.cos(math.pi * 31 / 32)))
    constant = small(lr="0.8", schedule="constant").train
    assert {learning_rate(constant, u, 4) for u in range(8)} == {0.8}


def test_averaged_weights():
    model = torch.nn.BatchNorm1d(2)
    average = AveragedWeights(model, 0.5)
    with torch.no_grad():
        model.weight.fill_(3.0)
        model.running_mean.fill_(4.0)
        model.num_batches_tracked.fill_(7)
    average.update(model, 0)
    # d_0 = 1/10
    torch.testing.assert_close(average.model.weight, torch.full((2,), 0.1 * 1 + 0.9 * 3))
    torch.testing.assert_close(average.model.running_mean, torch.full((2,), 0.9 * 4))
    assert average.model.num_batches_tracked == 7
    average.update(model, 1000)
    torch.testing.assert_close(average.model.weight, torch.full((2,), 0.5 * 2.8 + 0.5 * 3))


def test_derived_seeds_differ():
    seeds = {derive_seed(s, what, e, i) for s in range(3) for what in ("a", "b") for e in range(3) for i in range(12)}
    assert len(seeds) == 3 * 2 * 3 * 12
    assert derive_seed(1, "a") == derive_seed(1, "a")
