"""Which implementation of a pass runs where: Triton's on a GPU, torch's elsewhere; the two of a kind have the same functions."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from types import ModuleType
from typing import Literal

import torch

Kind = Literal["gather", "rows", "tiles", "tokens"]


@functools.cache
def kernels(kind: Kind, device: str, dtype: torch.dtype) -> ModuleType | None:
    """Triton's module where there is a GPU and Triton (which ships with PyTorch for CUDA); None where torch does it."""
    if device == "cuda" and dtype != torch.float64 and importlib.util.find_spec("triton") is not None:
        return importlib.import_module(f"trl_reasoning_distill.losses._triton_{kind}")
    return None
