"""A small convolutional network for the handwritten digits that come with aiosgd: 8 x 8 pixels."""

from torch import nn


def make_cnn(width: int = 16, dropout: float = 0.25) -> nn.Module:
    """Return it.

    Args:
        width: channels of the first layer.
        dropout: share of the pooled activations that are left out of each training step.
    """
    return nn.Sequential(
        nn.Unflatten(1, (1, 8)),  # (n, 8, 8) -> (n, 1, 8, 8): one channel
        nn.Conv2d(1, width, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Dropout(dropout),
        nn.Flatten(),
        nn.Linear(2 * width * 16, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )
