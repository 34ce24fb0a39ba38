"""Linear layers of Quantal and of the libraries it is measured against, one module a library.

Each module has `version()`, `SCHEMES` and `make(scheme, weight, copies, threads)`; what they mean
is in `peers.peer`. A module is imported only in the process that measures it (`peers.worker`).
"""

PEERS = (
    "quantal",
    "torch_float",
    "torch_weight_only",
    "torch_dynamic",
    "quanto",
    "onnx_runtime",
    "openvino_cpu",
    "ggml",
    "bitsandbytes_cpu",
)
