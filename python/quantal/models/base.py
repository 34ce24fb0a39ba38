"""What quantized models of transformers and of diffusers share."""

import json
import os
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

import torch

from ..nn import QModuleMixin
from ..quantize import freeze, quantization_map, quantize, requantize
from .shared_dict import ShardedStateDict

__all__ = ["LazyClass", "QuantizedModel"]

#: What an uninstalled library's absence is told with.
_INSTALL = "[quantal.models] {} requires the {} library: pip install {}"


def require(library: str, what: str) -> Any:
    """The library; ImportError that says for what."""
    try:
        return import_module(library)
    except ModuleNotFoundError as error:
        if error.name != library:
            raise
        raise ImportError(_INSTALL.format(what, library, library)) from error


class LazyClass:
    """A class attribute that is a class of a library, imported when it is read."""

    def __init__(self, library: str, name: str) -> None:
        self.library, self.name = library, name

    def __get__(self, instance: Any, owner: type) -> type:
        return getattr(require(self.library, owner.__name__), self.name)


class QuantizedModel:
    """A frozen quantized model, with its saving and loading. Attributes that it lacks, and calls,
    are those of the model."""

    BASE_NAME = "quanto"
    #: The library of the models.
    library: ClassVar[str]
    #: The file of weights in a saved model's folder.
    weights_file: ClassVar[str]

    _quantize: Any = staticmethod(quantize)

    def __init__(self, model: torch.nn.Module) -> None:
        if not isinstance(model, self._model_class()) or not quantization_map(model):
            raise ValueError(f"The source model must be a quantized {self.library} model.")
        self._wrapped: Any = model

    @classmethod
    def _model_class(cls) -> type:
        """What every model of the library is an instance of."""
        raise NotImplementedError

    @classmethod
    def _empty_model(cls, folder: Path, source: Any, options: dict[str, Any]) -> torch.nn.Module:
        """The model of the folder's configuration, its parameters on the meta device."""
        raise NotImplementedError

    @classmethod
    def _qmap_name(cls) -> str:
        return f"{cls.BASE_NAME}_qmap.json"

    def __getattr__(self, name: str) -> Any:
        if name == "_wrapped":
            raise AttributeError(name)
        return getattr(self._wrapped, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the model, hooks included."""
        return self._wrapped(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward."""
        return self._wrapped.forward(*args, **kwargs)

    @classmethod
    def quantize(
        cls,
        model: torch.nn.Module,
        weights: Any = None,
        activations: Any = None,
        optimizer: Any = None,
        include: str | list[str] | None = None,
        exclude: str | list[str] | None = None,
        **kwargs: Any,
    ) -> "QuantizedModel":
        """Quantizes and freezes `model`, in place; the arguments are those of `quantal.quantize`,
        `group_size` and `parameters` too. To train it quantized, use that and `quantal.freeze`."""
        if not isinstance(model, cls._model_class()):
            raise ValueError(f"The source model must be a {cls.library} model.")
        cls._quantize(
            model,
            weights=weights,
            activations=activations,
            optimizer=optimizer,
            include=include,
            exclude=exclude,
            **kwargs,
        )
        freeze(model)
        return cls(model)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any
    ) -> "QuantizedModel":
        """Loads what `save_pretrained` wrote, of this library or of optimum-quanto.

        Args:
            pretrained_model_name_or_path: a folder, or a model on the Hugging Face hub.
            device_map: the device to load to, as "cuda:0" or {"": "cuda:0"}. Default: the CPU.
            kwargs: options of the download, as ``revision`` and ``token``; others are overrides of
                the configuration.

        Raises ValueError where files are missing, or do not fit the model.
        """
        device = _device(kwargs.pop("device_map", None))
        source = pretrained_model_name_or_path
        folder = _folder(source, kwargs)
        map_file = folder / cls._qmap_name()
        if not map_file.is_file():
            raise ValueError(f"No quantization map found in {source}: is this a quantized model ?")
        state_dict = ShardedStateDict.of_folder(folder, cls.weights_file)
        model = cls._empty_model(folder, source, kwargs)
        if state_dict is None:
            raise ValueError(f"No safetensor weights found in {source}.")
        ties = _ties(model)
        requantize(
            model,
            _with_tied(state_dict, ties),
            json.loads(map_file.read_text("utf-8")),
            device=device,
        )
        _tie(model, ties, state_dict)
        return cls(model.eval())

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        *,
        max_shard_size: int | str = "5GB",
        push_to_hub: bool = False,
        repo_id: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Writes configuration, weights and quantization map.

        Args:
            save_directory: made where it is missing.
            max_shard_size: no file of weights is larger (bytes, or "200MB"), but for a tensor that
                is.
            push_to_hub, repo_id, kwargs: whether and where to upload the folder (`push_to_hub`).
        """
        from huggingface_hub import save_torch_state_dict

        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        self._save_config(folder)
        save_torch_state_dict(
            self._wrapped.state_dict(),
            str(folder),
            filename_pattern=self.weights_file.replace(".safetensors", "{suffix}.safetensors"),
            max_shard_size=max_shard_size,
            metadata={"format": "pt"},
        )
        text = json.dumps(quantization_map(self._wrapped), indent=4)
        (folder / self._qmap_name()).write_text(text, "utf-8")
        if push_to_hub:
            _upload(folder, repo_id or folder.name, kwargs)
        elif kwargs:
            raise TypeError(f"[quantal.models] save_pretrained has no arguments {sorted(kwargs)}")

    def push_to_hub(
        self, repo_id: str, *, max_shard_size: int | str = "5GB", **kwargs: Any
    ) -> None:
        """Uploads the model. kwargs: ``token``, ``private``, ``revision``, ``commit_message``."""
        from tempfile import TemporaryDirectory

        with TemporaryDirectory() as folder:
            self.save_pretrained(folder, max_shard_size=max_shard_size)
            _upload(Path(folder), repo_id, kwargs)

    def _save_config(self, folder: Path) -> None:
        self._wrapped.config.save_pretrained(folder)


def _device(device_map: Any) -> torch.device:
    if isinstance(device_map, Mapping):
        if set(device_map) != {""}:
            raise ValueError(
                f"[quantal.models] expected a device_map of one device, got {dict(device_map)}"
            )
        device_map = device_map[""]
    if device_map == "auto":
        device_map = torch.accelerator.current_accelerator() or "cpu"
    return torch.device("cpu" if device_map is None else device_map)


#: Options of a download.
_DOWNLOAD = {"revision", "token", "cache_dir", "force_download", "local_files_only", "proxies"}
_DOWNLOAD |= {"allow_patterns", "ignore_patterns", "max_workers", "subfolder"}


def _folder(source: Any, options: dict[str, Any]) -> Path:
    """The model's folder, downloaded where `source` is none. Takes the download's options out."""
    download = {name: options.pop(name) for name in _DOWNLOAD & options.keys()}
    subfolder = download.pop("subfolder", "") or ""
    if not os.path.isdir(source):
        from huggingface_hub import snapshot_download

        source = snapshot_download(str(source), **download)
    return Path(source) / subfolder


def _upload(folder: Path, repo_id: str, options: dict[str, Any]) -> None:
    from huggingface_hub import HfApi

    api = HfApi(token=options.pop("token", None))
    private = options.pop("private", None)
    repo = api.create_repo(repo_id, private=private, exist_ok=True)
    api.upload_folder(repo_id=repo.repo_id, folder_path=folder, **options)


def _ties(model: torch.nn.Module) -> list[list[str]]:
    """Names of the parameters that are one."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [group for group in names.values() if len(group) > 1]


def _entries(state_dict: Mapping[str, Any], name: str) -> list[str]:
    """The keys of a parameter: its own, or those of the parts of its codes."""
    return [key for key in state_dict if key == name or key.startswith(name + "._")]


def _with_tied(state_dict: Mapping[str, Any], ties: list[list[str]]) -> dict[str, Any]:
    """The tensors, those that a file has once under each of their names."""
    tensors = dict(state_dict)
    for group in ties:
        saved = [name for name in group if _entries(state_dict, name)]
        for name in group if saved else ():
            if name not in saved:
                for key in _entries(state_dict, saved[0]):
                    tensors[name + key.removeprefix(saved[0])] = tensors[key]
    return tensors


def _tie(model: torch.nn.Module, ties: list[list[str]], state_dict: Mapping[str, Any]) -> None:
    """Makes one again of the weights that a file has once."""
    for group in ties:
        saved = [name for name in group if _entries(state_dict, name)]
        if len(saved) != 1:
            continue
        for name in group:
            if name != saved[0]:
                _set(model, name, _get(model, saved[0]))


def _get(model: torch.nn.Module, name: str) -> Any:
    parent, _, child = name.rpartition(".")
    return getattr(model.get_submodule(parent), child)


def _set(model: torch.nn.Module, name: str, value: Any) -> None:
    parent, _, child = name.rpartition(".")
    module = model.get_submodule(parent)
    if isinstance(value, torch.nn.Module) and not isinstance(module, QModuleMixin):
        raise ValueError(f"[quantal.models] '{name}' shares codes, but its module is not quantized")
    setattr(module, child, value)
