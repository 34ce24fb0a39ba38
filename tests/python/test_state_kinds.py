"""Models with more than weights of linears are ordinary modules, too: quantized activations,
embeddings, transposed convolutions, parameters of three dimensions. One suite for every qtype."""

import copy
import io
import pickle
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import quantal
import torch
from quantized import QTYPES
from safetensors.torch import load as load_bytes
from safetensors.torch import save as save_bytes
from test_checkpoint_exchange import assert_same_bits
from test_distributed import WORLD, on_every_rank
from torch import nn

STATES = ("frozen", "live")


class Linears(nn.Module):
    """The first hands codes on to the second, where activations are calibrated."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(64, 32)
        self.second = nn.Linear(32, 32)
        self.norm = nn.LayerNorm(32)
        self.third = nn.Linear(32, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.third(self.norm(self.second(torch.relu(self.first(x)))))


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(12, 64, padding_idx=2)
        self.head = nn.Linear(64, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.table(x)))


class Upwards(nn.Module):
    """Convolutions in one and two dimensions, transposed and not."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(2, 6, 3, stride=2)
        self.up = nn.ConvTranspose2d(6, 4, 3, stride=2, groups=2)
        self.line = nn.ConvTranspose1d(4, 3, 3, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.line(self.up(torch.relu(self.down(x))).flatten(2))


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up_proj = nn.Parameter(torch.randn(3, 32, 64) / 8)
        self.down_proj = nn.Parameter(torch.randn(3, 64, 32) / 8)
        self.bias = nn.Parameter(torch.zeros(3, 32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        each = [
            nn.functional.linear(
                torch.tanh(nn.functional.linear(x, self.up_proj[i]) + self.bias[i]),
                self.down_proj[i],
            )
            for i in range(3)
        ]
        return torch.stack(each).sum(0)


class Mixture(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = Experts()
        self.head = nn.Linear(64, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.experts(x))


def _random(*shape: int) -> Callable[[], torch.Tensor]:
    return lambda: torch.randn(shape, generator=torch.Generator().manual_seed(3))


@dataclass(frozen=True)
class Kind:
    """A model, an input of it, and how it is quantized beside its weights."""

    model: Callable[[], nn.Module]
    input: Callable[[], torch.Tensor]
    how: dict[str, str] = field(default_factory=dict)


KINDS = {
    "calibrated": Kind(Linears, _random(6, 64), {"activations": "qint8"}),
    "calibrated float8": Kind(Linears, _random(6, 64), {"activations": "qfloat8"}),
    "dynamic": Kind(Linears, _random(6, 64), {"activations": "dynamic-qint8"}),
    "embedding": Kind(Tokens, lambda: torch.tensor([[1, 2, 11, 0], [5, 5, 2, 7]])),
    "convolutions": Kind(Upwards, _random(4, 2, 7, 7), {"activations": "qint8"}),
    "experts": Kind(Mixture, _random(6, 64), {"parameters": "*_proj"}),
}
FORMS = [(kind, qtype, state) for kind in KINDS for qtype in QTYPES for state in STATES]
every_form = pytest.mark.parametrize(("kind", "qtype", "state"), FORMS)
every_frozen = pytest.mark.parametrize(("kind", "qtype"), [(k, q) for k in KINDS for q in QTYPES])


def data(kind: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    x = KINDS[kind].input()
    return x.to(dtype) if x.is_floating_point() else x


def is_calibrated(kind: str) -> bool:
    return KINDS[kind].how.get("activations") in ("qint8", "qfloat8")


def make(kind: str, qtype: str, state: str = "frozen", *, calibrate: bool = True) -> nn.Module:
    torch.manual_seed(2)
    model = KINDS[kind].model()
    quantal.quantize(model, weights=qtype, **KINDS[kind].how)
    if calibrate and is_calibrated(kind):
        with torch.no_grad(), quantal.Calibration(model):
            model(data(kind))
    if state == "frozen":
        quantal.freeze(model)
    return model


def assert_same_model(actual: nn.Module, expected: nn.Module, kind: str) -> None:
    """The same tensors under the same keys, and the same results."""
    states = actual.state_dict(), expected.state_dict()
    assert list(states[0]) == list(states[1])
    for name, tensor in states[1].items():
        assert_same_bits(states[0][name], tensor, name)
    assert torch.equal(actual(data(kind)), expected(data(kind)))
    for one, two in zip(actual.parameters(), expected.parameters(), strict=True):
        assert (type(one), one.requires_grad) == (type(two), two.requires_grad)


@every_frozen
def test_what_is_quantized(kind: str, qtype: str) -> None:
    """So that the tests below test what they say."""
    model = make(kind, qtype)
    modules = [m for m in model.modules() if isinstance(m, quantal.QModuleMixin)]
    weights = [m for m in model.modules() if isinstance(m, quantal.QWeight)]
    count = {"Linears": 3, "Tokens": 2, "Upwards": 3, "Mixture": 3}[type(model).__name__]
    assert [w.qtype.name for w in weights] == [qtype] * count
    assert any(isinstance(w, quantal.QParameter) for w in weights) == (kind == "experts")
    calibrated = [m for m in modules if m.weight_qtype is not None and m.input_scale != 1]
    assert len(calibrated) == (3 if is_calibrated(kind) else 0)
    if is_calibrated(kind) and kind != "convolutions":
        assert isinstance(model.first(data(kind)), quantal.ActivationQBytesTensor)
    plain = make(kind, qtype, calibrate=False)
    assert torch.equal(model(data(kind)), plain(data(kind))) != is_calibrated(kind)


# ---- state_dict


@every_form
def test_torch_save_and_safetensors(kind: str, qtype: str, state: str) -> None:
    """Into models that were made without the samples of the first."""
    model, file = make(kind, qtype, state), io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    assert all(type(tensor) is torch.Tensor for tensor in model.state_dict().values())
    loaded = torch.load(file, weights_only=True)
    for tensors in (loaded, load_bytes(save_bytes(model.state_dict()))):
        for assign in (False, True):
            again = make(kind, qtype, state, calibrate=False)
            for parameter in again.parameters():
                parameter.data.zero_()
            again.load_state_dict(tensors, assign=assign)
            assert_same_model(again, model, kind)


@every_frozen
def test_frozen_state_freezes_a_live_model(kind: str, qtype: str) -> None:
    model = make(kind, qtype)
    for assign in (False, True):
        live = make(kind, qtype, "live", calibrate=False)
        live.load_state_dict(model.state_dict(), assign=assign)
        assert_same_model(live, model, kind)


@every_frozen
def test_load_state_dict_is_strict(kind: str, qtype: str) -> None:
    model = make(kind, qtype)
    good = model.state_dict()
    for key in good:
        state = {name: tensor for name, tensor in good.items() if name != key}
        with pytest.raises(RuntimeError, match=f'Missing key.*"{key}'):
            model.load_state_dict(state)
        with pytest.raises(RuntimeError, match=f"size mismatch for {key}"):
            model.load_state_dict(state | {key: torch.zeros(3, 3, 3, 3, dtype=good[key].dtype)})
    for name, tensor in model.state_dict().items():
        assert_same_bits(tensor, good[name], name)


# ---- copies


@every_form
def test_deepcopy_and_pickle(kind: str, qtype: str, state: str) -> None:
    model, file = make(kind, qtype, state), io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for copied in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(file, weights_only=False),
    ):
        assert_same_model(copied, model, kind)
        tensors = [*copied.parameters(), *copied.buffers()]
        own = {t.data_ptr() for t in tensors}
        assert own.isdisjoint(t.data_ptr() for t in [*model.parameters(), *model.buffers()])
        # Hooks that quantize belong to the copy.
        if is_calibrated(kind):
            with torch.no_grad(), quantal.Calibration(copied):
                copied(data(kind) * 3)
            assert copied.state_dict().keys() == model.state_dict().keys()
            assert not torch.equal(copied(data(kind)), model(data(kind)))
    assert_same_model(model, make(kind, qtype, state), kind)


#: Bits of a number, and the method. test_state.py has fp64.
DTYPES = {torch.float16: (11, "half"), torch.bfloat16: (8, "bfloat16")}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@every_form
def test_to_another_dtype(kind: str, qtype: str, state: str, dtype: torch.dtype) -> None:
    """Codes stay; scales, biases and what is computed change."""
    model, before = make(kind, qtype, state).to(dtype), make(kind, qtype, state)
    for name, tensor in before.state_dict().items():
        after = model.state_dict()[name]
        if name.endswith("_data"):
            assert_same_bits(after, tensor, name)
        elif name.endswith(("_scale", "_shift")):  # fp32 where fp16 has no such number
            assert after.dtype in (dtype, torch.float32), name
        else:
            assert after.dtype == dtype, name
    bits, method = DTYPES[dtype]
    output, expected = model(data(kind, dtype)), before(data(kind))
    assert output.dtype == dtype
    same = getattr(make(kind, qtype, state), method)()
    assert torch.equal(same(data(kind, dtype)), output)
    error = (output.double() - expected.double()).norm() / expected.double().norm()
    assert error < rounding_noise(kind, qtype, state, bits)


def rounding_noise(kind: str, qtype: str, state: str, bits: int) -> float:
    """Relative: of a few roundings to numbers of `bits`, and of codes that they push over a step:
    activations', and those of live weights, of which one in (step / rounding) gets another."""
    noise = 8 * 2.0**-bits
    if KINDS[kind].how.get("activations"):
        noise += 0.06 if kind == "calibrated float8" else 0.02
    if state == "live":
        chosen = quantal.qtypes[qtype]
        is_float8 = chosen.is_floating_point
        # Of a number; or of numbers that span eight deviations.
        step = torch.finfo(chosen.dtype).eps if is_float8 else 8 * 2.0**-chosen.bits
        noise += 2 * (2.0**-bits * step) ** 0.5
    return noise


@every_form
def test_meta_and_back(kind: str, qtype: str, state: str) -> None:
    model = make(kind, qtype, state)
    meta = copy.deepcopy(model).to("meta")
    assert all(t.is_meta for t in meta.state_dict().values())
    empty = meta.to_empty(device="cpu")
    empty.load_state_dict(model.state_dict())
    assert_same_model(empty, model, kind)
    assigned = make(kind, qtype, state, calibrate=False).to("meta")
    assigned.load_state_dict(model.state_dict(), assign=True)
    assert_same_model(assigned, model, kind)


# ---- processes


class AllOf(nn.Module):
    """A model of each form; their outputs as one list of numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.models = nn.ModuleDict({"/".join(form): make(*form) for form in FORMS})

    @torch.no_grad()
    def forward(self) -> torch.Tensor:
        names = self.models.items()
        return torch.cat([model(data(name.split("/")[0])).flatten() for name, model in names])


def _send_output(model: AllOf, queue: object) -> None:
    torch.set_num_threads(1)
    queue.put(model().tolist())
    for name, buffer in model.named_buffers():
        if name.endswith("input_scale"):
            buffer.fill_(7)


def test_shared_memory_and_processes() -> None:
    """What a process writes to scales of activations arrives here."""
    context = torch.multiprocessing.get_context("spawn")
    model = AllOf().share_memory()
    assert all(t.is_shared() for t in [*model.parameters(), *model.buffers()])
    expected, queue = model(), context.SimpleQueue()
    process = context.Process(target=_send_output, args=(model, queue))
    process.start()
    got = torch.tensor(queue.get())
    process.join()
    assert process.exitcode == 0
    assert torch.equal(got, expected)
    assert all(b == 7 for name, b in model.named_buffers() if name.endswith("input_scale"))


class Outputs(torch.utils.data.Dataset):
    """Samples that quantized models compute."""

    def __init__(self) -> None:
        self.models = AllOf()

    def __len__(self) -> int:
        return 2

    def __getitem__(self, i: int) -> torch.Tensor:
        return self.models() * i


def test_data_loader_workers() -> None:
    outputs = Outputs()
    got = torch.cat(list(torch.utils.data.DataLoader(outputs, num_workers=2)))
    assert torch.equal(got, torch.stack([outputs[0], outputs[1]]))


# ---- modes


@every_form
def test_grad_modes(kind: str, qtype: str, state: str) -> None:
    model = make(kind, qtype, state)
    expected = model(data(kind))
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(model(data(kind)), expected)
            inside = make(kind, qtype, state)  # made, calibrated and frozen inside
            assert torch.equal(inside(data(kind)), expected)
            assert torch.equal(copy.deepcopy(inside)(data(kind)), expected)
    assert expected.requires_grad


@every_form
def test_autocast(kind: str, qtype: str, state: str) -> None:
    model = make(kind, qtype, state)
    expected = model(data(kind))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(data(kind))
        output.float().square().sum().backward()
    assert output.dtype == torch.bfloat16
    trained = [p for p in model.parameters() if p.requires_grad]
    assert trained
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in trained)
    error = (output.float() - expected).norm() / expected.norm()
    assert error < rounding_noise(kind, qtype, "frozen", 7)


# ---- several processes


def _parallel(rank: int) -> None:
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    for kind, qtype, state in FORMS:
        if state == "live" and qtype not in ("qint4", "qint8", "qfloat8_e5m2"):
            continue  # what is sent and sharded are floats
        alone, model, sharded = (make(kind, qtype, state) for _ in range(3))
        syncs = state == "live" or not quantal.qtypes[qtype].is_floating_point
        parallel = nn.parallel.DistributedDataParallel(model, init_sync=syncs)
        for layer in sharded.children():
            fully_shard(layer)
        fully_shard(sharded)
        assert all(isinstance(p, DTensor) for p in sharded.parameters())
        x = data(kind)
        with torch.no_grad():
            assert torch.equal(sharded(x), alone(x))
        # Every rank has half of a batch; run-time scales are those of a token or a sample.
        alone(x).square().mean().backward()
        for run in (parallel, sharded):
            run(x.chunk(WORLD)[rank]).square().mean().backward()
        for one, *others in zip(*(m.parameters() for m in (alone, model, sharded)), strict=True):
            if one.requires_grad:
                grads = others[0].grad, others[1].grad.full_tensor()
                for grad in grads:
                    torch.testing.assert_close(grad, one.grad, rtol=1e-4, atol=1e-5)


def test_ddp_and_fsdp_gradients_are_those_of_one_process() -> None:
    on_every_rank(_parallel)


# ---- accelerate


@every_form
def test_offload(kind: str, qtype: str, state: str, tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    model, on_disk = make(kind, qtype, state), make(kind, qtype, state)
    with torch.no_grad():
        expected = model(data(kind))
    accelerate.cpu_offload(model, execution_device="cpu")
    accelerate.disk_offload(on_disk, str(tmp_path), execution_device="cpu")
    for offloaded in (model, on_disk):
        assert all(p.is_meta for p in offloaded.parameters())
        for _ in range(2):
            with torch.no_grad():
                assert torch.equal(offloaded(data(kind)), expected)


@every_frozen
def test_tensors_set_one_by_one(kind: str, qtype: str) -> None:
    """As a loader that streams a checkpoint does."""
    accelerate = pytest.importorskip("accelerate")
    utils = pytest.importorskip("accelerate.utils")
    model = make(kind, qtype)
    with accelerate.init_empty_weights():
        empty = KINDS[kind].model()
    quantal.quantize(empty, weights=qtype, **KINDS[kind].how)
    quantal.freeze(empty)
    for name, tensor in model.state_dict().items():
        utils.set_module_tensor_to_device(empty, name, "cpu", tensor)
    empty.eval()  # scales that were put behind a module's back count from here on
    assert not any(t.is_meta for t in empty.state_dict().values())
    assert torch.equal(empty(data(kind)), model(data(kind)))
