"""MNIST and Fashion-MNIST: found on this machine, or downloaded."""

from __future__ import annotations

import gzip
import hashlib
import http.client
import math
import os
import struct
import time
import urllib.request
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import numpy.typing as npt

from aiosgd.errors import ConfigError
from aiosgd.plugins.datasets.base import Data, DataFile, Dataset
from aiosgd.plugins.registry import describe

TRAIN_IMAGES, TRAIN_LABELS = "train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"
TEST_IMAGES, TEST_LABELS = "t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"
DIMENSIONS = {TRAIN_IMAGES: 3, TRAIN_LABELS: 1, TEST_IMAGES: 3, TEST_LABELS: 1}

# SHA-256 of the four files as LeCun, Cortes and Burges, and Zalando Research, published them.
DIGESTS: dict[str, dict[str, str]] = {
    "mnist": {
        TRAIN_IMAGES: "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
        TRAIN_LABELS: "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
        TEST_IMAGES: "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
        TEST_LABELS: "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
    },
    "fashion": {
        TRAIN_IMAGES: "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
        TRAIN_LABELS: "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
        TEST_IMAGES: "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
        TEST_LABELS: "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
    },
}
MIRRORS = {
    "mnist": (
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
        "https://storage.googleapis.com/cvdf-datasets/mnist/",
    ),
    "fashion": (
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
        "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
    ),
}


class Mnist(Dataset):
    """60,000 + 10,000 images of 28 x 28 pixels in ten classes: digits, or pieces of clothing.

    The four files, packed (.gz) or unpacked, are looked up in the folder for data, then in the
    user's cache (`$XDG_CACHE_HOME/aiosgd`), and downloaded into the folder for data where neither
    has them. Those of `fashion` have the same names and live in a folder `fashion` there.

    Source: LeCun, Bottou, Bengio and Haffner, Proc. IEEE 1998; Xiao, Rasul and Vollgraf,
    1708.07747 (fashion).
    """

    SOCKET_TIMEOUT: ClassVar[float] = 10.0
    FILE_TIMEOUT: ClassVar[float] = 300.0
    FILE_LIMIT: ClassVar[int] = 32 * 2**20  # the largest of the files has 26,421,880 bytes

    @dataclass(frozen=True)
    class Params:
        """Parameters.

        Attributes:
            variant: handwritten digits (`mnist`) or pieces of clothing (`fashion`).
        """

        variant: Literal["mnist", "fashion"] = "mnist"

    def files(self) -> list[DataFile]:
        """Locate the four files; download those that are missing."""
        found = {name: self._found(name) for name in DIMENSIONS}
        missing = [name for name, path in found.items() if path is None]
        return [
            DataFile.of(name, path or self._downloaded(name, missing))
            for name, path in found.items()
        ]

    def load(self, paths: Mapping[str, Path]) -> Data:
        """Read the files; pixels are scaled to 0 … 1."""
        read = {name: read_idx(paths[name], name, dims) for name, dims in DIMENSIONS.items()}
        try:
            return Data(
                train_x=np.divide(read[TRAIN_IMAGES], 255, dtype=np.float32),
                train_y=read[TRAIN_LABELS].astype(np.int64),
                test_x=np.divide(read[TEST_IMAGES], 255, dtype=np.float32),
                test_y=read[TEST_LABELS].astype(np.int64),
                classes=10,
            )
        except ValueError as error:
            raise ConfigError(f"dataset {self.params.variant}: {error}") from error

    @property
    def _folders(self) -> tuple[Path, Path]:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser())
        below = "" if self.params.variant == "mnist" else self.params.variant
        return self.data_dir / below, cache / "aiosgd" / below

    def _found(self, name: str) -> Path | None:
        """Return a file that is on this machine, checked, or None."""
        for folder in self._folders:
            packed, unpacked = folder / name, folder / name.removesuffix(".gz")
            if packed.is_file():
                digest = DIGESTS[self.params.variant][name]
                if DataFile.of(name, packed).sha256 != digest:
                    raise ConfigError(f"{packed}: has not SHA-256 {digest}; delete it or unpack it")
                return packed
            if unpacked.is_file():
                read_idx(unpacked, str(unpacked), DIMENSIONS[name])
                return unpacked
        return None

    def _downloaded(self, name: str, missing: Sequence[str]) -> Path:
        """Return where the file is after one of the mirrors gave it.

        Raises:
            ConfigError: none did; the message lists all files in `missing`.
        """
        reasons = []
        folder, cache = self._folders
        for url in (mirror + name for mirror in MIRRORS[self.params.variant]):
            try:
                content = self._fetched(url)
            except (OSError, http.client.HTTPException) as error:
                reasons.append(f"{url}: {describe(error)}")
                continue
            digest = DIGESTS[self.params.variant][name]
            if hashlib.sha256(content).hexdigest() == digest:
                return _stored(content, folder / name)
            reasons.append(f"{url}: has not SHA-256 {digest}")
        raise ConfigError(
            f"dataset mnist ({self.params.variant}): {', '.join(missing)} not found in "
            f"{' or '.join(map(str, dict.fromkeys((folder, cache))))}, and the download failed "
            f"({'; '.join(reasons)}); put the files, packed or unpacked, into {folder}"
        )

    def _fetched(self, url: str) -> bytes:
        """Download a file of at most `FILE_LIMIT` bytes in at most `FILE_TIMEOUT` seconds.

        Raises:
            OSError, HTTPException: no answer, an error's status, too long, or out of time.
        """
        end = time.monotonic() + self.FILE_TIMEOUT
        content = bytearray()
        with urllib.request.urlopen(url, timeout=self.SOCKET_TIMEOUT) as response:  # noqa: S310
            while piece := response.read1(2**16):
                content += piece
                if len(content) > self.FILE_LIMIT:
                    raise OSError(f"more than {self.FILE_LIMIT} bytes")
                if time.monotonic() > end:
                    raise TimeoutError(f"{len(content)} bytes after {self.FILE_TIMEOUT} s")
        return bytes(content)


def _stored(content: bytes, path: Path) -> Path:
    """Write a file that is either complete or not there."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            part.write_bytes(content)
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({describe(error)})") from error
    return path


def read_idx(path: Path, place: str, dimensions: int) -> npt.NDArray[np.uint8]:
    """Read an IDX file of unsigned bytes, packed by gzip or not.

    Its format: two zero bytes, the type (8: unsigned byte), the number of dimensions, each
    dimension as a big-endian 32-bit number, the values.

    Args:
        path: where its content is.
        place: what messages call it.
        dimensions: how many it must have.

    Raises:
        ConfigError: it cannot be read, or is not exactly that.
    """
    try:
        content = path.read_bytes()
        if content.startswith(b"\x1f\x8b"):
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise ConfigError(f"{place}: cannot be read ({describe(error)})") from error
    magic, start = bytes((0, 0, 8, dimensions)), 4 + 4 * dimensions
    if content[:4] != magic or len(content) < start:
        raise ConfigError(
            f"{place}: starts with {content[:4].hex() or 'nothing'}; expected {magic.hex()}, an IDX "
            f"file of bytes with {dimensions} dimensions"
        )
    shape = struct.unpack(f">{dimensions}I", content[4:start])
    if len(content) - start != math.prod(shape):
        raise ConfigError(
            f"{place}: has {len(content) - start} bytes of values; its header says "
            f"{math.prod(shape)}"
        )
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)
