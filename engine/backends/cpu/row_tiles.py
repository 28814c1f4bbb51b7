"""Row tiles: the rows of a step that matrix units compute together."""

from __future__ import annotations

from collections.abc import Iterable

# Fewer rows are computed one by one.
MIN_ROWS = 16


def row_tiles(chunks: Iterable[tuple[int, int]], n_positions: int) -> list[tuple[int, int]]:
    """(first row, rows) of each run of at least MIN_ROWS rows of a sequence whose positions lie
    between two multiples of `n_positions`; chunks: see Live.

    Kernels of row tiles sum in another order than those of single rows. As chunks of prompts end
    at multiples of 64, the rows of a row tile depend on their sequence alone, not on how it is cut
    into steps nor on what else is in the batch.
    """
    tiles, first = [], 0
    for n_past, length in chunks:
        begin, stop = n_past, n_past + length
        while begin < stop:
            end = min(begin - begin % n_positions + n_positions, stop)
            if end - begin >= MIN_ROWS:
                tiles.append((first + begin - n_past, end - begin))
            begin = end
        first += length
    return tiles
