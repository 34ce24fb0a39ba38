"""Several processes, and weights that live elsewhere: DDP, FSDP2, calibration over ranks,
accelerate's offload."""

import copy
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import quantal
import torch
from quantized import QTYPES
from safetensors.torch import save_file
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
        dist.barrier()  # no one leaves while another still talks to it
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
            # Gloo cannot broadcast float8 codes ("Invalid scalar type"): processes must start from
            # the same ones.
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
    _float8_codes_left_out()
    for weights in ("qint4", "qfloat8_e5m2"):
        _calibrate_and_train(rank, weights)


def _float8_codes_left_out() -> None:
    """What docs/python.md says of them."""
    model = make("qfloat8", "frozen")
    ddp = nn.parallel.DistributedDataParallel
    with pytest.raises(RuntimeError, match="Invalid scalar type"):
        ddp(model)
    codes = [name for name, p in model.named_parameters() if p.dtype == torch.float8_e4m3fn]
    assert codes == ["0.weight._data", "3.weight._data"]
    ddp._set_params_and_buffers_to_ignore_for_model(model, codes)
    assert torch.equal(ddp(model)(batch()), make("qfloat8", "frozen")(batch()))


def _calibrate_and_train(rank: int, weights: str) -> None:
    """Quantization-aware training: what ranks found, trained and froze is the same on all."""
    model = make(weights, "live", "qint8")
    with torch.no_grad(), quantal.Calibration(model, group=dist.group.WORLD):
        model(batch(rank))
    assert all(model[i].input_scale != 1 for i in (0, 3))
    parallel = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    start, losses = copy.deepcopy(model.state_dict()), []
    for _ in range(5):
        optimizer.zero_grad()
        loss = parallel(batch(rank)).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert not torch.equal(model[0].weight, start["0.weight"])
    _assert_same_on_ranks(model.state_dict())
    live = model(batch()).detach()
    quantal.freeze(model)
    _assert_same_on_ranks(model.state_dict() | {"output": model(batch()).detach()})
    assert torch.equal(model(batch()), live)


def _assert_same_on_ranks(tensors: dict[str, torch.Tensor]) -> None:
    found: list = [None] * WORLD
    bytes_of = {
        name: (str(t.dtype), t.contiguous().reshape(-1).view(torch.uint8).tolist())
        for name, t in tensors.items()
    }
    dist.all_gather_object(found, bytes_of)
    for other in found:
        assert other == bytes_of


def test_ddp() -> None:
    """Gradients are those of one process; ranks stay equal."""
    on_every_rank(_ddp)


def _sharded(model: nn.Sequential) -> nn.Sequential:
    from torch.distributed.fsdp import fully_shard

    for layer in (model[0], model[3]):
        fully_shard(layer)
    return fully_shard(model)


def _fsdp(rank: int) -> None:
    from torch.distributed.tensor import DTensor

    for qtype in QTYPES:
        for state in ("live", "frozen"):
            alone, model = make(qtype, state), _sharded(make(qtype, state))
            assert all(isinstance(p, DTensor) for p in model.parameters())
            # Before a forward, after which the root's parameters are whole for a while.
            optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-2) for m in (alone, model)]
            with torch.no_grad():
                assert torch.equal(model(batch()), alone(batch()))
            for _ in range(2):
                alone(batch()).square().mean().backward()
                model(batch(rank)).square().mean().backward()
                for one, two in zip(alone.parameters(), model.parameters(), strict=True):
                    assert isinstance(two, DTensor)
                    if one.requires_grad:
                        got = two.grad.full_tensor()
                        torch.testing.assert_close(got, one.grad, rtol=1e-4, atol=1e-6)
                        # Where gradients are near zero, Adam's first steps go by their signs.
                        one.grad = got
                for optimizer in optimizers:
                    optimizer.step()
                    optimizer.zero_grad()
                for one, two in zip(alone.parameters(), model.parameters(), strict=True):
                    if one.requires_grad:
                        torch.testing.assert_close(two.full_tensor(), one, rtol=1e-5, atol=1e-6)
            _shards_are_saved(qtype, state, model)


def _shards_are_saved(qtype: str, state: str, model: nn.Sequential) -> None:
    """With torch.distributed.checkpoint: what ranks wrote, other shards and whole models read; and
    a whole state_dict fills shards."""
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    folders = [tempfile.mkdtemp()]
    dist.broadcast_object_list(folders)
    checkpoint.save(model.state_dict(), checkpoint_id=folders[0])
    expected = model(batch())
    whole = _empty(qtype, state)
    for again in (_sharded(_empty(qtype, state)), whole):
        tensors = again.state_dict()
        checkpoint.load(tensors, checkpoint_id=folders[0])
        again.load_state_dict(tensors)
        assert torch.equal(again(batch()), expected)
    if state == "live" or not quantal.qtypes[qtype].is_floating_point:  # Gloo again
        again = _sharded(_empty(qtype, state).to("meta")).to_empty(device="cpu")
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        set_model_state_dict(again, whole.state_dict(), options=options)
        assert torch.equal(again(batch()), expected)
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(folders[0])


def _empty(qtype: str, state: str) -> nn.Sequential:
    model = make(qtype, state)
    for parameter in model.parameters():
        parameter.data.zero_()
    return model


def test_fsdp() -> None:
    on_every_rank(_fsdp)


def _calibrate(rank: int) -> None:
    model, alone = make("qint8", "live", "qint8"), make("qint8", "live", "qint8")
    scales = []
    for part in range(WORLD):
        each = copy.deepcopy(alone)
        with torch.no_grad(), quantal.Calibration(each, streamline=False):
            each(batch(part))
        scales.append(_scales(each))
    expected = [max(pair) for pair in zip(*scales, strict=True)]
    group = dist.group.WORLD
    with torch.no_grad(), quantal.Calibration(model, streamline=False, group=group):
        model(batch(rank))
    assert _scales(model) == expected
    assert 1 not in expected
    # A rank without samples gets what the others found.
    idle = make("qint8", "live", "qint8")
    with torch.no_grad(), quantal.Calibration(idle, group=group):
        if rank == 0:
            idle(batch(0))
    of_first = copy.deepcopy(alone)
    with torch.no_grad(), quantal.Calibration(of_first):
        of_first(batch(0))
    assert _scales(idle) == _scales(of_first)
    assert torch.equal(idle(batch()), of_first(batch()))
    _ranks_get_scales(rank)


def _scales(model: nn.Sequential) -> list[float]:
    """Of inputs and outputs."""
    layers = (model[0], model[2], model[3])
    return [scale.item() for m in layers for scale in (m.input_scale, m.output_scale)]


def _ranks_get_scales(rank: int) -> None:
    """DDP sends those of rank 0, which alone was calibrated, and the others use them."""
    model, calibrated = (make("qint8", "frozen", "qint8") for _ in range(2))
    with torch.no_grad(), quantal.Calibration(calibrated):
        calibrated(batch())
    model = calibrated if rank == 0 else model
    parallel = nn.parallel.DistributedDataParallel(model).eval()
    assert _scales(model) == _scales(calibrated)
    assert torch.equal(parallel(batch()), calibrated(batch()))


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


@pytest.mark.parametrize("activations", [None, "qint8", "dynamic-qint8"])
@pytest.mark.parametrize("qtype", QTYPES)
def test_checkpoint_is_loaded_and_dispatched(
    qtype: str, activations: str | None, tmp_path: Path
) -> None:
    """By accelerate, tensor by tensor, to memory and disk."""
    accelerate = pytest.importorskip("accelerate")
    model = make(qtype, "frozen", activations)
    if activations == "qint8":
        with torch.no_grad(), quantal.Calibration(model):
            model(batch())
    save_file(model.state_dict(), tmp_path / "model.safetensors", {"format": "pt"})
    with torch.no_grad():
        expected = model(batch())
    partly = {"0": "disk", "1": "cpu", "2": "cpu", "3": "disk"}
    for device_map in ({"": "cpu"}, partly):
        with accelerate.init_empty_weights():
            empty = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.LayerNorm(32), nn.Linear(32, 16))
        quantal.quantize(empty, weights=qtype, activations=activations)
        quantal.freeze(empty)
        accelerate.load_checkpoint_and_dispatch(
            empty,
            checkpoint=str(tmp_path / "model.safetensors"),
            device_map=device_map,
            offload_folder=str(tmp_path / "offloaded"),
            offload_buffers=device_map == partly,
        )
        assert next(empty[3].parameters()).is_meta == (device_map == partly)
        with torch.no_grad():
            for _ in range(2):
                output = empty(batch())
                assert type(output) is type(expected)  # quantized, or floats
                assert torch.equal(output.dequantize(), expected.dequantize())
