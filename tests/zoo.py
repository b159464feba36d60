"""Small networks of every kind, all from inputs with samples along dim 0 to outputs of shape [N, 3].

``ZOO`` is one list for many tests: each case builds a float64 model in evaluation mode and draws a batch.
Models whose samples would couple (batch statistics) or draw random numbers (dropout) do so after ``.train()``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

NUM_OUTPUTS = 3


@dataclass(frozen=True)
class Case:
    """One network and its kind of batch."""

    name: str
    build: Callable[[], nn.Module]
    sample_shape: tuple[int, ...]
    num_tokens: int | None = None  # inputs are token numbers below this
    by_rule: bool = False  # every trainable parameter has a layer rule
    tags: frozenset[str] = field(default_factory=frozenset)

    def model(self) -> nn.Module:
        """The network in float64 and evaluation mode, drawn from a seed of its own."""
        with torch.random.fork_rng([]):
            torch.manual_seed(1)
            model = self.build().double().eval()
            with torch.no_grad():
                model(self.batch(2)[0])  # lazy layers take their shapes
            for module in model.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_var is not None:
                    module.running_mean.normal_(std=0.5)
                    module.running_var.uniform_(0.5, 2.0)
                if isinstance(module, nn.modules.batchnorm._BatchNorm | nn.LayerNorm | nn.GroupNorm):
                    nn.init.uniform_(module.weight, 0.5, 1.5)
                    nn.init.normal_(module.bias, std=0.3)
        return model

    def batch(self, num_samples: int = 4, seed: int = 2) -> tuple[Tensor, Tensor]:
        """Inputs [N, *sample_shape] and class labels [N]."""
        generator = torch.Generator().manual_seed(seed)
        targets = torch.randint(NUM_OUTPUTS, (num_samples,), generator=generator)
        shape = (num_samples, *self.sample_shape)
        if self.num_tokens is not None:
            return torch.randint(self.num_tokens, shape, generator=generator), targets
        return torch.randn(shape, generator=generator, dtype=torch.float64), targets

    def __repr__(self) -> str:
        return self.name


def mlp() -> nn.Module:
    """Two hidden layers, one without bias."""
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 6, bias=False), nn.GELU(), nn.Linear(6, NUM_OUTPUTS))


def sequence_mlp() -> nn.Module:
    """Linear layers over two leading axes beside the sample axis, with layer and RMS norms."""
    return nn.Sequential(
        nn.Linear(4, 6),
        nn.LayerNorm(6),
        nn.GELU(),
        nn.Linear(6, 5),
        nn.RMSNorm(5),
        nn.Flatten(),
        nn.Linear(30, 3),
    )


def cnn() -> nn.Module:
    """Strides, every padding mode, dilation and groups."""
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 6, (3, 2), padding="same", dilation=(1, 2), groups=2, padding_mode="circular"),
        nn.GroupNorm(3, 6),
        nn.ReLU(inplace=True),
        nn.Conv2d(6, 4, 3, padding=(1, 2), padding_mode="reflect", bias=False),
        nn.Tanh(),
        nn.Conv2d(4, 4, 2, padding=1, padding_mode="replicate", groups=4),
        nn.Tanh(),
        nn.Conv2d(4, 5, (2, 3), padding="same"),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.LazyLinear(NUM_OUTPUTS),
    )


def cnn1d() -> nn.Module:
    """One spatial axis; positions outnumber samples."""
    return nn.Sequential(
        nn.Conv1d(2, 3, 4, stride=3, padding=2, dilation=2),
        nn.Tanh(),
        nn.Conv1d(3, 4, 2, padding="same", padding_mode="reflect"),
        nn.Flatten(),
        nn.LazyLinear(3),
    )


def cnn3d() -> nn.Module:
    """Three spatial axes."""
    return nn.Sequential(
        nn.Conv3d(2, 4, (2, 3, 1), stride=(1, 2, 1), padding=(1, 0, 0), groups=2),
        nn.BatchNorm3d(4),
        nn.Tanh(),
        nn.Conv3d(4, 3, 2, padding_mode="circular", padding=1),
        nn.Flatten(),
        nn.LazyLinear(3),
    )


class Block(nn.Module):
    """Basic residual block with in-place activations, as torchvision writes it."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample: nn.Module | None = None
        if stride != 1 or width_in != width:
            self.downsample = nn.Sequential(nn.Conv2d(width_in, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


def resnet18_narrow() -> nn.Module:
    """ResNet-18 in shape, a sixteenth of its width."""
    widths = [4, 4, 8, 16, 32]
    blocks: list[nn.Module] = []
    for stage in range(4):
        blocks.append(Block(widths[stage], widths[stage + 1], 1 if stage == 0 else 2))
        blocks.append(Block(widths[stage + 1], widths[stage + 1], 1))
    stem = [nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(inplace=True)]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 3))


class UsedTwice(nn.Module):
    """One linear layer and one convolution, each called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 3, padding=1)
        self.inner = nn.Linear(32, 32)
        self.head = nn.Linear(32, NUM_OUTPUTS)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(torch.tanh(self.conv(x))).flatten(1)
        return self.head(torch.tanh(self.inner(torch.tanh(self.inner(x)))))


class TiedLinear(nn.Module):
    """Two layers that own the same weight, each with a bias of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 5)
        self.second = nn.Linear(5, 5)
        self.second.weight = self.first.weight
        self.head = nn.Linear(5, NUM_OUTPUTS)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))


class TiedEmbedding(nn.Module):
    """Token embedding whose weight is the decoder's too."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(6, 4, padding_idx=1)
        self.mix = nn.Linear(4, 4)
        self.decoder = nn.Linear(4, 6, bias=False)
        self.decoder.weight = self.embedding.weight
        self.head = nn.Linear(6, NUM_OUTPUTS)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.decoder(torch.tanh(self.mix(self.embedding(tokens)))).mean(1))


class FunctionalUse(nn.Module):
    """A weight used in its layer and once more through ``torch.nn.functional``."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(5, 5)
        self.head = nn.Linear(5, NUM_OUTPUTS)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(F.linear(torch.tanh(self.fc(x)), self.fc.weight)))


class FunctionalDecoder(nn.Module):
    """A tied decoder that is written as a matrix product with the embedding's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(NUM_OUTPUTS, 4)
        self.mix = nn.Linear(4, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        return torch.tanh(self.mix(self.embedding(tokens))).mean(1) @ self.embedding.weight.T


class PositionEmbedding(nn.Module):
    """Learned positions: a layer whose first axis is not the samples, even when it is as long."""

    def __init__(self, num_positions: int = 4) -> None:
        super().__init__()
        self.tokens = nn.Embedding(7, 5)
        self.positions = nn.Embedding(num_positions, 5)
        self.norm = nn.LayerNorm(5)
        self.head = nn.Linear(5, NUM_OUTPUTS)

    def forward(self, tokens: Tensor) -> Tensor:
        places = torch.arange(tokens.shape[1], device=tokens.device)
        return self.head(torch.tanh(self.norm(self.tokens(tokens) + self.positions(places))).mean(1))


class TimeFirst(nn.Module):
    """A layer that sees time before samples."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(5, 4)
        self.head = nn.Linear(4, NUM_OUTPUTS)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.fc(x.transpose(0, 1))).cumsum(0)[-1])


class Frozen(nn.Module):
    """A frozen weight, a frozen bias, a frozen norm layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 6)
        self.norm = nn.LayerNorm(6)
        self.second = nn.Linear(6, 6)
        self.head = nn.Linear(6, NUM_OUTPUTS)
        self.first.weight.requires_grad_(False)
        self.norm.requires_grad_(False)
        self.second.bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.second(self.norm(self.first(x)))))


class Recurrent(nn.Module):
    """An LSTM or GRU over a sequence and a linear head."""

    def __init__(self, kind: type[nn.RNNBase], batch_first: bool) -> None:
        super().__init__()
        self.batch_first = batch_first
        self.rnn = kind(4, 5, batch_first=batch_first)
        self.head = nn.Linear(5, NUM_OUTPUTS)

    def forward(self, x: Tensor) -> Tensor:
        outputs, _ = self.rnn(x if self.batch_first else x.transpose(0, 1))
        return self.head(outputs.mean(1 if self.batch_first else 0))


class Attention(nn.Module):
    """Multi-head attention: a packed projection, and an output layer whose forward is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, NUM_OUTPUTS)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))


class Transformer(nn.Module):
    """One encoder layer of torch."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.2, batch_first=True, norm_first=True)
        self.head = nn.Linear(4, NUM_OUTPUTS)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x).mean(1))


class BareParameter(nn.Module):
    """A module with parameters of its own beside a layer's."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(5))
        self.fc = nn.Linear(5, 4)
        self.shift = nn.Parameter(torch.randn(()))
        self.head = nn.Linear(4, NUM_OUTPUTS)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.fc(x * self.scale) + self.shift))


class TransposedLinear(nn.Linear):
    """A linear layer with a forward of its own: the rule for ``nn.Linear`` must not be used."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.T, self.bias)


def overridden_forward() -> nn.Module:
    """A subclass of a known layer that computes something else."""
    return nn.Sequential(TransposedLinear(5, 5), nn.Tanh(), nn.Linear(5, NUM_OUTPUTS))


def parametrized() -> nn.Module:
    """Weights computed from other parameters, in torch's new way and in its old one."""
    first = nn.utils.parametrizations.weight_norm(nn.Linear(5, 6))
    second = nn.utils.spectral_norm(nn.Linear(6, 6))
    return nn.Sequential(first, nn.Tanh(), second, nn.Tanh(), nn.Linear(6, NUM_OUTPUTS))


class GPTBlock(nn.Module):
    """Token and position embeddings, one pre-norm block with causal attention, and a decoder tied to the tokens."""

    def __init__(self, width: int = 4, num_positions: int = 5) -> None:
        super().__init__()
        self.tokens = nn.Embedding(NUM_OUTPUTS, width)
        self.positions = nn.Embedding(num_positions, width)
        self.norm1, self.norm2, self.norm = nn.LayerNorm(width), nn.LayerNorm(width), nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)
        self.feed = nn.Sequential(nn.Linear(width, 6), nn.GELU(approximate="tanh"), nn.Linear(6, width))
        self.decoder = nn.Linear(width, NUM_OUTPUTS, bias=False)
        self.decoder.weight = self.tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        x = x + self.project(attention(self.query_key_value(self.norm1(x)), num_heads=2, is_causal=True))
        x = x + self.feed(self.norm2(x))
        return self.decoder(self.norm(x)).mean(1)


class VisionTransformer(nn.Module):
    """Patches, a class token and positions that are bare parameters, and one pre-norm block."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 2, stride=2)
        self.class_token = nn.Parameter(torch.randn(1, 1, width))
        self.positions = nn.Parameter(torch.randn(1, 5, width))
        self.norm1, self.norm2, self.norm = (nn.LayerNorm(width, eps=1e-6) for _ in range(3))
        self.query_key_value = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)
        self.feed = nn.Sequential(nn.Linear(width, 6), nn.GELU(), nn.Linear(6, width))
        self.head = nn.Linear(width, NUM_OUTPUTS)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_token.expand(len(x), -1, -1), x], 1) + self.positions
        x = x + self.project(attention(self.query_key_value(self.norm1(x)), num_heads=2, is_causal=False))
        x = x + self.feed(self.norm2(x))
        return self.head(self.norm(x[:, 0]))


class ConvNeXtBlock(nn.Module):
    """A stem of patches, a depthwise convolution, a norm and linear layers over channels, and a layer scale."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, width, 2, stride=2)
        self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.widen, self.narrow = nn.Linear(width, 8), nn.Linear(8, width)
        self.scale = nn.Parameter(torch.full((width,), 0.5))
        self.head = nn.Linear(width, NUM_OUTPUTS)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        y = self.scale * self.narrow(F.gelu(self.widen(y)))
        return self.head((x + y.permute(0, 3, 1, 2)).mean((2, 3)))


def attention(query_key_value: Tensor, num_heads: int, is_causal: bool) -> Tensor:
    """Of packed projections [N, T, 3 width]: [N, T, width]."""
    q, k, v = query_key_value.unflatten(2, (3, num_heads, -1)).permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(q, k, v, is_causal=is_causal).transpose(1, 2).flatten(2)


def rule(name: str, build: Callable[[], nn.Module], *sample_shape: int, num_tokens: int | None = None) -> Case:
    """A case all of whose parameters have a layer rule."""
    return Case(name, build, sample_shape, num_tokens, by_rule=True)


ZOO = [
    rule("mlp", mlp, 5),
    rule("sequence_mlp", sequence_mlp, 2, 3, 4),
    rule("cnn", cnn, 2, 9, 8),
    rule("cnn1d", cnn1d, 2, 25),
    rule("cnn3d", cnn3d, 2, 3, 5, 3),
    rule("resnet18_narrow", resnet18_narrow, 3, 16, 16),
    rule("used_twice", UsedTwice, 2, 4, 4),
    rule("tied_linear", TiedLinear, 5),
    rule("tied_embedding", TiedEmbedding, 5, num_tokens=6),
    rule("frozen", Frozen, 5),
    Case("functional_use", FunctionalUse, (5,)),
    Case("functional_decoder", FunctionalDecoder, (4,), num_tokens=NUM_OUTPUTS),
    rule("position_embedding", PositionEmbedding, 4, num_tokens=7),
    Case("time_first", TimeFirst, (4, 5)),
    Case("lstm", lambda: Recurrent(nn.LSTM, True), (3, 4)),
    Case("gru_time_first", lambda: Recurrent(nn.GRU, False), (4, 4)),
    Case("attention", Attention, (4, 4)),
    Case("transformer", Transformer, (4, 4)),
    Case("bare_parameter", BareParameter, (5,)),
    Case("overridden_forward", overridden_forward, (5,)),
    Case("parametrized", parametrized, (5,)),
    rule("gpt_block", GPTBlock, 5, num_tokens=NUM_OUTPUTS),
    Case("vision_transformer", VisionTransformer, (1, 4, 4)),
    Case("convnext_block", ConvNeXtBlock, (2, 6, 6)),
]
