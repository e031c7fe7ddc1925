"""The models that must train: name -> model, loss, batch. Tiny sizes, random weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.models import networks as n
from tests.models import vision as v


@dataclass(frozen=True)
class Case:
    """`build()` -> (model, x, y). `exact`: small enough for exact fidelity. `quick`: runs in every CI run.

    `bound`: of the relative error of the first update; see `test_models.py`. `long`: has axes above 16384, which
    chips before A16 refuse.
    """

    build: Callable[[], tuple[nn.Module, Any, Any]]
    loss: Any = "cross_entropy"
    lr: float = 1e-2
    bound: float = 0.02
    exact: bool = False
    quick: bool = False
    long: bool = False


def images(model: nn.Module, size: int = 32, channels: int = 3, batch: int = 4) -> tuple[nn.Module, Any, Any]:
    return model, torch.randn(batch, channels, size, size), torch.randint(0, 10, (batch,))


class Logits(nn.Module):
    """A `transformers` model whose output is its logits (or first tensor), called by keywords or ids."""

    def __init__(self, model: nn.Module, key: str = "logits") -> None:
        super().__init__()
        self.model, self.key = model, key

    def forward(self, *args: Tensor, **inputs: Tensor) -> Tensor:
        return self.model(*args, **inputs)[self.key]


def hugging(name: str, config: Any, **options: Any) -> nn.Module:
    import transformers

    return Logits(getattr(transformers, name)(config), **options)


def next_token(logits: Tensor, ids: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def tokens(words: int, batch: int = 2, length: int = 12) -> Tensor:
    return torch.randint(0, words, (batch, length))


def gpt2() -> tuple[nn.Module, Any, Any]:
    from transformers import GPT2Config

    config = GPT2Config(vocab_size=96, n_positions=16, n_embd=32, n_layer=2, n_head=2)
    ids = tokens(96)
    return hugging("GPT2LMHeadModel", config), {"input_ids": ids}, ids


def bert() -> tuple[nn.Module, Any, Any]:
    from transformers import BertConfig

    config = BertConfig(
        vocab_size=3000, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=16, num_labels=3,
    )  # fmt: skip
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, 8:] = 0
    x = {"input_ids": tokens(3000), "attention_mask": mask}
    return hugging("BertForSequenceClassification", config), x, torch.tensor([0, 2])


class T5(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        from transformers import T5Config, T5EncoderModel

        config = T5Config(vocab_size=64, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2)
        self.encoder, self.head = T5EncoderModel(config), nn.Linear(32, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.encoder(ids).last_hidden_state.mean(1))


def llama() -> tuple[nn.Module, Any, Any]:
    from transformers import LlamaConfig

    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32,
    )  # fmt: skip
    ids = tokens(64)
    return hugging("LlamaForCausalLM", config), {"input_ids": ids}, ids


def vit() -> tuple[nn.Module, Any, Any]:
    from transformers import ViTConfig

    config = ViTConfig(
        image_size=16, patch_size=4, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64, num_labels=10,
    )  # fmt: skip
    return images(hugging("ViTForImageClassification", config), 16)


def swin() -> tuple[nn.Module, Any, Any]:
    from transformers import SwinConfig

    config = SwinConfig(
        image_size=32,
        patch_size=4,
        embed_dim=16,
        depths=[2, 2],
        num_heads=[2, 4],
        window_size=4,
        num_labels=10,
    )
    return images(hugging("SwinForImageClassification", config), 32, batch=2)


def convnext() -> tuple[nn.Module, Any, Any]:
    from transformers import ConvNextConfig

    config = ConvNextConfig(
        hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 2, 1], num_labels=10, drop_path_rate=0.1
    )
    return images(hugging("ConvNextForImageClassification", config), 64, batch=2)


def efficientnet() -> tuple[nn.Module, Any, Any]:
    return images(n.mobile(nn.SiLU, nn.Sigmoid, 5), 32)


def segmentation() -> tuple[nn.Module, Any, Any]:
    return n.UNet(), torch.randn(2, 1, 16, 16), torch.randint(0, 3, (2, 16, 16))


def policy() -> tuple[nn.Module, Any, Any]:
    target = (torch.randint(0, 3, (16,)), -torch.rand(16) - 0.6, torch.randn(16), torch.randn(16))
    return n.Policy(), torch.randn(16, 4), target


def two_views(model: nn.Module, target: Tensor) -> tuple[nn.Module, Any, Any]:
    return model, (torch.randn(6, 3, 4, 4), torch.randn(6, 3, 4, 4)), target


def edges() -> tuple[nn.Module, Any, Any]:
    x = torch.randn(20, 6), torch.randint(0, 20, (2, 40)), torch.arange(20) // 5
    return v.EdgeNetwork(), x, torch.randint(0, 3, (4,))


def simclr() -> tuple[nn.Module, Any, Any]:
    return v.SimClr(), (torch.randn(4, 3, 8, 8), torch.randn(4, 3, 8, 8)), torch.zeros(1)


def critic(norm: Any) -> tuple[nn.Module, Any, Any]:
    return v.Critic(norm), (torch.rand(4, 1, 8, 8), torch.rand(4, 1, 8, 8)), torch.zeros(1)


CASES: dict[str, Case] = {
    "resnet18": Case(lambda: images(n.resnet18(), 64, batch=8), bound=0.4),
    "mobilenet_v2": Case(lambda: images(n.mobile(nn.ReLU6, None, 3)), bound=0.1),
    "mobilenet_v3": Case(lambda: images(n.mobile(nn.Hardswish, nn.Hardsigmoid, 5))),
    "efficientnet": Case(efficientnet, bound=0.06),
    "convnext": Case(convnext, lr=3e-3),
    "vgg": Case(lambda: images(n.vgg())),
    "densenet": Case(lambda: images(n.DenseNet(), 16), bound=0.06),
    "unet": Case(segmentation, bound=0.15, quick=True),
    "vit": Case(vit),
    "mixer": Case(lambda: images(n.Mixer(), 16), exact=True),
    "swin": Case(swin),
    "gpt2": Case(gpt2, next_token),
    "bert": Case(bert),
    "t5_encoder": Case(lambda: (T5(), tokens(64), torch.tensor([0, 2]))),
    "llama": Case(llama, next_token, quick=True),
    "lstm": Case(lambda: (n.LstmClassifier(), tokens(3000, 4, 8), torch.randint(0, 4, (4,))), exact=True),
    "wavenet": Case(
        lambda: (n.WaveNet(), torch.randn(2, 1, 64), torch.randint(0, 16, (2, 64))), exact=True, quick=True
    ),
    "vae": Case(lambda: (n.Vae(), torch.rand(8, 1, 8, 8), torch.rand(8, 1, 8, 8)), n.vae_loss, exact=True),
    "gan_generator": Case(
        lambda: (n.Fooling(), torch.randn(4, 8, 1, 1), torch.ones(4)), "bce_with_logits", bound=0.06, exact=True
    ),
    "gan_discriminator": Case(
        lambda: (n.discriminator(), torch.randn(8, 1, 16, 16), (torch.arange(8) % 2).float()), "bce_with_logits",
        exact=True,
    ),
    "gcn": Case(lambda: (n.Gcn(), torch.randn(24, 10), torch.randint(0, 4, (24,))), exact=True, quick=True),
    "policy": Case(policy, n.ppo_loss, exact=True),
    "segnet": Case(lambda: (v.SegNet(), torch.randn(2, 3, 13, 12), torch.randint(0, 4, (2, 13, 12))), quick=True),
    "pyramid_pooling": Case(lambda: images(v.PyramidPooling(), 26), exact=True),
    # slopes of a noise image at places that fp16 rounds to 1/250 of a pixel
    "spatial_transformer": Case(lambda: images(v.SpatialTransformer(), 12, 1), bound=0.2),
    "edge_network": Case(edges, exact=True),
    "simclr": Case(simclr, lambda output, _: F.cross_entropy(*output), bound=0.03),
    "barlow_twins": Case(lambda: two_views(v.BarlowTwins(), torch.zeros(1)), lambda output, _: output, bound=0.06),
    "momentum": Case(lambda: two_views(v.Momentum(), torch.zeros(6, dtype=torch.long)), bound=0.06, quick=True),
    "wgan_gp": Case(lambda: critic(nn.utils.parametrizations.spectral_norm), v.wasserstein, lr=1e-3),
    "wgan_gp_old_norm": Case(lambda: critic(nn.utils.spectral_norm), v.wasserstein, lr=1e-3),
    "tcn": Case(lambda: (v.Tcn(), torch.randn(4, 2, 16), torch.randint(0, 4, (4,))), exact=True),
    "masked_autoencoder": Case(
        lambda: (v.MaskedAutoencoder(), torch.randn(4, 3, 16, 16), torch.zeros(1)), lambda output, _: output
    ),
    "real_nvp": Case(
        lambda: (v.RealNvp(), torch.randn(16, 2), torch.zeros(1)), lambda output, _: -output.mean(), exact=True
    ),
    "styled": Case(lambda: (v.Styled(), torch.randn(4, 6), torch.randn(4, 1, 6, 6)), "mse", quick=True),
    "v_net": Case(lambda: (v.VNet(), torch.randn(2, 1, 8, 8, 8), torch.randint(0, 2, (2, 8, 8, 8))), v.dice),
}  # fmt: skip
