"""Further models that must train: text, audio, tables, policies, physics; as `zoo.py`."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from tests.models import sequences as s
from tests.models.zoo import Case, hugging, tokens


def itself(loss: Tensor, target: Any) -> Tensor:
    """For models that return their loss."""
    return loss


class WithLabels(nn.Module):
    """A `transformers` model that is given labels and returns its loss."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: Tensor) -> Tensor:
        loss: Tensor = self.model(**inputs).loss
        return loss


def labelled(name: str, config: str, words: int = 64, **settings: Any) -> tuple[nn.Module, Any, Any]:
    """A causal language model with padding, masked labels, and its own loss."""
    import transformers

    model = getattr(transformers, name)(getattr(transformers, config)(**settings))
    ids, mask = tokens(words, 2, 8), torch.ones(2, 8, dtype=torch.long)
    mask[1, 6:] = 0
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    return WithLabels(model), inputs, torch.zeros(1)


def sizes(**more: Any) -> dict[str, Any]:
    common = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    return common | {"intermediate_size": 48} | more


def packed() -> tuple[nn.Module, Any, Any]:
    lengths = torch.tensor([4, 7, 2])
    hidden = torch.arange(7) >= lengths.unsqueeze(1)
    ids, tags = tokens(40, 3, 7).masked_fill(hidden, 0), torch.randint(0, 5, (3, 7)).masked_fill(hidden, -100)
    return s.PackedTagger(), (ids, lengths), tags


def crf() -> tuple[nn.Module, Any, Any]:
    mask = torch.arange(6) < torch.tensor([[6], [4], [3]])
    return s.Crf(), (tokens(30, 3, 6), torch.randint(0, 5, (3, 6)), mask), torch.zeros(1)


def fast_text() -> tuple[nn.Module, Any, Any]:
    return (
        s.FastText(),
        (torch.randint(0, 16_000, (12,)), torch.tensor([0, 3, 5, 9])),
        torch.randint(0, 4, (4,)),
    )


def translator() -> tuple[nn.Module, Any, Any]:
    hidden = torch.zeros(3, 6)
    hidden[1, 4:] = -math.inf
    return s.Translator(), (tokens(20, 3, 6), tokens(20, 3, 5), hidden), tokens(20, 3, 5)


def deep_fm() -> tuple[nn.Module, Any, Any]:
    x = torch.stack([torch.randint(0, n, (16,)) for n in (50, 50, 2048)], 1)
    return s.DeepFm(), x, torch.randint(0, 2, (16,)).float()


def ppo() -> tuple[nn.Module, Any, Any]:
    x = (torch.randn(16, 4), torch.randn(16, 2), -torch.rand(16) - 2, torch.randn(16), torch.randn(16))
    return s.ContinuousPpo(), x, torch.zeros(1)


def gpt2_of_default_vocabulary() -> tuple[nn.Module, Any, Any]:
    from transformers import GPT2Config

    ids = tokens(50_257, 2, 4)
    return hugging("GPT2LMHeadModel", GPT2Config(n_embd=16, n_layer=1, n_head=2)), {"input_ids": ids}, ids


def next_word(logits: Tensor, ids: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def small(outputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, outputs))


CASES: dict[str, Case] = {
    "packed_lstm": Case(packed, lr=0.05, exact=True),
    "crf": Case(crf, itself, lr=0.05, exact=True),
    "ctc": Case(
        lambda: (s.SpeechCtc(), torch.randn(3, 8, 8), (torch.randint(1, 6, (3, 3)), torch.tensor([3, 1, 2]))),
        s.ctc,
    ),
    "fast_text": Case(fast_text, lr=0.5, exact=True),
    "tcn": Case(lambda: (s.Tcn(), torch.randn(4, 2, 12), torch.randint(0, 4, (4,))), exact=True),
    "translator": Case(translator),
    "deep_fm": Case(deep_fm, "bce", lr=0.05, exact=True),
    "ppo_continuous": Case(ppo, itself, exact=True),
    "experts": Case(lambda: (s.Experts(), torch.randn(6, 8), torch.randn(6, 8)), "mse", lr=0.05, exact=True),
    "burgers": Case(
        lambda: (s.Burgers(), (torch.rand(12, 1) * 2 - 1, torch.rand(12, 1)), torch.zeros(1)), itself, exact=True
    ),
    "distillation": Case(
        lambda: (small(5), torch.randn(16, 6), (3 * torch.randn(16, 5), torch.randint(0, 5, (16,)))),
        s.distillation, quick=True,
    ),
    "gaussian": Case(lambda: (small(2), torch.randn(16, 6), torch.randn(16)), s.negative_log_likelihood, exact=True),
    "cox": Case(
        lambda: (small(1), torch.randn(12, 6), (torch.rand(12), (torch.rand(12) > 0.3).float())), s.cox, exact=True
    ),
    "gpt2_of_default_vocabulary": Case(gpt2_of_default_vocabulary, next_word, long=True),
    "gemma2": Case(
        lambda: labelled("Gemma2ForCausalLM", "Gemma2Config", **sizes(num_key_value_heads=2, head_dim=8)), itself
    ),
    "phi3": Case(
        lambda: labelled("Phi3ForCausalLM", "Phi3Config", **sizes(num_key_value_heads=2, pad_token_id=0)), itself
    ),
    "mixtral": Case(
        lambda: labelled(
            "MixtralForCausalLM", "MixtralConfig", **sizes(num_key_value_heads=2, num_local_experts=4)
        ),
        itself,
    ),
    "bloom": Case(
        lambda: labelled("BloomForCausalLM", "BloomConfig", vocab_size=64, hidden_size=32, n_layer=1, n_head=4), itself
    ),
    "mamba": Case(
        lambda: labelled(
            "MambaForCausalLM", "MambaConfig", vocab_size=64, hidden_size=16, num_hidden_layers=1, state_size=4
        ),
        itself,
    ),
}  # fmt: skip
