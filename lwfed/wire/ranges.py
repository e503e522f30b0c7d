"""Sets of chunks as text, as messages have them (`records.Ranges`)."""

from __future__ import annotations

from lwfed.errors import InvalidMessage


def ranges(indices: list[int]) -> str:
    """Sorted indices as text: [0, 1, 2, 7] -> "0-2,7"."""
    runs: list[list[int]] = []
    for index in sorted(indices):
        if runs and index == runs[-1][1] + 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    return ",".join(str(low) if low == high else f"{low}-{high}" for low, high in runs)


def indices(text: str, count: int) -> list[int]:
    """The inverse of `ranges`, bounded by a blob of `count` chunks; raises InvalidMessage."""
    found: list[int] = []
    for piece in filter(None, text.split(",")):
        low, _, high = piece.partition("-")
        first, last = int(low), int(high or low)
        if not first <= last < count or (found and first <= found[-1]):  # a few bytes must not name one chunk again and again
            raise InvalidMessage(f"chunks {piece} of a blob of {count}")
        found += range(first, last + 1)
    return found
