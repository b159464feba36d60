"""What the reference networks are built of: plain stacks, residual blocks, a small transformer."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["CharGPT", "LayerStack", "PlainResNet"]


class LayerStack:
    """Collects the layers of a plain network under readable names, and knows the sizes between them.

    Args:
        channels: channels of the images, or features.
        image_size: height and width of the images; None for features, and where sizes do not matter.
        batch_norm: whether hidden layers are followed by a batch norm, then a ReLU.
        bias_before_norm: whether these layers have a bias all the same.
    """

    def __init__(
        self,
        channels: int,
        image_size: int | None,
        batch_norm: bool = False,
        bias_before_norm: bool = True,
    ) -> None:
        self._layers: OrderedDict[str, nn.Module] = OrderedDict()
        self._channels, self._size, self._first_size = channels, image_size, image_size
        self._batch_norm, self._bias = batch_norm, bias_before_norm or not batch_norm
        self._index = 0
        self._flat = False

    def conv(self, channels: int, kernel: int = 3, padding: int | None = None, stride: int = 1) -> LayerStack:
        """Append a hidden convolution; 3x3 ones keep the size unless told otherwise."""
        if padding is None:
            padding = 1 if kernel == 3 else 0
        layer = nn.Conv2d(self._channels, channels, kernel, stride=stride, padding=padding, bias=self._bias)
        self._hidden("conv", layer, channels, nn.BatchNorm2d)
        if self._size is not None:
            self._size = (self._size + 2 * padding - kernel) // stride + 1
        return self

    def pool(self) -> LayerStack:
        """Append a max pooling that halves the size."""
        self._layers[f"pool{self._index}"] = nn.MaxPool2d(2)
        if self._size is not None:
            self._size //= 2
        return self

    def linear(self, features: int) -> LayerStack:
        """Append a hidden linear layer."""
        self._flatten()
        self._hidden("linear", nn.Linear(self._channels, features, bias=self._bias), features, nn.BatchNorm1d)
        return self

    def output(self, num_classes: int) -> nn.Sequential:
        """Append a linear output layer and return the network."""
        self._flatten()
        self._layers["output"] = nn.Linear(self._channels, num_classes)
        return nn.Sequential(self._layers)

    def score_map(self, num_classes: int) -> nn.Sequential:
        """Append a convolution to class scores that are averaged over positions, and return the network."""
        self._layers["output"] = nn.Conv2d(self._channels, num_classes, 3, padding=1)
        self._layers["average"] = nn.AdaptiveAvgPool2d(1)
        self._layers["flatten"] = nn.Flatten()
        return nn.Sequential(self._layers)

    def _hidden(self, kind: str, layer: nn.Module, width: int, norm: Callable[[int], nn.Module]) -> None:
        self._index += 1
        self._layers[f"{kind}{self._index}"] = layer
        if self._batch_norm:
            self._layers[f"norm{self._index}"] = norm(width)
        self._layers[f"relu{self._index}"] = nn.ReLU()
        self._channels = width

    def _flatten(self) -> None:
        if self._flat:
            return
        self._flat = True
        self._layers["flatten"] = nn.Flatten()
        if self._size is not None:
            if self._size < 1:
                raise ValueError(
                    f"image_size={self._first_size}: nothing is left of it after the last pooling; give "
                    "larger images, or take a network with fewer poolings (cnn_small takes 4 and above)."
                )
            self._channels *= self._size**2


class PlainResNet(nn.Module):
    """Residual network without normalisation, after He et al. (2016), section 4.2.

    A 3x3 stem to 16 channels; three stages of widths 16-32-64, the second and third starting with stride 2;
    global average pooling; a linear layer. A block is relu(shortcut(x) + conv(relu(conv(x)))) with 3x3
    convolutions. We differ from the source in that no layer is normalised, every convolution has a bias, and
    the shortcut is a 1x1 convolution wherever the shape changes.

    Args:
        blocks_per_stage: n for a network of 6 n + 2 layers.
        in_channels: channels of the images.
        num_classes: outputs.
    """

    def __init__(self, blocks_per_stage: int, *, in_channels: int = 3, num_classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Conv2d(in_channels, 16, 3, padding=1)
        blocks: list[nn.Module] = []
        channels = 16
        for width in (16, 32, 64):
            for _ in range(blocks_per_stage):
                blocks.append(_PlainBlock(channels, width, stride=width // channels))
                channels = width
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(channels, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [N, num_classes] of images [N, in_channels, H, W]."""
        features: Tensor = self.blocks(F.relu(self.stem(images)))
        logits: Tensor = self.head(features.mean((2, 3)))
        return logits


class _PlainBlock(nn.Module):
    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        same = stride == 1 and in_channels == channels
        self.shortcut = nn.Identity() if same else nn.Conv2d(in_channels, channels, 1, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.shortcut(x) + self.conv2(F.relu(self.conv1(x))))


class CharGPT(nn.Module):
    """Decoder-only transformer with pre-norm blocks x + attention(norm(x)), x + feed_forward(norm(x)).

    Learned positions (a bare parameter), causal attention through one packed query-key-value layer,
    feed-forward layers four times as wide with ReLU, a last layer norm, an output layer that is not tied to
    the embedding. Token and position embeddings start normal with standard deviation 0.02, the rest as
    PyTorch has it. No dropout.

    Args:
        vocabulary_size: number of tokens.
        context: longest sequence.
        width: features per token, a multiple of ``num_heads``.
        num_heads: attention heads.
        num_blocks: blocks.

    Raises:
        ValueError: the heads do not divide the width.
    """

    def __init__(
        self,
        vocabulary_size: int,
        *,
        context: int = 48,
        width: int = 48,
        num_heads: int = 4,
        num_blocks: int = 2,
    ) -> None:
        super().__init__()
        if width % num_heads:
            raise ValueError(
                f"width={width}, num_heads={num_heads}: heads must divide the width; try {num_heads * 12}."
            )
        self.tokens = nn.Embedding(vocabulary_size, width)
        self.positions = nn.Parameter(torch.empty(context, width))
        self.blocks = nn.Sequential(*(_TransformerBlock(width, num_heads) for _ in range(num_blocks)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary_size)
        nn.init.normal_(self.tokens.weight, std=0.02)
        nn.init.normal_(self.positions, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits [N, T, vocabulary_size] of the token after each of tokens [N, T]."""
        length, context = tokens.shape[1], len(self.positions)
        if length > context:
            raise ValueError(f"{length} tokens in a row: must be at most context={context}; cut the windows.")
        logits: Tensor = self.head(self.norm(self.blocks(self.tokens(tokens) + self.positions[:length])))
        return logits


class _TransformerBlock(nn.Module):
    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm1 = nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.projection = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.expand = nn.Linear(width, 4 * width)
        self.contract = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        samples, length, width = x.shape
        packed = self.query_key_value(self.norm1(x)).view(samples, length, 3, self.num_heads, -1)
        query, key, value = packed.permute(2, 0, 3, 1, 4)  # each [N, heads, T, width / heads]
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.projection(mixed.transpose(1, 2).reshape(samples, length, width))
        out: Tensor = x + self.contract(F.relu(self.expand(self.norm2(x))))
        return out
