"""Four-bit matrices as plain bytes: a float matrix  ⇄  packed codes and block scales.

Idea: a matrix is flattened row by row and cut into blocks of 64 values (the last may be shorter). Each block keeps
its largest magnitude `absmax`, and each value the index of the nearest entry of a 16-entry table:

    w  ≈  absmax[i // 64] · table[code[i]]

NF4 and FP4 are bitsandbytes' own codes, bit for bit (NF4: Dettmers et al., QLoRA, arXiv 2305.14314, section 3); on a
CPU they are found by a table look-up instead of bitsandbytes' binary search, in a tenth of the time. INT4 is symmetric,
levels −7…7 times absmax / 7. Double quantization stores the absmax values themselves in 8 bits (the dynamic map of
bitsandbytes, blocks of 256, after their mean is taken out; QLoRA, section 3). LoQT (arXiv 2405.16528, section 3) keeps
W and P in this form.

Departures: everything is held as 1-D `uint8` tensors, scales included, because a cast of a module to bf16 (DeepSpeed
does one) also casts float buffers, and would corrupt a float32 scale. Dequantization never tells bitsandbytes the shape
of the matrix: bitsandbytes 0.50.2 on CPU is silently wrong where the last dimension is a multiple of 16 and not of 64
(relative error 0.246 instead of 0.092 at (512, 1376)); as one long row it is right.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

import torch
from bitsandbytes import functional as bnb
from torch import Tensor

KINDS = ("nf4", "fp4", "int4", "none")
BLOCKSIZE = 64  # values that share one absmax
NESTED_BLOCKSIZE = 256  # absmax values that share one nested absmax
INT4_MAX_LEVEL = 7

# Values handled at once where temporaries are several times the size of the data. A multiple of BLOCKSIZE.
_CHUNK = 1 << 20
# Values encoded at once by the look-up: its three temporaries stay in a cache. A multiple of BLOCKSIZE.
_LOOKUP_CHUNK = 1 << 18

_BNB_DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # what bitsandbytes dequantizes to

Packed = dict[str, Tensor]


@dataclass(frozen=True)
class QuantSpec:
    """How one matrix is stored.

    Raises ValueError for a kind that does not exist, for double quantization of a matrix that is not quantized, and
    for a dense dtype that is not a float type.
    """

    kind: str = "nf4"
    """nf4, fp4, int4, or none (the matrix is kept dense)."""
    double_quant: bool = False
    """Store the block scales in 8 bits too."""
    dense_dtype: torch.dtype = torch.bfloat16
    """What the values are kept in when `kind` is none; unused otherwise."""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"quantization kind {self.kind!r} does not exist; use one of {', '.join(KINDS)}")
        if self.kind == "none" and self.double_quant:
            raise ValueError("double_quant=True with kind='none' has no scales to quantize; use double_quant=False")
        if not self.dense_dtype.is_floating_point:
            raise ValueError(f"dense_dtype={self.dense_dtype} is not a float type; use torch.bfloat16 or torch.float32")


def packed_layout(shape: tuple[int, int], spec: QuantSpec) -> dict[str, int]:
    """The exact number of bytes of each tensor that `quantize` returns for a matrix of this shape."""
    num_values = shape[0] * shape[1]
    if spec.kind == "none":
        return {"dense": num_values * spec.dense_dtype.itemsize}
    num_blocks = -(-num_values // BLOCKSIZE)
    layout = {"codes": -(-num_values // 2)}
    if not spec.double_quant:
        return layout | {"absmax": 4 * num_blocks}
    return layout | {"absmax": num_blocks, "nested_absmax": 4 * -(-num_blocks // NESTED_BLOCKSIZE), "nested_offset": 4}


@torch.no_grad()
def quantize(matrix: Tensor, spec: QuantSpec) -> Packed:
    """Packs a matrix (m, n) of any float dtype; the arithmetic is float32.

    Returns 1-D contiguous uint8 tensors on the matrix's device, with the sizes that `packed_layout` says. In "codes"
    the even element of each pair is in the high nibble; with an odd number of values the last low nibble is padding.
    """
    if spec.kind == "none":
        return {"dense": _as_bytes(matrix.detach().to(spec.dense_dtype))}
    flat = matrix.detach().reshape(-1)
    on_cpu = flat.device.type == "cpu"
    if spec.kind == "int4":
        # Out of place: on a CPU, chunks keep the temporaries below the size of a layer.
        parts = [_int4_codes(chunk.float()) for chunk in flat.split(_CHUNK if on_cpu else max(flat.numel(), 1))]
        codes, absmax = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    elif on_cpu:
        codes, absmax = _lookup_codes(flat, spec.kind)
    else:
        codes, absmax = _bnb_codes(flat.float(), spec.kind)
    return {"codes": codes, **_pack_absmax(absmax, spec)}


@torch.no_grad()
def dequantize(
    packed: Packed,
    shape: tuple[int, int],
    spec: QuantSpec,
    *,
    dtype: torch.dtype = torch.float32,
    out: Tensor | None = None,
) -> Tensor:
    """The matrix (m, n) that packed bytes stand for: float32 products of scale and table entry, rounded to `dtype`.

    `out` (m, n), where given, is filled and returned; its own dtype then counts.
    """
    if out is not None:
        assert out.shape == torch.Size(shape), (out.shape, shape)
        if not out.is_contiguous():
            return out.copy_(dequantize(packed, shape, spec, dtype=out.dtype))
        dtype = out.dtype
    if spec.kind == "none":
        dense = _from_bytes(packed["dense"], spec.dense_dtype).view(shape)
        return dense.to(dtype) if out is None else out.copy_(dense)
    num_values = shape[0] * shape[1]
    codes, absmax = packed["codes"], _unpack_absmax(packed, spec)
    if spec.kind != "int4" and (out is None or (num_values <= _CHUNK and not _writes_to_out(codes.device))):
        values = _bnb_values(codes, absmax, num_values, spec.kind, dtype).view(shape)
        return values if out is None else out.copy_(values)
    result = torch.empty(shape, dtype=dtype, device=codes.device) if out is None else out
    flat = result.view(-1)
    if spec.kind != "int4" and _writes_to_out(codes.device) and num_values % 2 == 0 and dtype in _BNB_DTYPES:
        # One row: immune to the CPU error described at the top.
        torch.ops.bitsandbytes.dequantize_4bit.out(
            codes, absmax, BLOCKSIZE, spec.kind, (1, num_values), dtype, out=flat.view(1, -1)
        )
        return result
    for start in range(0, num_values, _CHUNK):
        num = min(_CHUNK, num_values - start)
        chunk_codes = codes[start // 2 : (start + num + 1) // 2]
        chunk_absmax = absmax[start // BLOCKSIZE : -(-(start + num) // BLOCKSIZE)]
        if spec.kind == "int4":
            flat[start : start + num] = _int4_values(chunk_codes, chunk_absmax, num)
        else:
            flat[start : start + num] = _bnb_values(chunk_codes, chunk_absmax, num, spec.kind, dtype)
    return result


# ---- a buffer to dequantize into -------------------------------------------------------------------------------------


class _Buffers:
    """Memory that is used again and again, by one at a time: a stack of idle pieces for each device and stream.

    Who takes a piece has it alone until it is given back; whoever comes meanwhile (another thread) gets another one.
    A stream does things in order, so that the next user of a piece may start before the kernels of the last are done.
    """

    def __init__(self) -> None:
        self._idle: dict[tuple[torch.device, int], list[Tensor]] = {}
        self._lock = threading.Lock()

    @contextmanager
    def take(self, num_bytes: int, device: torch.device) -> Iterator[Tensor]:
        """At least that many bytes, uint8, one dimension; what they hold is undefined."""
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
        with self._lock:
            idle = self._idle.setdefault((device, stream), [])
            buffer = idle.pop() if idle else None
        if buffer is None or buffer.numel() < num_bytes:
            buffer = None  # let go of the smaller one before a larger one is made
            # An inference tensor could not be written to outside of inference mode.
            with torch.inference_mode(False):
                buffer = torch.empty(num_bytes, dtype=torch.uint8, device=device)
        try:
            yield buffer
        finally:
            with self._lock:
                idle.append(buffer)

    def clear(self) -> None:
        """Gives idle memory back."""
        with self._lock:
            for idle in self._idle.values():
                idle.clear()


BUFFERS = _Buffers()


@contextmanager
def scratch(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Iterator[Tensor]:
    """A matrix of undefined values in memory that is used again once the context is left: no view may be kept."""
    num_bytes = shape[0] * shape[1] * dtype.itemsize
    with BUFFERS.take(num_bytes, device) as buffer:
        yield buffer[:num_bytes].view(dtype).view(shape)


@contextmanager
def dequantized(packed: Packed, shape: tuple[int, int], spec: QuantSpec, *, dtype: torch.dtype) -> Iterator[Tensor]:
    """`dequantize` into memory that is used again once the context is left: no view of it may be kept.

    A matrix that is stored dense in `dtype` is given as it is. Not to be written to.
    """
    if spec.kind == "none" and spec.dense_dtype == dtype:
        yield dequantize(packed, shape, spec, dtype=dtype)
        return
    with torch.no_grad(), scratch(shape, dtype, next(iter(packed.values())).device) as out:
        yield dequantize(packed, shape, spec, out=out)


# ---- bytes ----------------------------------------------------------------------------------------------------------


def _as_bytes(tensor: Tensor) -> Tensor:
    # A one-element view of another dtype needs a dimension, hence the reshape first.
    return tensor.detach().reshape(-1).contiguous().view(torch.uint8)


def _from_bytes(data: Tensor, dtype: torch.dtype) -> Tensor:
    if data.storage_offset() % dtype.itemsize or not data.is_contiguous():
        data = data.clone(memory_format=torch.contiguous_format)  # a slice of a flat buffer may be unaligned
    return data.view(dtype)


# ---- scales ---------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=8)
def _dynamic_map(device: torch.device) -> Tensor:
    return bnb.create_dynamic_map().to(device)  # (256,) float32


def _pack_absmax(absmax: Tensor, spec: QuantSpec) -> Packed:
    if not spec.double_quant:
        return {"absmax": _as_bytes(absmax)}
    offset = absmax.mean()
    code = _dynamic_map(absmax.device)
    codes, state = bnb.quantize_blockwise(absmax - offset, code=code, blocksize=NESTED_BLOCKSIZE)
    return {
        "absmax": codes.reshape(-1).contiguous(),
        "nested_absmax": _as_bytes(state.absmax),
        "nested_offset": _as_bytes(offset),
    }


def _unpack_absmax(packed: Packed, spec: QuantSpec) -> Tensor:
    """The block scales in float32, one dimension."""
    if not spec.double_quant:
        return _from_bytes(packed["absmax"], torch.float32)
    absmax = bnb.dequantize_blockwise(
        packed["absmax"],
        absmax=_from_bytes(packed["nested_absmax"], torch.float32),
        code=_dynamic_map(packed["absmax"].device),
        blocksize=NESTED_BLOCKSIZE,
    )
    return absmax.add_(_from_bytes(packed["nested_offset"], torch.float32))


# ---- NF4 and FP4, by bitsandbytes -----------------------------------------------------------------------------------


def _bnb_codes(values: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    codes, state = bnb.quantize_4bit(values, blocksize=BLOCKSIZE, quant_type=kind)
    return codes.reshape(-1), state.absmax


def _bnb_values(codes: Tensor, absmax: Tensor, num_values: int, kind: str, dtype: torch.dtype) -> Tensor:
    # The padding nibble is decoded too and cut off after: bitsandbytes compiles a function for each odd size. Its
    # operator is called itself: the Python around it costs as much as dequantizing a small matrix.
    made_as = dtype if dtype in _BNB_DTYPES else torch.float32
    shape = (1, 2 * codes.numel())  # one row: immune to the CPU error described at the top
    values = torch.ops.bitsandbytes.dequantize_4bit.default(codes, absmax, BLOCKSIZE, kind, shape, made_as).view(-1)
    if values.numel() != num_values:
        values = values[:num_values]
    return values if made_as == dtype else values.to(dtype)


def _writes_to_out(device: torch.device) -> bool:
    """Whether bitsandbytes dequantizes into memory it is given; its CPU kernels return their own."""
    return device.type == "cuda"


# ---- NF4 and FP4 on a CPU: a look-up instead of a binary search -----------------------------------------------------
#
# A value of a block, divided by the block's absmax, is a float32 x in [−1, 1], and its code is the number of thresholds
# (midpoints of neighbouring table entries) below x. The bits of x, those of a negative number turned around, are an
# integer t that grows with x. Its upper 16 bits name a *cell*, so narrow that no two thresholds share one. A table says
# for each cell how many thresholds lie in cells below; the one inside, if there is one, is counted by a carry: to the
# lower 16 bits of t is added what makes them overflow just where t is above the threshold.

_NUM_CELLS = 1 << 15  # of all floats below 2 in magnitude; what is larger falls into some cell too, with another code


def _ordered_bits(values: Tensor, scratch: Tensor) -> Tensor:
    """The bits t of float32 values, in place of them, as int32; `scratch`: int32 of the same size."""
    bits = values.view(torch.int32)
    # −1 where negative, else 0; and bit 30 makes every t positive while |x| < 2.
    torch.bitwise_right_shift(bits, 31, out=scratch)
    return bits.bitwise_xor_(scratch.bitwise_xor_(1 << 30))


@lru_cache(maxsize=2)
def _cell_table(kind: str) -> tuple[Tensor, Tensor | None]:
    """What is added to t, by its cell, to have the number of thresholds below it in the upper 16 bits: (_NUM_CELLS,)
    int32. And the packed codes that two such numbers stand for, by the byte they make: (256,) uint8; None where the
    table is sorted, so that the numbers are the codes."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)  # in which bitsandbytes makes its table, and not in that of who comes first
    try:
        table = bnb.get_4bit_type(kind, device="cpu")
    finally:
        torch.set_default_dtype(default)
    order = torch.argsort(table)  # the same call as bitsandbytes': FP4 has two zeros
    entries = table[order]
    thresholds = (entries[:-1] + entries[1:]) / 2 + 0.0  # + 0.0: a threshold of −0.0 is one of 0.0
    bits = _ordered_bits(thresholds, torch.empty_like(thresholds, dtype=torch.int32))
    inside = bits >> 16
    assert inside.unique().numel() == len(inside), "two thresholds in one cell"
    cells = torch.arange(_NUM_CELLS, dtype=torch.int32, device="cpu")
    num_below = torch.bucketize(cells, inside, out_int32=True)
    added = num_below.sub_(cells) << 16
    added[inside] += 0xFFFF - (bits & 0xFFFF)
    byte = torch.arange(256, device="cpu")
    remap = (order[byte >> 4] << 4 | order[byte & 15]).to(torch.uint8)
    return added, None if torch.equal(order, torch.arange(16, device="cpu")) else remap


def lookup_bytes(num_values: int) -> int:
    """Of the temporaries that quantizing that many values takes on a CPU."""
    return 3 * 4 * min(num_values, _LOOKUP_CHUNK)


def _lookup_codes(flat: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Codes and absmax of a vector (n,) on a CPU, those of bitsandbytes bit for bit."""
    num_values = flat.numel()
    num_whole = num_values - num_values % BLOCKSIZE
    codes = flat.new_empty(-(-num_values // 2), dtype=torch.uint8)
    absmax = flat.new_empty(-(-num_values // BLOCKSIZE), dtype=torch.float32)
    size = min(num_whole, _LOOKUP_CHUNK)
    kinds = (torch.float32, torch.int32, torch.int32)
    scaled, cells, added = (flat.new_empty(size, dtype=dtype) for dtype in kinds)
    temporaries = scaled, cells, added
    for start in range(0, num_whole, _LOOKUP_CHUNK):
        values = flat[start : min(start + size, num_whole)].float()
        end = start + values.numel()
        _encode_blocks(
            values.view(-1, BLOCKSIZE),
            kind,
            temporaries,
            codes=codes[start // 2 : end // 2],
            absmax=absmax[start // BLOCKSIZE : end // BLOCKSIZE],
        )
    if num_whole < num_values:
        # A short block is divided by its absmax, not multiplied by the reciprocal; it is too small to be worth more.
        codes[num_whole // 2 :], absmax[num_whole // BLOCKSIZE :] = _bnb_codes(flat[num_whole:].float(), kind)
    if not torch.isfinite(absmax).all():
        return _bnb_codes(flat.float(), kind)  # what NaN and infinity become is bitsandbytes' affair
    return codes, absmax


def _encode_blocks(
    blocks: Tensor, kind: str, temporaries: tuple[Tensor, Tensor, Tensor], *, codes: Tensor, absmax: Tensor
) -> None:
    """Fills `codes` (n / 2,) and `absmax` (n / 64,) of float32 `blocks` (n / 64, 64); n values fit the temporaries."""
    table, remap = _cell_table(kind)
    scaled, cells, added = (temporary[: blocks.numel()] for temporary in temporaries)
    rows = scaled.view_as(blocks)
    torch.amax(torch.abs(blocks, out=rows), dim=1, out=absmax)
    torch.mul(blocks, (1.0 / absmax.clamp(min=1e-38))[:, None], out=rows)  # bitsandbytes' own arithmetic
    bits = _ordered_bits(scaled, cells)
    torch.bitwise_right_shift(bits, 16, out=cells)
    torch.index_select(table, 0, cells, out=added)
    # Two numbers, little-endian in an int16, become one byte with the first in the high nibble.
    pairs, first = cells.view(torch.int16).split(blocks.numel() // 2)[:2]
    pairs.view(torch.uint8).copy_(added.add_(bits).bitwise_right_shift_(16))
    torch.bitwise_left_shift(pairs, 4, out=first)
    codes.copy_(first.bitwise_or_(pairs.bitwise_right_shift_(8)))
    if remap is not None:
        codes.copy_(remap.index_select(0, codes.int()))


# ---- INT4 -----------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=8)
def _int4_pairs(device: torch.device) -> Tensor:
    """(256, 2): the two values, as fractions of absmax, of each byte. Nibble 8 is zero; nibble 0 does not occur."""
    # Fractions rather than absmax / 7, so that level 7 gives absmax itself back and re-quantizing changes nothing.
    table = torch.arange(-8, 8, dtype=torch.float32) / INT4_MAX_LEVEL
    byte = torch.arange(256)
    return torch.stack([table[byte >> 4], table[byte & 15]], dim=1).to(device)


def _int4_codes(values: Tensor) -> tuple[Tensor, Tensor]:
    num_values = values.numel()
    padded = torch.nn.functional.pad(values, (0, -num_values % BLOCKSIZE)).view(-1, BLOCKSIZE)
    absmax = padded.abs().amax(dim=1)
    safe = torch.where(absmax > 0, absmax, 1.0)
    levels = (padded / safe[:, None]).mul_(INT4_MAX_LEVEL).round_().clamp_(-INT4_MAX_LEVEL, INT4_MAX_LEVEL)
    nibbles = levels.add_(8).to(torch.uint8).view(-1)
    codes = (nibbles[0::2] << 4) | nibbles[1::2]
    return codes[: -(-num_values // 2)].contiguous(), absmax


def _int4_values(codes: Tensor, absmax: Tensor, num_values: int) -> Tensor:
    values = _int4_pairs(codes.device).index_select(0, codes.int()).view(-1)
    padded = torch.nn.functional.pad(values, (0, -values.numel() % BLOCKSIZE)).view(-1, BLOCKSIZE)
    return (padded * absmax[:, None]).view(-1)[:num_values]
