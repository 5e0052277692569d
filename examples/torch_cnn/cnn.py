"""A small convolutional network for the handwritten digits that come with aiosgd: 8 x 8 pixels."""

from torch import nn


def make_cnn(width: int = 16) -> nn.Module:
    """Return it; `width` is how many channels the first layer has."""
    return nn.Sequential(
        nn.Unflatten(1, (1, 8)),  # (n, 8, 8) -> (n, 1, 8, 8): one channel
        nn.Conv2d(1, width, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(2 * width * 16, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )
