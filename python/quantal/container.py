"""safetensors files: one, the shards of an index, or what a folder has."""

import json
import os
import secrets
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

__all__ = ["NAMES", "Container", "write_container"]

#: What safetensors calls the dtypes.
NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
    torch.complex64: "C64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class Container:
    """The tensors and metadata of a checkpoint; memory is mapped, not read."""

    def __init__(self, path: Path, verb: str) -> None:
        self.path = path
        self.verb = verb
        self.tensors: dict[str, torch.Tensor] = {}
        self.metadata: dict[str, str] = {}

    def error(self, text: str) -> ValueError:
        """A ValueError that names the file."""
        return ValueError(f"[quantal.{self.verb}] '{self.path}': {text}")

    @classmethod
    def open(cls, path: str | os.PathLike, verb: str) -> "Container":
        """A safetensors file, an index of shards, or a folder with one of them. ValueError for
        what is no such file, FileNotFoundError where there is none."""
        found = cls(_file_of(Path(path)), verb)
        if not found.path.exists():
            raise FileNotFoundError(f"[quantal.{verb}] no file '{found.path}'")
        if found.path.name.endswith(".index.json"):
            for shard in found._shards():
                found._add(found.path.parent / shard)
        else:
            found._add(found.path)
        return found

    def _shards(self) -> list[str]:
        try:
            names = set(json.loads(self.path.read_text("utf-8"))["weight_map"].values())
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise self.error("expected an index of shards with a 'weight_map'") from error
        for name in names:
            if not isinstance(name, str) or Path(name).name != name or name in (".", ".."):
                raise self.error(f"expected names of files beside it, got '{name}'")
        return sorted(names)

    def _add(self, path: Path) -> None:
        try:
            with safe_open(path, "pt") as file:
                self.metadata |= file.metadata() or {}
                for key in file.keys():  # noqa: SIM118  (no mapping)
                    if key in self.tensors:
                        raise self.error(f"tensor '{key}' is in two shards")
                    self.tensors[key] = file.get_tensor(key)
        except (SafetensorError, OSError) as error:
            raise self.error(f"'{path.name}' is not a whole safetensors file: {error}") from error


def _file_of(path: Path) -> Path:
    """What a folder has to load; a file itself."""
    if not path.is_dir():
        return path
    for name in ("model.safetensors", "model.safetensors.index.json"):
        if (path / name).exists():
            return path / name
    files = sorted(path.glob("*.safetensors"))
    if len(files) != 1:
        raise FileNotFoundError(
            f"[quantal] expected model.safetensors, its index or one safetensors file in '{path}', "
            f"got {len(files)} files"
        )
    return files[0]


def write_container(
    path: str | os.PathLike, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]
) -> None:
    """Replaces a file as a whole: what is written first has another name. Links are followed and
    permission bits kept; the same tensors give the same bytes."""
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f".{target.name}.quantal-{os.getpid()}-{secrets.token_hex(4)}.tmp")
    handle = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    try:
        mode = (target if target.exists() else temporary).stat().st_mode & 0o7777
        os.close(handle)
        save_file(_separate(tensors), temporary, dict(metadata))
        temporary.chmod(mode)
        _sort_metadata(temporary)
        temporary.replace(target)
    except BaseException:
        with suppress(FileNotFoundError):
            temporary.unlink()
        raise
    _sync(target.parent)


def _separate(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Dense tensors on the CPU that share no memory, as safetensors wants them."""
    seen: set[int] = set()
    made: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        plain = tensor.as_subclass(torch.Tensor).resolve_conj().resolve_neg().cpu().contiguous()
        storage = plain.untyped_storage().data_ptr()
        made[name] = plain.clone() if storage in seen else plain
        seen.add(storage)
    return made


def _sort_metadata(path: Path) -> None:
    """safetensors writes metadata in an order that differs from run to run."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode().ljust(size)
        if len(text) == size:
            file.seek(8)
            file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    with suppress(OSError):  # not every file system lets one
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
