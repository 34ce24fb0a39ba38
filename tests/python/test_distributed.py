"""Several processes, and weights that live elsewhere: DDP, FSDP2, calibration over ranks,
accelerate's offload."""

import copy
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import quantal
import torch
from quantized import QTYPES
from torch import distributed as dist
from torch import nn

WORLD = 2


def make(qtype: str, state: str, activations: str | None = None) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.LayerNorm(32), nn.Linear(32, 16))
    quantal.quantize(model, weights=qtype, activations=activations)
    if state == "frozen":
        quantal.freeze(model)
    return model


def batch(rank: int | None = None) -> torch.Tensor:
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(1))
    return x if rank is None else x.chunk(WORLD)[rank]


def _run(rank: int, work: Callable[[int], None], folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD
    )
    try:
        work(rank)
    finally:
        dist.destroy_process_group()


def on_every_rank(work: Callable[[int], None]) -> None:
    """Runs `work` in processes of its own; an assertion that fails in one fails here."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_run, (work, folder), nprocs=WORLD)


def _ddp(rank: int) -> None:
    for qtype in QTYPES:
        for state in ("live", "frozen"):
            alone, model = make(qtype, state), make(qtype, state)
            # Gloo cannot broadcast float8 codes: processes must start from the same ones.
            syncs = state == "live" or not quantal.qtypes[qtype].is_floating_point
            parallel = nn.parallel.DistributedDataParallel(model, init_sync=syncs)
            optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (alone, model)]
            for _ in range(2):
                alone(batch()).square().mean().backward()
                parallel(batch(rank)).square().mean().backward()
                for one, two in zip(alone.parameters(), model.parameters(), strict=True):
                    if one.requires_grad:
                        torch.testing.assert_close(two.grad, one.grad, rtol=1e-4, atol=1e-6)
                for optimizer in optimizers:
                    optimizer.step()
                    optimizer.zero_grad()


def test_ddp_gradients_are_those_of_one_process() -> None:
    on_every_rank(_ddp)


def _fsdp(rank: int) -> None:
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    for qtype in QTYPES:
        for state in ("live", "frozen"):
            alone, model = make(qtype, state), make(qtype, state)
            for layer in (model[0], model[3]):
                fully_shard(layer)
            fully_shard(model)
            assert all(isinstance(p, DTensor) for p in model.parameters())
            with torch.no_grad():
                assert torch.equal(model(batch()), alone(batch()))
            alone(batch()).square().mean().backward()
            model(batch(rank)).square().mean().backward()
            for one, two in zip(alone.parameters(), model.parameters(), strict=True):
                if one.requires_grad:
                    got = two.grad.full_tensor()
                    torch.testing.assert_close(got, one.grad, rtol=1e-4, atol=1e-6)


def test_fsdp() -> None:
    on_every_rank(_fsdp)


def _calibrate(rank: int) -> None:
    model, alone = make("qint8", "live", "qint8"), make("qint8", "live", "qint8")
    scales = []
    for part in range(WORLD):
        each = copy.deepcopy(alone)
        with torch.no_grad(), quantal.Calibration(each, streamline=False):
            each(batch(part))
        scales.append([m.input_scale.item() for m in (each[0], each[3])])
    expected = [max(pair) for pair in zip(*scales, strict=True)]
    group = dist.group.WORLD
    with torch.no_grad(), quantal.Calibration(model, streamline=False, group=group):
        model(batch(rank))
    assert [m.input_scale.item() for m in (model[0], model[3])] == expected
    # A rank without samples gets what the others found.
    idle = make("qint8", "live", "qint8")
    with torch.no_grad(), quantal.Calibration(idle, group=group):
        if rank == 0:
            idle(batch(0))
    assert [m.input_scale.item() for m in (idle[0], idle[3])] == scales[0]


def test_calibration_over_ranks() -> None:
    on_every_rank(_calibrate)


def test_a_group_calibrates_one_model() -> None:
    with pytest.raises(ValueError, match="expected the model"):
        quantal.Calibration(group=object())


# ---- accelerate

OFFLOADS = ("cpu_offload", "disk_offload", "dispatch_model")


@pytest.mark.parametrize("how", OFFLOADS)
@pytest.mark.parametrize("state", ["frozen", "live"])
@pytest.mark.parametrize("qtype", QTYPES)
def test_offload(qtype: str, state: str, how: str, tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    model = make(qtype, state)
    with torch.no_grad():
        expected = model(batch())
    if how == "cpu_offload":
        accelerate.cpu_offload(model, execution_device="cpu")
    elif how == "disk_offload":
        accelerate.disk_offload(model, str(tmp_path), execution_device="cpu")
    else:
        accelerate.dispatch_model(
            model,
            {"0": "cpu", "1": "cpu", "2": "cpu", "3": "disk"},
            main_device="cpu",
            offload_dir=str(tmp_path),
            force_hooks=True,
        )
    for _ in range(2):
        assert next(model[3].parameters()).is_meta
        with torch.no_grad():
            assert torch.equal(model(batch()), expected)
    assert how == "cpu_offload" or os.listdir(tmp_path)


@pytest.mark.parametrize("qtype", QTYPES)
def test_tensors_set_one_by_one(qtype: str) -> None:
    """As a loader that streams a checkpoint does."""
    accelerate = pytest.importorskip("accelerate")
    utils = pytest.importorskip("accelerate.utils")
    model = make(qtype, "frozen")
    with accelerate.init_empty_weights():
        empty = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.LayerNorm(32), nn.Linear(32, 16))
    quantal.quantize(empty, weights=qtype)
    quantal.freeze(empty)
    for name, tensor in model.state_dict().items():
        utils.set_module_tensor_to_device(empty, name, "cpu", tensor)
    assert not any(t.is_meta for t in empty.state_dict().values())
    assert torch.equal(empty(batch()), model(batch()))
    # Floats first, frozen afterwards.
    with accelerate.init_empty_weights():
        empty = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.LayerNorm(32), nn.Linear(32, 16))
    quantal.quantize(empty, weights=qtype)
    for name, tensor in make(qtype, "live").state_dict().items():
        utils.set_module_tensor_to_device(empty, name, "cpu", tensor)
    quantal.freeze(empty)
    assert torch.equal(empty(batch()), model(batch()))
