"""A state dict that lies in several safetensors files."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

__all__ = ["ShardedStateDict"]


class ShardedStateDict(Mapping):
    """Tensor name → tensor, read from its file when it is asked for.

    Args:
        base_dir: the folder of the files.
        tensor_index: tensor name → file name, as in the index's ``weight_map``. A file outside the
            folder is a ValueError.
    """

    def __init__(self, base_dir: str | Path, tensor_index: Mapping[str, str]) -> None:
        self._base = Path(base_dir)
        self._index = dict(tensor_index)
        self._files: dict[str, Any] = {}
        for file in set(self._index.values()):
            if not file or Path(file).name != file:
                raise ValueError(
                    f"[quantal.models] expected a file name in the index, got '{file}'"
                )

    @classmethod
    def of_folder(cls, folder: str | Path, file: str) -> "ShardedStateDict | None":
        """What `file` in the folder holds or, where that is sharded, all of its shards. None where
        there is neither."""
        from safetensors import safe_open

        folder = Path(folder)
        index = folder / f"{file}.index.json"
        if index.is_file():
            return cls(folder, json.loads(index.read_text("utf-8"))["weight_map"])
        if not (folder / file).is_file():
            return None
        with safe_open(str(folder / file), framework="pt") as opened:
            return cls(folder, dict.fromkeys(opened.keys(), file))

    def __getitem__(self, key: str) -> torch.Tensor:
        from safetensors import safe_open

        file = self._index[key]
        if file not in self._files:
            self._files[file] = safe_open(str(self._base / file), framework="pt")
        return self._files[file].get_tensor(key)

    def __iter__(self) -> Iterator[str]:
        return iter(self._index)

    def __len__(self) -> int:
        return len(self._index)

    def __contains__(self, key: object) -> bool:
        return key in self._index
