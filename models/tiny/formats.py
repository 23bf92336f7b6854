"""Writers of the weight formats: safetensors (single or sharded) and GGUF v3, from float32 arrays."""
import json
import struct

import numpy as np


def round_bf16(x):
    """To the nearest bf16, ties to even, held as float32."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32).astype(np.uint64)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return bits.astype(np.uint32).view(np.float32)


def pretty(value):
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def to_bytes(value, stored):
    value = np.ascontiguousarray(value, np.float32)
    if stored == "BF16":
        return (value.view(np.uint32) >> 16).astype("<u2").tobytes()
    return value.astype({"F32": "<f4", "F16": "<f2"}[stored]).tobytes()


def safetensors(weights, stored):
    header, body = {"__metadata__": {"format": "pt"}}, b""
    for name in sorted(weights):
        data = to_bytes(weights[name], stored)
        span = [len(body), len(body) + len(data)]
        header[name] = {"dtype": stored, "shape": list(weights[name].shape), "data_offsets": span}
        body += data
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    return struct.pack("<Q", len(head)) + head + body


def sharded(weights, stored, count):
    """{file name: bytes}: one file, or `count` shards of alternating tensors and their index."""
    if count == 1:
        return {"model.safetensors": safetensors(weights, stored)}
    files, where, names = {}, {}, list(weights)
    for i in range(count):
        file, part = f"model-{i + 1:05}-of-{count:05}.safetensors", names[i::count]
        files[file] = safetensors({n: weights[n] for n in part}, stored)
        where |= {n: file for n in part}
    size = sum(len(to_bytes(w, stored)) for w in weights.values())
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(where.items()))}
    files["model.safetensors.index.json"] = pretty(index)
    return files


U32, I32, F32, BOOL, STRING, ARRAY = 4, 5, 6, 7, 8, 9  # GGUF's codes of value types


def gguf_value(kind, value):
    if kind == STRING:
        return struct.pack("<Q", len(value.encode())) + value.encode()
    return struct.pack({U32: "<I", I32: "<i", F32: "<f", BOOL: "<?"}[kind], value)


def gguf(metadata, tensors, alignment=32):
    """GGUF v3 with F32 tensors. metadata: {key: (type, value)}, a list being an array of that type."""
    out = struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), len(metadata))
    for key, (kind, value) in metadata.items():
        out += gguf_value(STRING, key)
        if isinstance(value, list):
            out += struct.pack("<IIQ", ARRAY, kind, len(value))
            out += b"".join(gguf_value(kind, v) for v in value)
        else:
            out += struct.pack("<I", kind) + gguf_value(kind, value)
    offset = 0
    for name, value in tensors.items():
        out += gguf_value(STRING, name) + struct.pack("<I", value.ndim)
        out += struct.pack(f"<{value.ndim}QIQ", *reversed(value.shape), 0, offset)
        offset += 4 * value.size + -(4 * value.size) % alignment
    parts = [out, bytes(-len(out) % alignment)]
    for value in tensors.values():
        parts += [to_bytes(value, "F32"), bytes(-(4 * value.size) % alignment)]
    return b"".join(parts)
