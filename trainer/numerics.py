"""How a process computes: with kernels that give the same bits each time, and in float32 where float32 is meant."""

import os

import torch


def be_deterministic() -> None:
    """Chooses kernels that give the same bits each time, where torch has them; others say so in a warning."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = False


def exact_float32() -> None:
    """Makes GPUs compute float32 in float32.

    Torch lets cuDNN's convolutions round their operands to TF32's ten bits, on by default, while matrix products keep all
    of float32. A run or a cache whose precision is float32 means all of it; in bf16, autocast has lowered convolutions
    anyway, and what stays float32 then does so because the methods demand it.
    """
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
