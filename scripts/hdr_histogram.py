"""Reads HdrHistogram's V2 encoding, plain or deflated, by the standard library alone: a reader that shares no line with
the writer. The form is described by the HdrHistogram project: a cookie, the payload's length, the normalising offset,
the digits, the bounds and a ratio, all big-endian; then the counts as ZigZag LEB128 numbers of at most nine bytes, where
a negative number stands for so many empty counts. Deflated, it follows another cookie and the compressed length.
"""
import base64
import struct
import zlib

COOKIE, DEFLATED_COOKIE = 0x1C849303, 0x1C849304
# The low byte may also say the size of a word, which this version of the form always takes as nine bytes at most.
COOKIE_MASK = 0xFFFFFF0F


class Histogram:
    """Counts of values, each bucket known by the largest value that falls into it."""

    def __init__(self, buckets):
        self.buckets = sorted(buckets.items())
        self.count = sum(count for _, count in self.buckets)

    def value_at(self, quantile):
        """The largest value that the bucket of the smallest observation at or above this quantile may hold."""
        wanted, seen = max(1, rank(quantile, self.count)), 0
        for highest, count in self.buckets:
            seen += count
            if seen >= wanted:
                return highest
        raise ValueError("the histogram is empty")

    def merged(self, other):
        buckets = dict(self.buckets)
        for highest, count in other.buckets:
            buckets[highest] = buckets.get(highest, 0) + count
        return Histogram(buckets)


def rank(quantile, count):
    """The least number of observations that is this share of all of them; products like 0.99 * 300 are off by an ulp."""
    exact = quantile * count
    return round(exact) if abs(exact - round(exact)) < 1e-6 else int(exact) + 1


def decode_base64(text):
    return decode(base64.b64decode(text, validate=True))


def decode(data):
    cookie, length = struct.unpack_from(">II", data)
    if cookie & COOKIE_MASK == DEFLATED_COOKIE & COOKIE_MASK:
        data = zlib.decompress(data[8:8 + length])
        cookie, length = struct.unpack_from(">II", data)
    if cookie & COOKIE_MASK != COOKIE & COOKIE_MASK:
        raise ValueError(f"the cookie is {cookie:#x}, expected that of HdrHistogram's V2 encoding")
    offset, digits, lowest, _highest = struct.unpack_from(">iiqq", data, 8)
    if offset != 0:
        raise ValueError(f"the normalising offset is {offset}, expected 0")
    payload = data[40:40 + length]
    if len(payload) != length:
        raise ValueError(f"the payload has {len(payload)} bytes, expected {length}")
    buckets, index = {}, 0
    for number in zigzag(payload):
        if number < 0:
            index -= number
            continue
        if number:
            buckets[highest_value(index, lowest, digits)] = number
        index += 1
    return Histogram(buckets)


def zigzag(payload):
    """Signed numbers, least significant seven bits first; the ninth byte gives all of its eight."""
    at = 0
    while at < len(payload):
        value = shift = 0
        for place in range(9):
            byte = payload[at]
            at += 1
            value |= (byte if place == 8 else byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                break
        yield (value >> 1) ^ -(value & 1)


def highest_value(index, lowest, digits):
    """Largest value of the bucket at `index`. Values are cut to multiples of 2^unit; each doubling of the range has as
    many buckets as half the smallest power of two that keeps the digits."""
    unit = lowest.bit_length() - 1
    half_bits = (2 * 10**digits - 1).bit_length() - 1
    half = 1 << half_bits
    doubling, place = (index >> half_bits) - 1, (index & (half - 1)) + half
    if doubling < 0:
        doubling, place = 0, place - half
    shift = unit + doubling
    return ((place + 1) << shift) - 1
