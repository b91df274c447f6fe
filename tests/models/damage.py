"""Files damaged at random. Every reader must give a reason, or not notice because nothing was lost."""

from __future__ import annotations

import random


def damaged(content: bytes, generator: random.Random) -> bytes:
    """Truncated, with single bits flipped, or with a stretch overwritten, zeroed, cut out, repeated or moved.
    Never `content`."""
    while True:
        data = bytearray(content)
        for _ in range(generator.choice((1, 1, 1, 2, 4))):
            low = generator.randrange(len(data) + 1)
            high = min(len(data), low + generator.choice((1, 2, 8, 64, 512)))
            kind = generator.randrange(7)
            if kind == 0:
                del data[low:]
            elif kind == 1:
                for place in range(low, min(high, low + 3)):
                    data[place] ^= 1 << generator.randrange(8)
            elif kind == 2:
                data[low:high] = generator.randbytes(high - low)
            elif kind == 3:
                data[low:high] = bytes(high - low)
            elif kind == 4:
                del data[low:high]
            elif kind == 5:
                data[low:low] = data[low:high]
            else:
                data[low:high] = data[low:high][::-1]
        if data != content:
            return bytes(data)
