"""bf16 for a frozen network: matrix products in bf16, everything that must not lose bits in fp32.

Casting a deep network to bf16 as a whole lets its residual stream and its norms round at every block, and deep
teachers collapse. Here only the weights of linear layers, convolutions and attention are stored in bf16; norms,
position embeddings, layer scales, class tokens and buffers stay in fp32, the residual stream with them, and autocast
brings the two together.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

PRODUCTS = (nn.Linear, _ConvNd, nn.MultiheadAttention)
NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


def is_norm(module: nn.Module) -> bool:
    """A norm by type, or by name where a library has its own and nothing else is inside."""
    named = "norm" in type(module).__name__.lower()
    return isinstance(module, NORMS) or (named and not any(isinstance(m, PRODUCTS) for m in module.modules()))


def lower_precision(network: nn.Module) -> nn.Module:
    """Store product weights in bf16, in place, and make norms compute in fp32. Call under bf16 autocast only.

    Raises:
        ValueError: a TorchScript module, whose compiled code fixes its own dtypes.
    """
    if isinstance(network, torch.jit.ScriptModule):
        raise ValueError("a TorchScript module can't be lowered to bf16; use dtype: fp32, or script it in bf16")
    for module in network.modules():
        if is_norm(module):
            module.register_forward_pre_hook(_to_fp32)
        elif isinstance(module, PRODUCTS):
            for parameter in module.parameters():
                if parameter.dtype == torch.float32:
                    parameter.data = parameter.data.bfloat16()
    return network


def _to_fp32(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """bf16 tensor arguments of a norm -> fp32."""
    return tuple(x.float() if isinstance(x, Tensor) and x.dtype == torch.bfloat16 else x for x in args)
