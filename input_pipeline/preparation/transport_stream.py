"""Reads the packet counters of an MPEG transport stream, to tell recordings put end to end from lost packets.

FFmpeg only says that a counter does not follow the one before it. In both cases the pictures before and behind the
place are there; but after a loss one of them is not whole. ISO/IEC 13818-1, 2.4.3, has the packets' form.
"""

from typing import NamedTuple

import numpy as np

SYNC, NULL_PID, PROGRAMS_PID = 0x47, 0x1FFF, 0
LAST_TABLE_PID, PROGRAM_TABLE_ID = 0x1F, 2  # streams of tables only; tables of one program may be in any stream
SIZES = (188, 192, 204)  # bytes of a packet: plain, with a time in front (M2TS), with error correction behind
_PACKETS_AT_A_TIME = 1 << 16


class _Break(NamedTuple):
    """A packet whose counter does not follow the one before it in its stream."""

    pid: int
    counter: int
    programs: int  # number of the last packet, at most its own, that begins the table of programs; -1: none
    first: bool  # in its stream since that table
    begins: bool  # a picture, a table or another unit begins with it
    of_table: bool


def joins(path: str, pid: int) -> int | None:
    """In how many places the stream `pid` goes on in another recording; None if anything of it is missing.

    A recording begins with its tables, and all its counters start anew: so behind a table of programs the stream's
    counter breaks together with that of a table, or both start at 0. Anywhere else a break is a lost packet.

    Raises:
      OSError: the file cannot be read.
    """
    breaks, counter_of_programs = _breaks(path, pid)
    if breaks is None:
        return None
    restarted = {item.programs for item in breaks if item.of_table and item.first}
    mine = [item for item in breaks if item.pid == pid]
    for item in mine:
        from_zero = item.counter == 0 and counter_of_programs.get(item.programs) == 0
        if not (item.begins and item.first and (item.programs in restarted or from_zero)):
            return None
    return len(mine)


def _breaks(path: str, pid: int) -> tuple[list[_Break] | None, dict[int, int]]:
    """All breaks of counters (None: a packet is damaged), and the counters of the packets that begin tables."""
    with open(path, "rb") as file:
        form = _form(np.frombuffer(file.read(64 * max(SIZES)), np.uint8))
        if form is None:
            return None, {}
        size, phase = form
        file.seek(phase)
        counters: dict[int, int] = {}  # of the last packet of each stream
        seen: dict[int, int] = {}  # number of that packet
        tables: set[int] = set(range(LAST_TABLE_PID + 1))
        breaks, counter_of_programs, programs, number = [], {}, -1, -1
        while data := file.read(size * _PACKETS_AT_A_TIME):
            packets_Nx6 = np.frombuffer(data[: len(data) // size * size], np.uint8).reshape(-1, size)[:, :6]
            for sync, high, low, flags, fifth, sixth in packets_Nx6.tolist():
                number += 1
                stream, begins, counter = (high & 0x1F) << 8 | low, bool(high & 0x40), flags & 0x0F
                if sync != SYNC or (high & 0x80 and stream == pid):
                    return None, {}
                if stream == NULL_PID:
                    continue
                if begins and stream == PROGRAMS_PID:
                    programs = number
                    counter_of_programs[number] = counter
                if begins and flags & 0x30 == 0x10 and (fifth, sixth) == (0, PROGRAM_TABLE_ID):
                    tables.add(stream)
                last = counters.get(stream)
                announced = flags & 0x20 and fifth > 0 and sixth & 0x80  # the packet itself says that counting restarts
                if last is not None and not announced and counter != (last + 1 if flags & 0x10 else last) & 0x0F:
                    first = seen[stream] < programs
                    breaks.append(_Break(stream, counter, programs, first, begins, stream in tables))
                counters[stream], seen[stream] = counter, number
    return breaks, counter_of_programs


def _form(head: np.ndarray) -> tuple[int, int] | None:
    """(bytes per packet, offset of the first one's sync byte) of uint8[N], the beginning of a file."""
    for size in SIZES:
        for phase in range(size):
            sync = head[phase::size]
            if len(sync) > 1 and (sync == SYNC).all():
                return size, phase
    return None
