"""Vision, generative and graph models as their authors write them, tiny: what they do besides convolutions.

Each says in its docstring which of that it is here for.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import MultivariateNormal
from torch.nn import functional as F

Pair = tuple[Tensor, Tensor]


class SegNet(nn.Module):
    """Unpooling by the indices of max pooling, sizes that are odd."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.deep, self.pool = nn.Conv2d(8, 8, 3, padding=1), nn.MaxPool2d(2, 2, return_indices=True)
        self.up, self.out, self.unpool = (
            nn.Conv2d(8, 8, 3, padding=1),
            nn.Conv2d(8, 4, 1),
            nn.MaxUnpool2d(2, 2),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.down(x)))
        size = x.size()
        x, places = self.pool(x)
        return self.out(self.up(self.unpool(F.relu(self.deep(x)), places, output_size=size)))


class PyramidPooling(nn.Module):
    """Adaptive max pooling to sizes that do not divide."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3, 2, 1), nn.Linear(4 * 30, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv(x))
        return self.head(torch.cat([F.adaptive_max_pool2d(x, k).flatten(1) for k in (1, 2, 3, 4)], 1))


class SpatialTransformer(nn.Module):
    """`affine_grid` and `grid_sample`."""

    def __init__(self) -> None:
        super().__init__()
        self.localization = nn.Sequential(
            nn.Conv2d(1, 4, 5, 2), nn.ReLU(True), nn.Flatten(), nn.Linear(64, 6)
        )
        head = self.localization[3]
        assert isinstance(head, nn.Linear)
        nn.init.normal_(head.weight, std=0.01)
        # off the pixels, where the interpolation has no slope of its own
        head.bias.data.copy_(torch.tensor([0.8, 0.1, 0.03, -0.1, 0.75, 0.05]))
        self.conv, self.head = nn.Conv2d(1, 6, 3), nn.Linear(6, 10)

    def forward(self, x: Tensor) -> Tensor:
        grid = F.affine_grid(self.localization(x).view(-1, 2, 3), list(x.size()), align_corners=False)
        x = F.grid_sample(x, grid, align_corners=False)
        return self.head(F.relu(self.conv(x)).mean((2, 3)))


class EdgeNetwork(nn.Module):
    """Messages along an edge list: `index_add_`, `scatter_add_`, the maximum over each graph's nodes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(16, 3)

    def forward(self, x: Tensor, edges: Tensor, graph: Tensor) -> Tensor:
        source, target = edges
        x = F.relu(self.first(x) + torch.zeros(20, 8).index_add_(0, target, self.first(x)[source]))
        message = x.index_select(0, source)
        x = x + torch.zeros_like(x).scatter_add_(0, target.view(-1, 1).expand_as(message), message)
        x = torch.tanh(self.second(x))
        where = graph.view(-1, 1).expand_as(x)
        most = torch.zeros(4, 8).scatter_reduce(0, where, x, "amax", include_self=False)
        mean = torch.zeros(4, 8).scatter_reduce(0, where, x, "mean", include_self=False)
        return self.head(torch.cat([most, mean], 1))


class SimClr(nn.Module):
    """Constant masks pick the pairs."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(72, 8))

    def forward(self, a: Tensor, b: Tensor) -> Pair:
        features = F.normalize(self.encoder(torch.cat([a, b])), dim=1)
        labels = torch.arange(len(a)).repeat(2)
        alike = (labels[None] == labels[:, None]).float()
        other = ~torch.eye(len(labels), dtype=torch.bool)
        alike = alike[other].view(len(labels), -1)
        similar = (features @ features.T)[other].view(len(labels), -1)
        positive = similar[alike.bool()].view(len(labels), -1)
        negative = similar[~alike.bool()].view(len(labels), -1)
        return torch.cat([positive, negative], 1) / 0.2, torch.zeros(len(labels), dtype=torch.long)


class BarlowTwins(nn.Module):
    """In-place changes of a diagonal; one batch norm for two batches."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Flatten(), nn.Linear(48, 12), nn.ReLU(), nn.Linear(12, 6))
        self.norm = nn.BatchNorm1d(6, affine=False)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        cross = self.norm(self.encoder(a)).T @ self.norm(self.encoder(b))
        cross.div_(len(a))
        on = torch.diagonal(cross).add_(-1).pow_(2).sum()
        off = cross.flatten()[:-1].view(5, 7)[:, 1:].flatten().pow_(2).sum()
        return on + 0.05 * off


class Momentum(nn.Module):
    """MoCo's queue and VQ-VAE's averages: buffers by assignment; a batch norm that averages over all batches."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Sequential(nn.Flatten(), nn.Linear(48, 8), nn.BatchNorm1d(8, momentum=None))
        self.key = copy.deepcopy(self.query).requires_grad_(False)
        self.register_buffer("queue", F.normalize(torch.randn(8, 12), dim=0))
        self.register_buffer("size", torch.ones(8))
        self.register_buffer("steps", torch.tensor(0))

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        q = F.normalize(self.query(a), dim=1)
        with torch.no_grad():
            k = F.normalize(self.key(b), dim=1)
        logits = torch.cat([(q * k).sum(1, keepdim=True), q @ self.queue.clone()], 1)
        self.queue = torch.cat([k.T, self.queue[:, : -len(a)]], 1)
        self.size.mul_(0.9).add_(q.detach().abs().sum(0), alpha=0.1)
        self.steps += 1
        return logits / 0.2


class Critic(nn.Module):
    """WGAN-GP: the gradient of a gradient; spectral norm old and new."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            norm(nn.Conv2d(1, 6, 4, 2, 1)), nn.LeakyReLU(0.2), nn.Flatten(), norm(nn.Linear(96, 1))
        )

    def forward(self, real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        share = torch.rand(len(real), 1, 1, 1)
        between = (share * real + (1 - share) * fake).requires_grad_()
        slope = torch.autograd.grad(self.layers(between).sum(), between, create_graph=True)[0]
        return self.layers(real), self.layers(fake), ((slope.flatten(1).norm(2, dim=1) - 1) ** 2).mean()


def wasserstein(output: tuple[Tensor, Tensor, Tensor], target: Tensor) -> Tensor:
    real, fake, penalty = output
    return fake.mean() - real.mean() + 10 * penalty


class TemporalBlock(nn.Module):
    """TCN: weight norm, a module with two names."""

    def __init__(self, inner: int, outer: int, dilation: int, norm: Any) -> None:
        super().__init__()
        self.conv, self.cut = (
            norm(nn.Conv1d(inner, outer, 3, padding=2 * dilation, dilation=dilation)),
            2 * dilation,
        )
        self.net = nn.Sequential(self.conv, nn.ReLU(), nn.Dropout(0.1))
        self.shortcut = nn.Conv1d(inner, outer, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.net(x)[:, :, : -self.cut].contiguous() + self.shortcut(x))


class Tcn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        weight_norm = torch.nn.utils.parametrizations.weight_norm
        self.net = nn.Sequential(TemporalBlock(2, 8, 1, weight_norm), TemporalBlock(8, 8, 2, weight_norm))
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.net(x)[:, :, -1])


class MaskedAutoencoder(nn.Module):
    """MAE: a random order, whole lines by index, there and back."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.token = nn.Conv2d(3, 16, 4, 4), nn.Parameter(torch.randn(1, 1, 16) * 0.02)
        self.encoder = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.decoder = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.position, self.head = nn.Parameter(torch.randn(1, 16, 16) * 0.1), nn.Linear(16, 48)

    def forward(self, x: Tensor) -> Tensor:
        patches = x.reshape(-1, 3, 4, 4, 4, 4)
        goal = torch.einsum("nchpwq->nhwpqc", patches).reshape(len(x), 16, 48)
        tokens = self.patch(x).flatten(2).transpose(1, 2) + self.position
        order = torch.argsort(torch.rand(len(x), 16), dim=1)
        back, kept = torch.argsort(order, dim=1), order[:, :6]
        seen = self.encoder(tokens.gather(1, kept.unsqueeze(-1).repeat(1, 1, 16)))
        hidden = torch.ones(len(x), 16)
        hidden[:, :6] = 0
        full = torch.cat([seen, self.token.repeat(len(x), 10, 1)], 1)
        full = full.gather(1, back.unsqueeze(-1).repeat(1, 1, 16))
        error = (self.head(self.decoder(full + self.position)) - goal).square().mean(-1)
        hidden = hidden.gather(1, back)
        return (error * hidden).sum() / hidden.sum()


class RealNvp(nn.Module):
    """A flow whose prior is a distribution object that checks its samples."""

    def __init__(self) -> None:
        super().__init__()
        self.nets = nn.ModuleList(
            nn.Sequential(nn.Linear(2, 16), nn.LeakyReLU(), nn.Linear(16, 4)) for _ in range(4)
        )
        self.prior = MultivariateNormal(torch.zeros(2), torch.eye(2))

    def forward(self, x: Tensor) -> Tensor:
        volume = x.new_zeros(len(x))
        for number, net in enumerate(self.nets):
            mask = torch.tensor([number % 2, 1 - number % 2]).float()
            scale, shift = net(x * mask).chunk(2, 1)
            scale = torch.tanh(scale) * (1 - mask)
            x, volume = x * mask + (1 - mask) * (x * scale.exp() + shift), volume + scale.sum(1)
        density: Tensor = self.prior.log_prob(x)  # type: ignore[no-untyped-call]
        return density + volume


class Styled(nn.Module):
    """StyleGAN2: a convolution with other weights for each sample; involution; statistics over six axes."""

    def __init__(self) -> None:
        super().__init__()
        self.style, self.start = nn.Linear(6, 4), nn.Parameter(torch.randn(1, 4, 6, 6))
        self.weight, self.kernel = nn.Parameter(torch.randn(1, 4, 4, 3, 3)), nn.Conv2d(4, 9, 1)
        self.out = nn.Conv2d(5, 1, 1)

    def forward(self, z: Tensor) -> Tensor:
        batch = len(z)
        weight = self.weight / 6 * (self.style(z) + 1).view(batch, 1, 4, 1, 1)
        weight = weight * torch.rsqrt(weight.pow(2).sum([2, 3, 4], keepdim=True) + 1e-8)
        x = self.start.repeat(batch, 1, 1, 1).view(1, batch * 4, 6, 6)
        x = F.conv2d(x, weight.view(batch * 4, 4, 3, 3), padding=1, groups=batch).view(batch, 4, 6, 6)
        x = F.leaky_relu(x, 0.2) * math.sqrt(2)
        kernel = self.kernel(x).view(batch, 1, 1, 9, 6, 6)
        x = x + (kernel * F.unfold(x, 3, padding=1).view(batch, 1, 4, 9, 6, 6)).sum(3).view_as(x)
        groups = x.reshape(2, -1, 1, 4, 6, 6)
        spread = torch.sqrt((groups - groups.mean(0)).square().mean(0) + 1e-8).mean([2, 3, 4], keepdim=True)
        return self.out(torch.cat([x, spread.squeeze(2).repeat(2, 1, 6, 6)], 1))


class VNet(nn.Module):
    """Volumes; the labels as one-hot classes in a Dice loss."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv3d(1, 4, 3, padding=1), nn.InstanceNorm3d(4, affine=True)
        self.down, self.act, self.up = nn.Conv3d(4, 8, 2, 2), nn.PReLU(8), nn.ConvTranspose3d(8, 4, 2, 2)
        self.resize = nn.Upsample(scale_factor=2, mode="trilinear", align_corners=False)
        self.out = nn.Conv3d(16, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.leaky_relu(self.norm(self.conv(x)), 0.01)
        deep = self.act(self.down(x))
        return self.out(torch.cat([x, self.up(deep), self.resize(deep)], 1))


def dice(output: Tensor, target: Tensor) -> Tensor:
    shares = F.softmax(output, 1)
    classes = F.one_hot(target, 2).permute(0, 4, 1, 2, 3).float()
    common, total = (shares * classes).sum((0, 2, 3, 4)), (shares + classes).sum((0, 2, 3, 4))
    return (1 - 2 * common / (total + 1e-6)).mean() + F.cross_entropy(output, target)
