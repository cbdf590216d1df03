"""LZW, the paper's baseline of lossless compression. The implementation is readable rather than fast."""

MAX_WIDTH = 16  # bits of a codeword; a full dictionary is kept as it is


def compress(data: bytes) -> bytes:
    """Encodes bytes as codewords of 9 to 16 bits, least significant bit first, as wide as the dictionary then needs.

    Source: T. Welch, "A technique for high-performance data compression", Computer 17(6), 1984.

    Example:
        >>> len(compress(b"ab" * 4)), decompress(compress(b"ab" * 4))
        (6, b'abababab')
    """
    numbers = {bytes([value]): value for value in range(256)}
    out = bytearray()
    pending = filled = 0
    current = b""

    def emit(number: int, width: int) -> None:
        nonlocal pending, filled
        pending |= number << filled
        filled += width
        while filled >= 8:
            out.append(pending & 0xFF)
            pending >>= 8
            filled -= 8

    for position in range(len(data)):
        longer = current + data[position : position + 1]
        if longer in numbers:
            current = longer
            continue
        emit(numbers[current], _width(len(numbers)))
        if len(numbers) < 1 << MAX_WIDTH:
            numbers[longer] = len(numbers)
        current = data[position : position + 1]
    if current:
        emit(numbers[current], _width(len(numbers)))
    if filled:
        out.append(pending & 0xFF)
    return bytes(out)


def decompress(data: bytes) -> bytes:
    """Returns the input of :func:`compress` from its output.

    Raises:
        ValueError: the bytes are not an output of :func:`compress`.
    """
    entries = [bytes([value]) for value in range(256)]
    out = bytearray()
    pending = filled = position = 0
    previous = b""
    while True:
        # The encoder's dictionary is one entry ahead from the second codeword on.
        width = _width(min(len(entries) + bool(previous), 1 << MAX_WIDTH))
        while filled < width and position < len(data):
            pending |= data[position] << filled
            filled += 8
            position += 1
        if filled < width:
            if pending:
                raise ValueError(f"{len(data)} bytes of LZW end within a codeword")
            return bytes(out)
        number, pending, filled = pending & ((1 << width) - 1), pending >> width, filled - width
        if number > len(entries) or (number == len(entries) and not previous):
            raise ValueError(f"LZW codeword {number} before byte {position} has no entry yet")
        entry = previous + previous[:1] if number == len(entries) else entries[number]
        if previous and len(entries) < 1 << MAX_WIDTH:
            entries.append(previous + entry[:1])
        out += entry
        previous = entry


def _width(entries: int) -> int:
    """Returns the number of bits for the numbers below ``entries``, at least 9."""
    return max(9, (entries - 1).bit_length())
