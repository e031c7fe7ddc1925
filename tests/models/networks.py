"""Small networks of well-known shapes that `transformers` does not have, as their authors write them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class BasicBlock(nn.Module):
    """ResNet's: two 3x3 convolutions and a shortcut."""

    def __init__(self, inner: int, outer: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inner, outer, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outer)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(outer, outer, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outer)
        self.downsample: nn.Module | None = None
        if stride != 1 or inner != outer:
            self.downsample = nn.Sequential(
                nn.Conv2d(inner, outer, 1, stride, bias=False), nn.BatchNorm2d(outer)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


def resnet18(width: int = 8, classes: int = 10) -> nn.Module:
    layers: list[nn.Module] = [
        nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width), nn.ReLU(True), nn.MaxPool2d(3, 2, 1),
    ]  # fmt: skip
    inner = width
    for stage in range(4):
        outer = width << stage
        layers += [BasicBlock(inner, outer, 1 if stage == 0 else 2), BasicBlock(outer, outer, 1)]
        inner = outer
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inner, classes))


def conv_norm(
    inner: int, outer: int, size: int, stride: int, groups: int, act: type[nn.Module]
) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inner, outer, size, stride, size // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outer),
        act(),
    )


class Squeeze(nn.Module):
    """Squeeze and excitation."""

    def __init__(self, channels: int, gate: type[nn.Module]) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(channels, 4, 1), nn.Conv2d(4, channels, 1)
        self.gate = gate()

    def forward(self, x: Tensor) -> Tensor:
        scale = F.adaptive_avg_pool2d(x, 1)
        return x * self.gate(self.fc2(F.relu(self.fc1(scale))))


class Inverted(nn.Module):
    """MobileNet's inverted residual, with squeeze and excitation where `gate` is given."""

    def __init__(
        self,
        inner: int,
        outer: int,
        size: int,
        stride: int,
        act: type[nn.Module],
        gate: type[nn.Module] | None,
    ) -> None:
        super().__init__()
        wide = inner * 3
        layers: list[nn.Module] = [
            conv_norm(inner, wide, 1, 1, 1, act),
            conv_norm(wide, wide, size, stride, wide, act),
        ]
        if gate is not None:
            layers.append(Squeeze(wide, gate))
        layers += [nn.Conv2d(wide, outer, 1, bias=False), nn.BatchNorm2d(outer)]
        self.block = nn.Sequential(*layers)
        self.shortcut = stride == 1 and inner == outer

    def forward(self, x: Tensor) -> Tensor:
        return x + self.block(x) if self.shortcut else self.block(x)


def mobile(act: type[nn.Module], gate: type[nn.Module] | None, size: int) -> nn.Module:
    return nn.Sequential(
        conv_norm(3, 8, 3, 2, 1, act), Inverted(8, 8, 3, 1, act, gate), Inverted(8, 12, size, 2, act, gate),
        Inverted(12, 12, size, 1, act, gate), conv_norm(12, 24, 1, 1, 1, act), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Dropout(0.2), nn.Linear(24, 10),
    )  # fmt: skip


def vgg() -> nn.Module:
    layers: list[nn.Module] = []
    inner = 3
    for outer in (8, 16, 32):
        layers += [
            nn.Conv2d(inner, outer, 3, padding=1),
            nn.ReLU(True),
            nn.Conv2d(outer, outer, 3, padding=1),
        ]
        layers += [nn.ReLU(True), nn.MaxPool2d(2, 2)]
        inner = outer
    head = [nn.Linear(32 * 16, 64), nn.ReLU(True), nn.Dropout(), nn.Linear(64, 10)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d((4, 4)), nn.Flatten(), *head)


class DenseLayer(nn.Module):
    def __init__(self, inner: int, growth: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(inner), nn.Conv2d(inner, 2 * growth, 1, bias=False)
        self.norm2, self.conv2 = (
            nn.BatchNorm2d(2 * growth),
            nn.Conv2d(2 * growth, growth, 3, padding=1, bias=False),
        )

    def forward(self, features: list[Tensor]) -> Tensor:
        x = torch.cat(features, 1)
        return self.conv2(F.relu(self.norm2(self.conv1(F.relu(self.norm1(x))))))


class DenseNet(nn.Module):
    def __init__(self, growth: int = 4) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.first = nn.ModuleList(DenseLayer(8 + i * growth, growth) for i in range(3))
        self.transition = nn.Sequential(
            nn.BatchNorm2d(20), nn.ReLU(), nn.Conv2d(20, 10, 1), nn.AvgPool2d(2, 2)
        )
        self.second = nn.ModuleList(DenseLayer(10 + i * growth, growth) for i in range(3))
        self.head = nn.Linear(22, 10)

    def forward(self, x: Tensor) -> Tensor:
        features = [self.stem(x)]
        for layer in self.first:
            features.append(layer(features))
        features = [self.transition(torch.cat(features, 1))]
        for layer in self.second:
            features.append(layer(features))
        return self.head(torch.cat(features, 1).mean((2, 3)))


class UNet(nn.Module):
    """Two levels, transposed convolution up, bilinear up, skip connections."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2, self.middle = self._double(1, 6), self._double(6, 12), self._double(12, 24)
        self.up2 = nn.ConvTranspose2d(24, 12, 2, stride=2)
        self.join2 = self._double(24, 12)
        self.up1 = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)
        self.join1 = self._double(18, 6)
        self.out = nn.Conv2d(6, 3, 1)

    @staticmethod
    def _double(inner: int, outer: int) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(inner, outer, 3, padding=1), nn.BatchNorm2d(outer), nn.ReLU(inplace=True),
            nn.Conv2d(outer, outer, 3, padding=1), nn.BatchNorm2d(outer), nn.ReLU(inplace=True),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        a = self.down1(x)
        b = self.down2(F.max_pool2d(a, 2))
        c = self.middle(F.max_pool2d(b, 2))
        c = self.join2(torch.cat([b, self.up2(c)], 1))
        return self.out(self.join1(torch.cat([a, self.up1(c)], 1)))


class Mixer(nn.Module):
    def __init__(self, patches: int = 16, width: int = 24) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, width, 4, 4)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(5))
        self.tokens = nn.ModuleList(self._mlp(patches) for _ in range(2))
        self.channels = nn.ModuleList(self._mlp(width) for _ in range(2))
        self.head = nn.Linear(width, 10)

    @staticmethod
    def _mlp(width: int) -> nn.Module:
        return nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        for i, (tokens, channels) in enumerate(zip(self.tokens, self.channels, strict=True)):
            x = x + tokens(self.norms[2 * i](x).mT).mT
            x = x + channels(self.norms[2 * i + 1](x))
        return self.head(self.norms[4](x).mean(1))


class LstmClassifier(nn.Module):
    def __init__(self, words: int = 3000) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, 12, padding_idx=0)
        self.lstm = nn.LSTM(12, 16, 2, batch_first=True, bidirectional=True, dropout=0.1)
        self.head = nn.Linear(32, 4)

    def forward(self, ids: Tensor) -> Tensor:
        _, (hidden, _) = self.lstm(self.embedding(ids))
        return self.head(torch.cat([hidden[-2], hidden[-1]], 1))


class WaveNet(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.start = nn.Conv1d(1, width, 1)
        self.gates = nn.ModuleList(nn.Conv1d(width, 2 * width, 2, dilation=2**i) for i in range(4))
        self.skips = nn.ModuleList(nn.Conv1d(width, width, 1) for _ in range(4))
        self.end = nn.Conv1d(width, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.start(x)
        total = torch.zeros_like(x)
        for i, (gate, skip) in enumerate(zip(self.gates, self.skips, strict=True)):
            signal, opening = gate(F.pad(x, (2**i, 0))).chunk(2, 1)
            out = skip(torch.tanh(signal) * torch.sigmoid(opening))
            x, total = x + out, total + out
        return self.end(F.relu(total))


class Vae(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU())
        self.mean, self.log_var = nn.Linear(32, 4), nn.Linear(32, 4)
        self.decode = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 64))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        hidden = self.encode(x)
        mean, log_var = self.mean(hidden), self.log_var(hidden)
        code = mean + torch.exp(0.5 * log_var) * torch.randn_like(mean)
        return self.decode(code), mean, log_var


def vae_loss(output: tuple[Tensor, Tensor, Tensor], target: Tensor) -> Tensor:
    image, mean, log_var = output
    rebuilt = F.binary_cross_entropy_with_logits(image, target.flatten(1), reduction="sum") / len(target)
    return rebuilt - 0.5 * (1 + log_var - mean.pow(2) - log_var.exp()).sum(1).mean()


def generator() -> nn.Module:
    return nn.Sequential(
        nn.ConvTranspose2d(8, 16, 4, 1, 0, bias=False), nn.BatchNorm2d(16), nn.ReLU(True),
        nn.ConvTranspose2d(16, 8, 4, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(True),
        nn.ConvTranspose2d(8, 1, 4, 2, 1, bias=False), nn.Tanh(),
    )  # fmt: skip


def discriminator() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 4, 2, 1, bias=False), nn.LeakyReLU(0.2, inplace=True),
        nn.Conv2d(8, 16, 4, 2, 1, bias=False), nn.BatchNorm2d(16), nn.LeakyReLU(0.2, inplace=True),
        nn.Conv2d(16, 1, 4, 1, 0, bias=False), nn.Flatten(0),
    )  # fmt: skip


class Fooling(nn.Module):
    """A generator in front of a frozen discriminator: the generator's half of a GAN's step."""

    def __init__(self) -> None:
        super().__init__()
        self.generator, self.discriminator = generator(), discriminator().requires_grad_(False)

    def forward(self, noise: Tensor) -> Tensor:
        return self.discriminator(self.generator(noise))


class Gcn(nn.Module):
    """Graph convolution: the normalized dense adjacency is a buffer."""

    def __init__(self, nodes: int = 24) -> None:
        super().__init__()
        edges = (torch.rand(nodes, nodes) < 0.2).float()
        adjacency = ((edges + edges.T) > 0).float().fill_diagonal_(1)
        degree = adjacency.sum(1).rsqrt()
        self.register_buffer("adjacency", degree[:, None] * adjacency * degree[None, :])
        self.first, self.second = nn.Linear(10, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(F.relu(self.adjacency @ self.first(x)), 0.2, self.training)
        return self.adjacency @ self.second(x)


class Policy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 32), nn.Tanh())
        self.actor, self.critic = nn.Linear(32, 3), nn.Linear(32, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.body(x)
        return self.actor(x), self.critic(x).squeeze(-1)


def ppo_loss(output: tuple[Tensor, Tensor], target: tuple[Tensor, ...]) -> Tensor:
    """Clipped surrogate, value loss and entropy bonus."""
    logits, value = output
    action, old, advantage, returns = target
    log_probs = F.log_softmax(logits, -1)
    new = log_probs.gather(1, action[:, None]).squeeze(1)
    ratio = torch.exp(new - old)
    surrogate = torch.min(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage).mean()
    entropy = -(log_probs.exp() * log_probs).sum(-1).mean()
    return -surrogate + 0.5 * F.mse_loss(value, returns) - 0.01 * entropy
