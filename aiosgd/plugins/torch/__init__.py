"""PyTorch: models that are modules, data sets that are its data sets; needs the extra `torch`."""

from __future__ import annotations

from typing import Any

from aiosgd.errors import ConfigError


def load_torch(what: str) -> Any:
    """Import PyTorch; nobody else does, so that nothing waits for it who does not need it.

    Args:
        what: what needs it, for the message.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import torch  # noqa: PLC0415 - it takes seconds
    except ImportError as error:
        raise ConfigError(f"{what} needs PyTorch: pip install 'aiosgd[torch]'") from error
    return torch
