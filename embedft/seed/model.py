"""A Llama in plain PyTorch with transformers' parameter names, made to train fast on a CPU. Knows no data and no optimizer."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True, slots=True)
class Shape:
    """seed-lm's sizes; hidden and intermediate are multiples of 128 and heads are 64 wide, as quantizers and vLLM's kernels want."""

    vocab: int = 4096
    hidden: int = 256
    intermediate: int = 768
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    context: int = 2048
    rope_theta: float = 10_000.0

    def config(self) -> dict[str, Any]:
        """transformers' config.json of this shape."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": self.vocab,
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.hidden // self.heads,
            "max_position_embeddings": self.context,
            "rope_theta": self.rope_theta,
            "rope_parameters": {"rope_type": "default", "rope_theta": self.rope_theta},
            "rms_norm_eps": 1e-5,
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "attention_dropout": 0.0,
            "initializer_range": 0.02,
            "tie_word_embeddings": True,
            "use_cache": True,
            "bos_token_id": None,
            "eos_token_id": 3,
            "pad_token_id": 1,
            "dtype": "bfloat16",
        }

    def fields(self) -> dict[str, Any]:
        return asdict(self)


class Norm(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight, 1e-5)


class Attention(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.size = shape.heads, shape.kv_heads, shape.hidden // shape.heads
        self.q_proj = nn.Linear(shape.hidden, self.heads * self.size, bias=False)
        self.k_proj = nn.Linear(shape.hidden, self.kv_heads * self.size, bias=False)
        self.v_proj = nn.Linear(shape.hidden, self.kv_heads * self.size, bias=False)
        self.o_proj = nn.Linear(self.heads * self.size, shape.hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """The output, and the last head's attention logits before the mask, (batch, length, length)."""
        batch, length, _ = x.shape
        q = rotate(self.q_proj(x).view(batch, length, self.heads, self.size).transpose(1, 2), cos, sin)
        k = rotate(self.k_proj(x).view(batch, length, self.kv_heads, self.size).transpose(1, 2), cos, sin)
        v = self.v_proj(x).view(batch, length, self.kv_heads, self.size).transpose(1, 2)
        groups = self.heads // self.kv_heads
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        last = q[:, -1] @ k[:, -1].mT * self.size**-0.5
        return self.o_proj(y.transpose(1, 2).reshape(batch, length, -1)), last


class Mlp(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden, shape.intermediate, bias=False)
        self.up_proj = nn.Linear(shape.hidden, shape.intermediate, bias=False)
        self.down_proj = nn.Linear(shape.intermediate, shape.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.input_layernorm, self.self_attn = Norm(shape.hidden), Attention(shape)
        self.post_attention_layernorm, self.mlp = Norm(shape.hidden), Mlp(shape)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        attended, last = self.self_attn(self.input_layernorm(x), cos, sin)
        x = x + attended
        return x + self.mlp(self.post_attention_layernorm(x)), last


class Body(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(shape.vocab, shape.hidden)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.layers))
        self.norm = Norm(shape.hidden)


class SeedLM(nn.Module):
    """Llama with tied embeddings; `state_dict()` has the names that transformers' LlamaForCausalLM loads."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.model = Body(shape)
        size = shape.hidden // shape.heads
        frequency = shape.rope_theta ** (-torch.arange(0, size, 2).float() / size)
        angle = torch.outer(torch.arange(shape.context).float(), frequency).repeat(1, 2)  # (context, head size)
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                last = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(weight, std=0.02 / (2 * shape.layers) ** 0.5 if last else 0.02)

    def hidden(self, tokens: Tensor) -> tuple[Tensor, list[Tensor]]:
        """(batch, length) ids → (batch, length, hidden) after the last norm, and each layer's last head's attention logits."""
        length = tokens.shape[1]
        cos, sin = self.get_buffer("cos")[:length], self.get_buffer("sin")[:length]
        x = self.model.embed_tokens(tokens)
        heads: list[Tensor] = []
        for layer in self.model.layers:
            x, last = layer(x, cos, sin)
            heads.append(last)
        return self.model.norm(x), heads

    def forward(self, tokens: Tensor, targets: Tensor, weights: Tensor, sources: Tensor) -> tuple[Tensor, Tensor]:
        """Weighted mean of the next-token losses, and the guide's loss, both in nats; all inputs are (batch, length).

        The guide teaches copying, which is slow to appear by itself: the first layer's last head is to look at the previous token, and the
        next two layers' last heads at `sources`, the place to copy the next token from (-1: nowhere in particular).
        """
        x, heads = self.hidden(tokens)
        logits = F.linear(x, self.model.embed_tokens.weight).float()
        losses = F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.reshape(-1), reduction="none")
        previous = torch.arange(-1, tokens.shape[1] - 1, device=tokens.device).expand_as(tokens)
        guide = attention_loss(heads[0], previous)
        for head in heads[1:3]:
            guide = guide + attention_loss(head, sources)
        return (losses * weights.reshape(-1)).sum() / weights.sum(), guide


def attention_loss(logits: Tensor, sources: Tensor) -> Tensor:
    """Mean of -log(attention paid to `sources`) in nats, over the (batch, length) places whose source is not -1."""
    length = logits.shape[-1]
    causal = torch.ones(length, length, dtype=torch.bool, device=logits.device).tril()
    paid = F.log_softmax(logits.float().masked_fill(~causal, -1e9), dim=-1).gather(-1, sources.clamp(min=0)[..., None])[..., 0]
    counted = (sources >= 0).float()
    return -(paid * counted).sum() / counted.sum().clamp(min=1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding in Llama's half-split layout; x is (batch, heads, length, head size)."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin
