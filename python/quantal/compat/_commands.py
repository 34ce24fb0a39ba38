"""``optimum-cli quanto quantize``, where optimum is installed.

python -m quantal.compat $(which optimum-cli) quanto quantize FOLDER -m MODEL --weights int4
"""

from argparse import ArgumentParser
from typing import Any

import torch
from optimum.commands.base import BaseOptimumCLICommand, CommandInfo
from optimum.commands.optimum_cli import optimum_cli_subcommand

from ._replacements import QuantizedTransformersModel

__all__ = ["QuantizeCommand", "QuantoCommand"]

_DTYPES = {"auto": "auto", "fp16": torch.float16, "bf16": torch.bfloat16}


class QuantizeCommand(BaseOptimumCLICommand):
    """Quantizes the weights of a model of transformers, and saves it for QuantizedModelForCausalLM
    and its kin."""

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Declares the options."""
        parser.add_argument("output", help="folder of the quantized model")
        parser.add_argument("-m", "--model", required=True, help="folder, or name on the Hub")
        parser.add_argument(
            "--weights", default="int8", choices=["int2", "int4", "int8", "float8"],
            help="type of the weights (%(default)s)",
        )  # fmt: skip
        parser.add_argument("--revision", help="of a model on the Hub")
        parser.add_argument(
            "--trust_remote_code", action="store_true", help="run code that the model brings"
        )
        parser.add_argument(
            "--library", default="transformers", choices=["transformers"], help="of the model"
        )
        parser.add_argument(
            "--task", help='as "text-generation"; by default the class in config.json decides'
        )
        parser.add_argument(
            "--torch_dtype", default="auto", choices=list(_DTYPES), help="of what stays float"
        )
        parser.add_argument("--device", default="cpu", help="where to quantize (%(default)s)")

    def run(self) -> None:
        """Loads, quantizes, saves."""
        model = self._model_class().from_pretrained(
            self.args.model, dtype=_DTYPES[self.args.torch_dtype], **self._source()
        )
        weights = f"q{self.args.weights}"
        quantized = QuantizedTransformersModel.quantize(model.to(self.args.device), weights)
        quantized.save_pretrained(self.args.output)

    def _source(self) -> dict[str, Any]:
        return {
            "revision": self.args.revision or "main",
            "trust_remote_code": self.args.trust_remote_code,
        }

    def _model_class(self) -> Any:
        import transformers

        if self.args.task is not None:
            from optimum.exporters.tasks import TasksManager

            return TasksManager.get_model_class_for_task(self.args.task)
        config = transformers.AutoConfig.from_pretrained(self.args.model, **self._source())
        name = (config.architectures or ["no class"])[0]
        found = getattr(transformers, name, None)
        if found is None:
            raise ValueError(
                f"[quantal.compat] '{self.args.model}' names {name}, which transformers has not: "
                "say --task"
            )
        return found


class QuantoCommand(BaseOptimumCLICommand):
    """``optimum-cli quanto``."""

    COMMAND = CommandInfo(name="quanto", help="quantize models of Hugging Face")
    SUBCOMMANDS = (CommandInfo("quantize", "quantize weights and save", QuantizeCommand),)


optimum_cli_subcommand()(QuantoCommand)
