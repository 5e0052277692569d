"""Quantisers: each number becomes one of a few levels, of a block's scale or of its own."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from aiosgd.plugins.compressors.base import Array, Compressor
from aiosgd.plugins.compressors.packing import (
    CHUNK,
    FLOOR,
    Bytes,
    Dither,
    Floats,
    Quantiser,
    check_codes,
    check_values,
    chunks,
    pack,
    packed_size,
    unpack,
)

INFINITE = 0x7F80  # the exponent of infinities and NaN in bfloat16


class Bf16(Compressor):
    """Half the bytes and all of float32's range: bfloat16, rounded to nearest, ties to even.

    Rule: the upper half of the float32, rounded. Payload: uint16 in the array's shape, 2n bytes.

    Law: relative error at most 2**-8 for magnitudes from 2**-126 on, absolute error at most
    2**-134 below; `delta` leaves the latter aside, whose squares float32 cannot hold. What would
    round to an infinity (3.3962e38 and more), infinities and NaN are errors.
    """

    def delta(self, size: int) -> float:
        """Return 1 - 2**-16: the square of the relative error is lost."""
        return 1 - 2.0**-16

    def nbytes(self, size: int) -> int:
        """Return the bytes of the payload."""
        return 2 * size

    def compress(self, array: Array, stream: str | None) -> Any:
        """Return the upper halves, in the array's shape."""
        if array.dtype.kind != "f":
            raise ValueError(f"array is {array.dtype}; expected a float array")
        with np.errstate(over="ignore", under="ignore"):  # an infinity is refused below
            words = np.ascontiguousarray(array, np.float32).reshape(-1).view(np.uint32)
        halves = np.empty(words.size, np.uint16)
        for where in chunks(words.size):
            rounded = words[where] >> 16
            rounded &= 1
            rounded += 0x7FFF  # half a unit less one, and one more if the last bit is odd
            rounded += words[where]
            rounded >>= 16
            np.copyto(halves[where], rounded, casting="unsafe")
            # a NaN of all ones wraps round, hence the look at what went in
            if (rounded & INFINITE).max() == INFINITE or not _finite(words[where]):
                raise ValueError(
                    f"a value in stream {stream!r} is not finite as bf16, which ends at 3.3895e38"
                )
        return halves.reshape(array.shape)

    def decompress(self, payload: Any) -> Array:
        """Return the values as float32."""
        if not isinstance(payload, np.ndarray) or payload.dtype != np.uint16:
            kind = getattr(payload, "dtype", type(payload).__name__)
            raise ValueError(f"payload is {kind}; expected an array of uint16")
        halves = np.ascontiguousarray(payload).reshape(-1)
        words = np.empty(halves.size, np.uint32)
        for where in chunks(halves.size):
            np.copyto(words[where], halves[where])
            words[where] <<= 16
            if not _finite(words[where]):
                raise ValueError("payload has a value that is not finite")
        return words.view(np.float32).reshape(payload.shape)


def _finite(words: npt.NDArray[np.uint32]) -> bool:
    return bool(np.isfinite(words.view(np.float32)).all())


class Uniform(Quantiser):
    """Levels at equal distances, -s … s times a block's step, s = 2**(bits - 1) - 1.

    Rule: C(x) = Δ ⌊x/Δ + u⌋, Δ = ‖block‖ / s, u uniform in [0, 1); ⌊ ⌋ of the signed value, for
    cutting towards zero would be biased. A block all below 2**-100 becomes zeros.
    Payload: "scales", Δ of each block as float32, and "codes" of `bits` bits.
    """

    bits: int
    block: int  # elements; a power of two up to CHUNK

    @property
    def top(self) -> int:
        """Return s."""
        return int(2 ** (self.bits - 1)) - 1

    def layout(self, size: int) -> dict[str, tuple[type[np.generic], int]]:
        """Return a float32 for each block and the packed codes."""
        codes = packed_size(size, self.bits)
        return {"scales": (np.float32, -(-size // self.block)), "codes": (np.uint8, codes)}

    def steps(self, blocks: Floats) -> Floats:
        """Return Δ of each row: the largest magnitude over s.

        Raises:
            OverflowError: a value is not finite or above LIMIT.
        """
        largest: Floats = np.abs(blocks).max(axis=1)
        check_values(largest)
        largest[largest < FLOOR] = 0
        largest /= np.float32(self.top)
        return largest

    def dither(self, size: int) -> Dither | None:
        """Return what u is taken from; None is u = 1/2, that is, round to nearest."""
        return Dither(self.rng, size)

    def encode(self, flat: Floats, **out: Array) -> None:
        """Work through the array chunk by chunk."""
        dither = self.dither(flat.size)
        for where in chunks(flat.size):
            blocks = self._blocks(flat[where])
            of_chunk = slice(where.start // self.block, -(-where.stop // self.block))
            out["scales"][of_chunk] = steps = self.steps(blocks)
            values = (blocks * reciprocals(steps)[:, None]).reshape(-1)[: where.stop - where.start]
            codes = round_up(values, self.top, dither, where)
            packed = slice(where.start * self.bits // 8, packed_size(where.stop, self.bits))
            out["codes"][packed] = pack(codes, self.bits)

    def decode(self, flat: Floats, **vectors: Array) -> None:
        """Multiply codes with scales, chunk by chunk."""
        for where in chunks(flat.size):
            packed = slice(where.start * self.bits // 8, packed_size(where.stop, self.bits))
            steps = vectors["scales"][where.start // self.block : -(-where.stop // self.block)]
            codes = unpack(vectors["codes"][packed], self.bits, where.stop - where.start)
            check_codes(codes, 2 * self.top)
            blocks = self._blocks(codes.astype(np.float32) - np.float32(self.top))
            blocks *= steps[:, None]
            flat[where] = blocks.reshape(-1)[: codes.size]

    def _blocks(self, values: Floats) -> Floats:
        """Return the values of a chunk, one block per row, the last filled up with zeros."""
        missing = -values.size % self.block
        return (np.pad(values, (0, missing)) if missing else values).reshape(-1, self.block)

    def bound(self, size: int) -> float:
        """Return ω of stochastic rounding.

        An element's variance is Δ² p (1 - p), at most Δ²/4 and at most Δ |x|; the norm that Δ is
        made of is at most ‖block‖₂.
        """
        d, s = min(self.block, size), self.top
        return min(d / (4 * s**2), math.sqrt(d) / s)


def reciprocals(steps: Floats) -> Floats:
    """Return 1/Δ, and 0 for Δ = 0, whose values all become zero."""
    ones = np.ones_like(steps)
    return np.divide(ones, steps, out=np.zeros_like(steps), where=steps > 0)


def round_up(values: Floats, top: int, dither: Dither | None, where: slice) -> Bytes:
    """Return ⌊value + u⌋ + top as codes 0 … 2 top, for values of -top … top; changes `values`."""
    values += np.float32(top + 0.5) if dither is None else dither.floats(where, top)
    codes = values.astype(np.uint8)  # nothing is below 0, so to cut is to round down
    return np.minimum(codes, np.uint8(2 * top), out=codes)  # u next to 1 rounds up to the next one


def _largest(flat: Floats) -> float:
    """Return the largest magnitude.

    Raises:
        OverflowError: it is not finite or above LIMIT.
    """
    found = np.array([np.abs(flat[where]).max() for where in chunks(flat.size)], np.float32)
    check_values(found)
    return float(found.max(initial=0))


def _check_block(block: int) -> None:
    if not (8 <= block <= CHUNK and block & (block - 1) == 0):
        raise ValueError(f"block is {block}; expected a power of two from 8 to {CHUNK}")


def _check_bits(bits: int, most: int = 8) -> None:
    if not 2 <= bits <= most:
        raise ValueError(f"bits is {bits}; expected 2 to {most}")


class Int8(Uniform):
    """A byte per element: 255 levels of a block's largest magnitude.

    Rule: `Uniform` with 8 bits; nearest: u = 1/2. Traffic: n + 4 ⌈n / block⌉ bytes.
    Source: Dettmers, "8-Bit Approximations for Parallelism in Deep Learning", ICLR 2016.
    Law: |error| ≤ Δ/2 nearest, < Δ stochastic, which is unbiased.
    """

    bits = 8

    @dataclass(frozen=True)
    class Params:
        """Of int8.

        Attributes:
            block: elements that share a scale, a power of two.
            rounding: to the nearest level, or stochastic.
        """

        block: int = 256
        rounding: Literal["nearest", "stochastic"] = "nearest"

        def __post_init__(self) -> None:
            _check_block(self.block)

    def __init__(self, params: Params, rng: np.random.Generator) -> None:
        super().__init__(params, rng)
        self.block = params.block
        self.unbiased = self.stochastic = params.rounding == "stochastic"

    def dither(self, size: int) -> Dither | None:
        """Return some for stochastic rounding only."""
        return super().dither(size) if self.stochastic else None

    def omega(self, size: int) -> float | None:
        """Return ω where rounding is stochastic."""
        return self.bound(size) if self.stochastic else None

    def delta(self, size: int) -> float | None:
        """Return δ: the largest of a block is kept, of the others at most Δ/2 each is lost."""
        if self.stochastic:
            return 1 - self.bound(size) if self.bound(size) < 1 else None
        return 1 / (1 + max(0, min(self.block, size) - 1) / (4 * self.top**2))


class Qsgd(Uniform):
    """Quantised SGD: signed levels at random, without bias.

    Rule: `Uniform`, ‖block‖ its Euclidean norm or its largest magnitude.
    Traffic: ⌈bits · n / 8⌉ + 4 ⌈n / block⌉ bytes; the sign is one of the bits.
    Source: Alistarh, Grubic, Li, Tomioka, Vojnović, "QSGD: Communication-Efficient SGD via
    Gradient Quantization and Encoding", NIPS 2017; codes of fixed length instead of Elias codes.
    Law: E C(x) = x, ω = min(d / 4s², √d / s) for blocks of d.
    """

    unbiased = True

    @dataclass(frozen=True)
    class Params:
        """Of qsgd.

        Attributes:
            bits: per element, sign included, 2 to 8.
            block: elements that share a scale, a power of two.
            norm: of a block; levels reach as far, so with l2 most of them stay unused.
        """

        bits: int = 4
        block: int = 256
        norm: Literal["max", "l2"] = "max"

        def __post_init__(self) -> None:
            _check_bits(self.bits)
            _check_block(self.block)

    def __init__(self, params: Params, rng: np.random.Generator) -> None:
        super().__init__(params, rng)
        self.bits, self.block = params.bits, params.block

    def steps(self, blocks: Floats) -> Floats:
        """Return Δ of each row, as the norm wants it."""
        largest = super().steps(blocks)
        if self.params.norm == "max":
            return largest
        parts = blocks * (reciprocals(largest) / self.top)[:, None]  # no square leaves the range
        norms: Floats = largest * np.sqrt(np.einsum("ij,ij->i", parts, parts))
        return norms

    def omega(self, size: int) -> float:
        """Return ω of one block, which the whole has too."""
        return self.bound(size)

    def delta(self, size: int) -> float | None:
        """Return 1 - ω, where there are levels enough."""
        return 1 - self.bound(size) if self.bound(size) < 1 else None


class TernGrad(Quantiser):
    """Ternary gradients: -s, 0 or s.

    Rule: C(x) = s ⌊x/s + u⌋, s = max |x| over the whole array: s · sign(x) with probability
    |x|/s. With `clip`, x is first clipped to ± clip · sigma, sigma its standard deviation.
    Traffic: ⌈n / 4⌉ + 4 bytes.
    Source: Wen et al., "TernGrad: Ternary Gradients to Reduce Communication in Distributed Deep
    Learning", NIPS 2017.
    Law: E C(x) = x without clipping, ω = (√n - 1) / 2.
    """

    @dataclass(frozen=True)
    class Params:
        """Of terngrad.

        Attributes:
            clip: in standard deviations, 2.5 in the paper; 0 does not clip, and only then it is
                unbiased.
        """

        clip: float = 0.0

        def __post_init__(self) -> None:
            if not 0 <= self.clip < math.inf:
                raise ValueError(f"clip is {self.clip}; expected 0 or more")

    def __init__(self, params: Params, rng: np.random.Generator) -> None:
        super().__init__(params, rng)
        self.unbiased = params.clip == 0

    def layout(self, size: int) -> dict[str, tuple[type[np.generic], int]]:
        """Return the scale and codes of two bits."""
        return {"scales": (np.float32, 1), "codes": (np.uint8, packed_size(size, 2))}

    def omega(self, size: int) -> float | None:
        """Return ω: E‖C(x) - x‖² = s ‖x‖₁ - ‖x‖², largest at one 1 and n - 1 times 1/(1 + √n)."""
        return max(0.0, (math.sqrt(size) - 1) / 2) if self.unbiased else None

    def encode(self, flat: Floats, **out: Array) -> None:
        """Find the scale, then quantise chunk by chunk."""
        scale = _largest(flat)
        if self.params.clip and flat.size:
            scale = min(scale, self.params.clip * scale * _deviation(flat, scale))
        out["scales"][0] = scale = scale if scale >= FLOOR else 0.0
        inverse = np.float32(1 / scale if scale else 0)
        dither = Dither(self.rng, flat.size)
        for where in chunks(flat.size):
            values = flat[where] * inverse
            np.clip(values, -1, 1, out=values)
            packed = slice(where.start // 4, packed_size(where.stop, 2))
            out["codes"][packed] = pack(round_up(values, 1, dither, where), 2)

    def decode(self, flat: Floats, **vectors: Array) -> None:
        """Multiply codes with the scale."""
        for where in chunks(flat.size):
            packed = vectors["codes"][where.start // 4 : packed_size(where.stop, 2)]
            codes = unpack(packed, 2, where.stop - where.start)
            check_codes(codes, 2)
            np.subtract(codes, np.float32(1), out=flat[where])
            flat[where] *= vectors["scales"][0]


def _deviation(flat: Floats, scale: float) -> float:
    """Return the standard deviation in units of the scale, so that no square leaves the range."""
    inverse = np.float32(1 / scale if scale >= FLOOR else 0)
    parts = [flat[where] * inverse for where in chunks(flat.size)]
    mean = sum(float(part.sum()) for part in parts) / flat.size
    return math.sqrt(max(0.0, sum(float(part @ part) for part in parts) / flat.size - mean**2))


class Natural(Quantiser):
    """Natural compression: a power of two, next below or above, without bias.

    Rule: for 2ᵉ ≤ |x| < 2ᵉ⁺¹: sign(x) 2ᵉ⁺¹ with probability |x|/2ᵉ - 1, else sign(x) 2ᵉ; below
    2**-126, 0 or 2**-126. Traffic: 9 bits per element, n + ⌈n / 8⌉ bytes; no scale.
    Source: Horváth et al., "Natural Compression for Distributed Deep Learning", 2019.
    Law: E C(x) = x, ω = 1/8; for magnitudes below 2**-126 unbiased only.
    """

    unbiased = True

    def omega(self, size: int) -> float:
        """Return 1/8: p (1 - p) / (1 + p)² is largest at p = 1/3."""
        return 1 / 8

    def delta(self, size: int) -> float:
        """Return 1 - ω."""
        return 7 / 8

    def layout(self, size: int) -> dict[str, tuple[type[np.generic], int]]:
        """Return exponents as float32 has them, and signs."""
        return {"exponents": (np.uint8, size), "signs": (np.uint8, packed_size(size, 1))}

    def encode(self, flat: Floats, **out: Array) -> None:
        """Add random bits to the mantissa; the carry makes the exponent the next."""
        dither = Dither(self.rng, flat.size)
        for where in chunks(flat.size):
            check_values(np.abs(flat[where]))
            words = dither.integers(where)
            words += flat[where].view(np.uint32)
            words >>= 23
            np.copyto(out["exponents"][where], words, casting="unsafe")
            signs = slice(where.start // 8, packed_size(where.stop, 1))
            out["signs"][signs] = np.packbits(np.signbit(flat[where]))

    def decode(self, flat: Floats, **vectors: Array) -> None:
        """Put the words together again."""
        check_codes(vectors["exponents"], 254)
        for where in chunks(flat.size):
            words = flat[where].view(np.uint32)
            signs = vectors["signs"][where.start // 8 : packed_size(where.stop, 1)]
            np.copyto(words, np.unpackbits(signs, count=words.size))
            words <<= 8
            words |= vectors["exponents"][where]
            words <<= 23


class Sgq(Quantiser):
    """Stochastic quantisation on levels spaced by the cotangent: dense near zero, wide outside.

    Rule: C(x) = alpha b, b = Q(x/alpha); Q rounds at random to one of the two levels beside, without bias,
    and to the outermost beyond it. Levels: 0 and ± cot(kπ / 4K), k = 1 … K, K = (2^bits - 1) // 2
    (2 bits: 0, ±1; 3 bits: 0, ±1, ±1.732, ±3.732). alpha is fitted: three times b = Q(x/alpha),
    alpha = ⟨b, x⟩ / (‖b‖² + 1), from alpha = 0.7; where b is zero, alpha puts the largest magnitude
    on the outermost level instead.
    Traffic: ⌈bits · n / 8⌉ + 4 bytes.
    Source: the default of this package's first generation.
    Law: biased: alpha is fitted to a b that it is then multiplied with, the 1 in the denominator makes
    it smaller (much so for few elements), and what lies beyond the outermost level is cut off. It
    is a contraction all the same, δ = 0 aside: ⟨C(x), x⟩ ≥ ‖C(x)‖², so ‖x - C(x)‖ ≤ ‖x‖.
    """

    START, ROUNDS = 0.7, 3

    @dataclass(frozen=True)
    class Params:
        """Of sgq.

        Attributes:
            bits: per element, sign included, 2 to 8.
        """

        bits: int = 4

        def __post_init__(self) -> None:
            _check_bits(self.bits)

    def __init__(self, params: Any, rng: np.random.Generator) -> None:
        super().__init__(params, rng)
        self.bits: int = getattr(params, "bits", 2)
        self.top = (2**self.bits - 1) // 2
        angles = np.arange(self.top, 0, -1) * np.pi / (4 * self.top)
        levels = np.concatenate([[0], 1 / np.tan(angles)])
        self.levels = levels.astype(np.float32)
        # the number of the level below, and how far on to the next one, is base + slope * value
        slopes = np.append(1 / np.diff(levels), 0)
        self._slopes = slopes.astype(np.float32)
        self._bases = (np.arange(self.top + 1) - slopes * levels).astype(np.float32)

    def layout(self, size: int) -> dict[str, tuple[type[np.generic], int]]:
        """Return alpha and the packed codes."""
        return {"scales": (np.float32, 1), "codes": (np.uint8, packed_size(size, self.bits))}

    def encode(self, flat: Floats, **out: Array) -> None:
        """Fit alpha, and keep the last b."""
        alpha, outermost = self.START, _largest(flat) / float(self.levels[-1])
        for _ in range(self.ROUNDS):
            fitted = self._quantise(flat, alpha, out["codes"])
            alpha = fitted if fitted >= FLOOR else max(outermost, FLOOR)
        out["scales"][0] = fitted

    def _quantise(self, flat: Floats, alpha: float, out: Bytes) -> float:
        """Write Q(x/alpha) as codes and return the alpha that fits it best."""
        inverse, dither = np.float32(1 / alpha), Dither(self.rng, flat.size)
        product = square = 0.0
        for where in chunks(flat.size):
            values = np.abs(flat[where]) * inverse
            numbers = self._positions(values)
            numbers += dither.floats(where)
            steps = np.minimum(numbers.astype(np.uint8), self.top)
            levels = self.levels.take(steps)
            product += float(levels @ values)
            square += float(levels @ levels)
            minus = (flat[where] < 0).view(np.int8)
            codes = (self.top + (steps.view(np.int8) ^ -minus) + minus).view(np.uint8)
            packed = slice(where.start * self.bits // 8, packed_size(where.stop, self.bits))
            out[packed] = pack(codes, self.bits)
        return alpha * product / (square + 1)

    def _positions(self, values: Floats) -> Floats:
        """Return where values lie among the levels: 1.25 is a quarter of the way from 1 to 2."""
        angles = np.arctan(values)
        angles *= np.float32(4 * self.top / np.pi)
        angles -= np.float32(self.top - 1)
        below = np.clip(angles, 0, self.top, out=angles).astype(np.uint8)
        positions: Floats = self._slopes.take(below)
        positions *= values
        positions += self._bases.take(below)
        return positions

    def decode(self, flat: Floats, **vectors: Array) -> None:
        """Look levels up and multiply."""
        table = np.concatenate([-self.levels[:0:-1], self.levels]) * vectors["scales"][0]
        for where in chunks(flat.size):
            packed = slice(where.start * self.bits // 8, packed_size(where.stop, self.bits))
            codes = unpack(vectors["codes"][packed], self.bits, where.stop - where.start)
            check_codes(codes, 2 * self.top)
            flat[where] = table.take(codes)


class Tqn(Sgq):
    """Ternary: -alpha, 0 or alpha, with probability |x|/alpha and alpha fitted.

    Rule: `Sgq` with the levels -1, 0, 1. Traffic: ⌈n / 4⌉ + 4 bytes.
    Source: this package's first generation.
    Law: biased, as `Sgq` says; unlike `TernGrad` it cuts off what is beyond alpha.
    """

    @dataclass(frozen=True)
    class Params:
        """Of tqn, which has none."""
