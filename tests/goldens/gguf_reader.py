"""Reads a GGUF file into numpy: metadata with its types, and tensors dequantised to float32."""
import pathlib
import struct

import numpy as np

STRING, ARRAY = 8, 9
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


def plain(blocks):
    return blocks.view("<f4")


def q8_0(blocks):
    """Per 32 weights: a half-precision scale d, then 32 signed bytes q; w = d q."""
    d = blocks[:, :2].copy().view("<f2").astype(np.float32)
    return d * blocks[:, 2:].view(np.int8)


def q4_1(blocks):
    """Per 32 weights: scale d, minimum m, then 16 bytes with weights 0-15 in the low and 16-31 in the high nibbles."""
    d = blocks[:, 0:2].copy().view("<f2").astype(np.float32)
    m = blocks[:, 2:4].copy().view("<f2").astype(np.float32)
    nibbles = np.concatenate([blocks[:, 4:] & 15, blocks[:, 4:] >> 4], axis=1)
    return d * nibbles + m


TENSOR_TYPES = {0: ("F32", 1, 4, plain), 3: ("Q4_1", 32, 20, q4_1), 8: ("Q8_0", 32, 34, q8_0)}


class Cursor:
    def __init__(self, data):
        self.data, self.at = data, 0

    def unpack(self, layout):
        values = struct.unpack_from("<" + layout, self.data, self.at)
        self.at += struct.calcsize("<" + layout)
        return values if len(values) > 1 else values[0]

    def string(self):
        length = self.unpack("Q")
        self.at += length
        return bytes(self.data[self.at - length:self.at]).decode()

    def value(self, kind):
        return self.string() if kind == STRING else self.unpack(SCALARS[kind])


def read_gguf(path):
    """({key: (type, value)}, {name: float32 array}, {stored type: count}); an array's type is that of its elements."""
    data = np.memmap(pathlib.Path(path), dtype=np.uint8, mode="r")
    cursor = Cursor(data)
    magic, version, tensors, keys = cursor.unpack("4sIQQ")
    assert magic == b"GGUF" and version in (2, 3), (magic, version)
    metadata = {}
    for _ in range(keys):
        key, kind = cursor.string(), cursor.unpack("I")
        if kind == ARRAY:
            kind, count = cursor.unpack("IQ")
            metadata[key] = kind, [cursor.value(kind) for _ in range(count)]
        else:
            metadata[key] = kind, cursor.value(kind)
    infos = []
    for _ in range(tensors):
        name, rank = cursor.string(), cursor.unpack("I")
        shape = [cursor.unpack("Q") for _ in range(rank)][::-1]
        infos.append((name, shape, *cursor.unpack("IQ")))
    alignment = metadata.get("general.alignment", (4, 32))[1]
    base = cursor.at + -cursor.at % alignment
    weights, stored = {}, {}
    for name, shape, kind, offset in infos:
        label, per_block, block_bytes, dequantise = TENSOR_TYPES[kind]
        size = int(np.prod(shape)) // per_block * block_bytes
        blocks = np.array(data[base + offset:base + offset + size]).reshape(-1, block_bytes)
        weights[name] = dequantise(blocks).reshape(shape)
        stored[label] = stored.get(label, 0) + 1
    return metadata, weights, stored
