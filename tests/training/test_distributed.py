"""Gradients of lean units where several processes, or several micro-batches, share one update."""

import datetime
import os

import pytest
import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from spikefit.layers import GlobalAveragePool, Readout, ResidualBlock, SpikingConv2d
from spikefit.models import SpikingNetwork

STRATEGIES = ["bptt", "lean:input", "lean:spikes"]
SECONDS = 60


def network(strategy, norm="ws"):
    torch.manual_seed(0)
    options = {"norm": norm, "neuron": {"name": "lif", "v_threshold": 0.5}}
    blocks = [SpikingConv2d(2, 6, pool="max", **options), ResidualBlock(6, 8, **options), GlobalAveragePool()]
    return SpikingNetwork([*blocks, Readout(8, 3)], input_shape=(2, 8, 8), strategy=strategy)


def batch():
    torch.manual_seed(1)
    return 2 * torch.randn(3, 8, 2, 8, 8), torch.arange(8) % 3


def loss_of(model, x, y):
    return torch.nn.functional.cross_entropy(model(x).mean(0), y)


def gradients(model):
    return {name.removeprefix("module."): p.grad.clone() for name, p in model.named_parameters()}


def work(rank, folder):
    """One of two processes: a half of the batch under every strategy, in one piece and in two."""
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meeting",
        rank=rank,
        world_size=2,
        timeout=datetime.timedelta(seconds=SECONDS),
    )
    x, y = batch()
    mine = slice(4 * rank, 4 * rank + 4)
    found = {}
    for strategy in STRATEGIES:
        model = DistributedDataParallel(network(strategy))
        loss_of(model, x[:, mine], y[mine]).backward()
        found[strategy, "whole"] = gradients(model)
        model.zero_grad()
        for i in range(2):
            piece = slice(mine.start + 2 * i, mine.start + 2 * i + 2)
            model.require_backward_grad_sync = i == 1
            (loss_of(model, x[:, piece], y[piece]) / 2).backward()
        found[strategy, "pieces"] = gradients(model)
    torch.save(found, os.path.join(folder, f"{rank}.pt"))
    distributed.destroy_process_group()


def run_two_processes(folder):
    """What `work` found in each process."""
    context = torch.multiprocessing.spawn(work, (str(folder),), nprocs=2, join=False)
    try:
        assert context.join(timeout=SECONDS) or context.join(timeout=SECONDS), "the processes did not end"
    finally:
        for process in context.processes:
            process.kill()
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def test_two_processes_have_the_gradients_of_one(tmp_path):
    found = run_two_processes(tmp_path)
    x, y = batch()
    for strategy in STRATEGIES:
        model = network(strategy)
        loss_of(model, x, y).backward()
        for rank in found:
            for pieces in ("whole", "pieces"):
                for name, wanted in gradients(model).items():
                    assert wanted.abs().max() > 0, name
                    torch.testing.assert_close(
                        rank[strategy, pieces][name],
                        wanted,
                        rtol=1e-5,
                        atol=1e-5,
                        msg=lambda m, n=name, s=strategy: f"{s}, {n}: {m}",
                    )
    for name, value in found[0]["lean:spikes", "whole"].items():
        assert torch.equal(value, found[1]["lean:spikes", "whole"][name]), name


@pytest.mark.parametrize("norm", ["bn", "step_bn", "ws"])
@pytest.mark.parametrize("strategy", STRATEGIES[1:])
def test_accumulated_gradients_are_those_of_bptt(strategy, norm):
    x, y = batch()
    results = []
    for choice in ("bptt", strategy):
        model = network(choice, norm).double()
        for piece in (slice(0, 5), slice(5, 8)):
            (loss_of(model, x[:, piece].double(), y[piece]) / 2).backward()
        results.append(gradients(model) | dict(model.named_buffers()))
    for name, wanted in results[0].items():
        torch.testing.assert_close(results[1][name], wanted, rtol=1e-6, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")
