"""The ready-made networks in PyTorch: multilayer perceptron, convolutional net, small vision transformer."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise

import torch
from torch import nn

from ane_trainer.ane.errors import UsageError

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "elu": nn.ELU,
    "gelu": nn.GELU,
    "gelu-tanh": partial(nn.GELU, approximate="tanh"),
    "hardswish": nn.Hardswish,
    "leaky-relu": nn.LeakyReLU,
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "sigmoid": nn.Sigmoid,
    "silu": nn.SiLU,
    "softplus": nn.Softplus,
    "tanh": nn.Tanh,
}


def mlp(
    in_shape: Sequence[int] = (1, 28, 28), num_classes: int = 10, hidden: Sequence[int] = (256,),
    activation: str = "gelu",
) -> nn.Module:  # fmt: skip
    """Flatten, then linear layers of `hidden` widths with an activation after each, then the classes."""
    sizes = [math.prod(in_shape), *hidden]
    layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
    for number, (before, after) in enumerate(pairwise(sizes), 1):
        layers[f"fc{number}"] = nn.Linear(before, after)
        layers[f"act{number}"] = ACTIVATIONS[activation]()
    layers[f"fc{len(sizes)}"] = nn.Linear(sizes[-1], num_classes)
    return nn.Sequential(layers)


def cnn(
    in_shape: Sequence[int] = (1, 28, 28), num_classes: int = 10, channels: Sequence[int] = (16, 64),
    activation: str = "relu",
) -> nn.Module:  # fmt: skip
    """Per entry of `channels` a 3x3 convolution, activation and 2x2 max pooling; then one linear layer."""
    size, height, width = image_shape("cnn", in_shape)
    smallest = 2 ** len(channels)
    if min(height, width) < smallest:
        raise UsageError(
            f"build_model('cnn'): needs {smallest}x{smallest} pixels or more for {len(channels)} poolings; "
            f"got {height}x{width}. Pass fewer channels=(...).",
            code="ANE103",
        )
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for number, out in enumerate(channels, 1):
        layers[f"conv{number}"] = nn.Conv2d(size, out, kernel_size=3, padding=1)
        layers[f"act{number}"] = ACTIVATIONS[activation]()
        layers[f"pool{number}"] = nn.MaxPool2d(2)
        size, height, width = out, height // 2, width // 2
    layers["flatten"] = nn.Flatten()
    layers["fc"] = nn.Linear(size * height * width, num_classes)
    return nn.Sequential(layers)


class TransformerBlock(nn.Module):
    """Pre-norm self-attention and a two-layer perceptron, each with a residual: [B, T, D] to [B, T, D].

    With `causal`, a token sees only itself and those before it.
    """

    def __init__(self, width: int, heads: int, activation: str, causal: bool = False) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.activation = ACTIVATIONS[activation]()

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        """One block."""
        batch, tokens, width = x_BTD.shape
        qkv = self.qkv(self.norm1(x_BTD)).reshape(batch, tokens, 3, self.heads, width // self.heads)
        q_BHTd, k_BHTd, v_BHTd = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        mixed_BHTd = nn.functional.scaled_dot_product_attention(q_BHTd, k_BHTd, v_BHTd, is_causal=self.causal)
        x_BTD = x_BTD + self.project(mixed_BHTd.transpose(1, 2).reshape(batch, tokens, width))
        out_BTD: torch.Tensor = x_BTD + self.fc2(self.activation(self.fc1(self.norm2(x_BTD))))
        return out_BTD


class VisionTransformer(nn.Module):
    """Square patches, a linear embedding with learned positions, blocks, the mean over tokens, classes."""

    def __init__(
        self, in_shape: Sequence[int] = (1, 28, 28), num_classes: int = 10, patch: int | None = None,
        width: int = 64, depth: int = 2, heads: int = 4, activation: str = "gelu",
    ) -> None:  # fmt: skip
        super().__init__()
        channels, height, image_width = image_shape("transformer", in_shape)
        if patch is None:
            patch = 4 if height % 7 or image_width % 7 else 7
        if height % patch or image_width % patch or width % heads:
            raise UsageError(
                "build_model('transformer'): needs image sides divisible by patch, and width by heads; "
                f"got {height}x{image_width}, patch={patch}, width={width}, heads={heads}. "
                "Pass patch=..., width=... or heads=...",
                code="ANE103",
            )
        self.grid = (height // patch, image_width // patch)
        self.patch = patch
        self.embed = nn.Linear(channels * patch * patch, width)
        self.positions = nn.Parameter(0.02 * torch.randn(1, self.grid[0] * self.grid[1], width))
        self.blocks = nn.Sequential(*(TransformerBlock(width, heads, activation) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, num_classes)

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        """Class scores [B, num_classes] of images [B, C, H, W]."""
        batch, channels = x_BCHW.shape[:2]
        rows, columns = self.grid
        # In two steps, since tensors on the engine have at most 5 axes.
        bands = x_BCHW.reshape(batch * channels, rows, self.patch, columns, self.patch).transpose(2, 3)
        patches = bands.reshape(batch, channels, rows * columns, self.patch * self.patch).transpose(1, 2)
        x_BTD = self.embed(patches.reshape(batch, rows * columns, -1)) + self.positions
        scores_BC: torch.Tensor = self.head(self.norm(self.blocks(x_BTD)).mean(dim=1))
        return scores_BC


class CharacterTransformer(nn.Module):
    """A language model: learned embeddings of tokens and positions, causal blocks, scores of the next token."""

    def __init__(
        self, in_shape: Sequence[int] = (64,), num_classes: int = 256, width: int = 64, depth: int = 2,
        heads: int = 4, activation: str = "gelu",
    ) -> None:  # fmt: skip
        super().__init__()
        if len(in_shape) != 1:
            raise UsageError(
                f"build_model('gpt'): needs in_shape=(tokens,); got {tuple(in_shape)}. Give the number of tokens: "
                "in_shape=(64,), on the command line --input 64 --classes 256.",
                code="ANE103",
            )
        if width % heads:
            raise UsageError(
                f"build_model('gpt'): needs a width divisible by heads; got width={width}, heads={heads}. "
                "Pass width=... or heads=...",
                code="ANE103",
            )
        self.tokens = nn.Embedding(num_classes, width)
        nn.init.normal_(self.tokens.weight, std=0.02)
        self.positions = nn.Parameter(0.02 * torch.randn(1, in_shape[0], width))
        blocks = (TransformerBlock(width, heads, activation, causal=True) for _ in range(depth))
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, num_classes)

    def forward(self, tokens_BT: torch.Tensor) -> torch.Tensor:
        """Scores [B, num_classes, T] of the token after each of [B, T]."""
        x_BTD = self.blocks(self.tokens(tokens_BT) + self.positions)
        scores_BTC: torch.Tensor = self.head(self.norm(x_BTD))
        return scores_BTC.transpose(1, 2)


def image_shape(name: str, in_shape: Sequence[int]) -> tuple[int, int, int]:
    """(channels, height, width), or UsageError ANE103 if `in_shape` is not that of an image."""
    if len(in_shape) != 3:
        raise UsageError(
            f"build_model({name!r}): needs in_shape=(channels, height, width); got {tuple(in_shape)}.",
            code="ANE103",
        )
    channels, height, width = in_shape
    return channels, height, width
