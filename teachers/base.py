"""The frozen contract: what every teacher promises, kept in one place."""

from __future__ import annotations

from typing import Any, Callable, Iterator, Literal, Sequence

import torch
from torch import Tensor, nn

from agglom.features import Answer, Dims, Features, InputSpec, prepare
from agglom.teachers.precision import lower_precision

Dtype = Literal["fp32", "bf16"]


class Teacher(nn.Module):
    """A frozen encoder that owns its input contract.

    A subclass sets the attributes, hands its network to `freeze`, keeps it as an attribute and implements `encode`.

    Frozen for good, by construction: a module set on a teacher is frozen and kept in the instance's `__dict__`, outside
    of the module tree. So `train()`, `requires_grad_()`, `apply()`, `parameters()` and `state_dict()` of anything that
    holds a teacher never reach its network, and no checkpoint, optimiser, EMA or gradient synchronisation can. Only
    `_apply` is passed on, so that it still moves with `.to(device)`; its dtypes stay as they are.

    Attributes:
        input: mean, std, size, stride; applied by `forward`.
        summary_dim: D, or None where there is no summary (SAM).
        spatial_dim: C, or None where there is no feature map.
        dtype: "fp32", or "bf16" with norms and lone parameters in fp32 (see `precision`). Outputs are always fp32.
        source: where the weights came from ("timm:NAME", a path, "random"), for the manifest.
        licence: SPDX name or URL of the weights' licence, "unknown" where nobody said.
    """

    input: InputSpec
    summary_dim: int | None
    spatial_dim: int | None
    dtype: Dtype = "fp32"
    source: str = "random"
    licence: str = "unknown"

    def __init__(self) -> None:
        super().__init__()
        self.training = False

    def freeze(self, network: nn.Module, *, dtype: Dtype = "fp32") -> nn.Module:
        """Put a network into the frozen state; called by a subclass once it is built.

        Args:
            network: changed in place.
            dtype: what the network computes in.

        Returns:
            The same network, to be set as an attribute.
        """
        if dtype not in ("fp32", "bf16"):
            raise ValueError(f"dtype {dtype!r}; valid: 'fp32', 'bf16'")
        self.dtype = dtype
        still(network)
        return lower_precision(network) if dtype == "bf16" else network

    @property
    def dims(self) -> Dims:
        return Dims(self.summary_dim, self.spatial_dim)

    @property
    def networks(self) -> dict[str, nn.Module]:
        """The frozen modules by attribute name."""
        return {name: value for name, value in self.__dict__.items() if isinstance(value, nn.Module)}

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every frozen parameter and buffer with its name."""
        for prefix, network in self.networks.items():
            yield from network.named_parameters(prefix)
            yield from network.named_buffers(prefix)

    @property
    def device(self) -> torch.device:
        """Where the network lies."""
        return next((tensor.device for _, tensor in self.tensors()), torch.device("cpu"))

    def encode(self, pixels: Tensor) -> Features:
        """Resized and normalised pixels (B, 3, h, w) -> Features. The subclass's only duty."""
        raise NotImplementedError

    def forward(self, images: Tensor) -> Features:
        """images (B, 3, H, W), floats in [0, 1] -> Features in fp32, without gradients.

        The caller's autocast is switched off, so a teacher's targets are the same in any training precision.
        """
        return self.answer(images).features

    def answer(self, images: Tensor, *, blocks: int = 0, adaptors: Sequence[str] = ()) -> Answer:
        """As `forward`, with its last `blocks` blocks where the subclass can tell them; a teacher has no adaptors."""
        if not images.is_floating_point():
            raise ValueError(f"images are {images.dtype}; a teacher takes floats in [0, 1]: divide by 255")
        if adaptors:
            raise ValueError(f"adaptors {list(adaptors)}: a teacher has none")
        kind = images.device.type if torch.amp.is_autocast_available(images.device.type) else "cpu"
        pixels = prepare(images.detach().float(), self.input)
        with torch.no_grad(), torch.autocast(kind, dtype=torch.bfloat16, enabled=self.dtype == "bf16"):
            features, last = self.encode_blocks(pixels, blocks) if blocks else (self.encode(pixels), [])
        return Answer(_plain(features), [_plain(block) for block in last], {})

    def encode_blocks(self, pixels: Tensor, count: int) -> tuple[Features, list[Features]]:
        """`encode`, and the last `count` blocks' features; a subclass that can't tell them says nothing of them."""
        return self.encode(pixels), []

    def dry_run(self, size: tuple[int, int]) -> Features:
        """`encode` one blank image of `size` pixels: shapes, without arithmetic where the network allows.

        The network runs with its tensors replaced by meta tensors. One that can't (TorchScript,
        data-dependent code) runs for real.
        """
        blank = torch.zeros(1, 3, *size)
        tensors = {name: tensor.detach().to("meta") for name, tensor in self.tensors()}
        try:
            with torch.no_grad():
                return torch.func.functional_call(_Encode(self), tensors, (blank.to("meta"),), strict=False)
        except Exception:  # whatever a foreign network raises: the real run below tells, if it is the network's fault
            if self.device.type == "meta":
                raise
        with torch.no_grad():
            return self.encode(blank.to(self.device))

    def train(self, mode: bool = True) -> Teacher:
        """A teacher stays in eval mode."""
        return super().train(False)

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, nn.Module):
            self.__dict__[name] = still(value)
        else:
            super().__setattr__(name, value)

    def add_module(self, name: str, module: nn.Module | None) -> None:
        setattr(self, name, module)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        raise TypeError(f"{name}: a teacher's tensors live in the module handed to freeze(), not on the teacher")

    def register_buffer(self, name: str, tensor: Tensor | None, persistent: bool = True) -> None:
        raise TypeError(f"{name}: a teacher's tensors live in the module handed to freeze(), not on the teacher")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Teacher:
        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)  # device yes, dtype no

        for network in self.networks.values():
            network._apply(move, recurse)
        return self

    def extra_repr(self) -> str:
        millions = sum(tensor.numel() for _, tensor in self.tensors()) / 1e6
        return f"source={self.source!r}, summary={self.summary_dim}, spatial={self.spatial_dim}, {millions:.1f}M frozen"


def _plain(features: Features) -> Features:
    return Features(*(None if x is None else x.detach().float() for x in features))


class _Encode(nn.Module):
    """A teacher's `encode` as a module whose children are its networks, for `functional_call`."""

    def __init__(self, teacher: Teacher) -> None:
        super().__init__()
        self._encode = teacher.encode
        for name, network in teacher.networks.items():
            self.add_module(name, network)

    def forward(self, pixels: Tensor) -> Features:
        return self._encode(pixels)


def still(network: nn.Module) -> nn.Module:
    """Eval mode, no parameter asks for gradients. (TorchScript has no `requires_grad_` of its own.)"""
    for parameter in network.parameters():
        parameter.requires_grad_(False)
    return network.eval()


def on_meta(teacher: type[Teacher], **arguments: Any) -> Teacher:
    """Build a teacher without memory for its weights, for checks: its dims and input are real, its outputs are not."""
    with torch.device("meta"):
        return teacher(**arguments)
