"""Reads the packet counters of an MPEG transport stream, to tell recordings put end to end from lost packets.

FFmpeg only says that a counter does not follow the one before it. In both cases the pictures before and behind the
place are there; but after a loss one of them is not whole. ISO/IEC 13818-1, 2.4.3, has the packets' form.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

SYNC, NULL_PID = 0x47, 0x1FFF
LAST_TABLE_PID, PROGRAM_TABLE_ID = 0x1F, 2  # streams of tables only; the table of a program may be in any stream
SIZES = (188, 192, 204)  # bytes of a packet: plain, with a time in front (M2TS), with error correction behind
_PACKETS_AT_A_TIME = 1 << 16


class _Packet(NamedTuple):
    pid: int
    counter: int
    counts: bool  # it has a payload, so it is counted
    begins: bool  # a picture, a table or another unit begins with it
    of_program: bool  # the table of a program does
    announced: bool  # it says itself that counting starts again
    damaged: bool


def joins(path: str, pid: int) -> int | None:
    """In how many places the stream `pid` goes on in another recording; None if anything of it is missing.

    A recording begins with its tables, and all its counters start anew. So the stream's counter may break where a
    picture begins, directly behind tables, if the counter of one of them breaks too, or if they, three at least, and
    the stream all start from 0. Anywhere else a break is a lost packet.

    Raises:
      OSError: the file cannot be read.
    """
    counters: dict[int, int] = {}  # of the last packet of each stream
    tables = set(range(LAST_TABLE_PID + 1))
    between: list[tuple[int, bool]] = []  # (counter, whether it breaks) of table packets since the stream's last packet
    count = 0
    for packet in _packets(path):
        if packet is None:
            return None
        if packet.of_program:
            tables.add(packet.pid)
        last = counters.get(packet.pid)
        breaks = last is not None and not packet.announced and packet.counter != (last + packet.counts) & 0x0F
        counters[packet.pid] = packet.counter
        if packet.pid == pid:
            if packet.damaged:
                return None
            if breaks:
                from_zero = packet.counter == 0 and len(between) >= 3 and not any(counter for counter, _ in between)
                if not (packet.begins and (from_zero or any(broken for _, broken in between))):
                    return None
                count += 1
            between.clear()
        elif packet.pid in tables:
            between.append((packet.counter, breaks))
    return count


def _packets(path: str) -> Iterator[_Packet | None]:
    """All packets but padding; None where the bytes are none."""
    with open(path, "rb") as file:
        form = _form(np.frombuffer(file.read(64 * max(SIZES)), np.uint8))
        if form is None:
            yield None
            return
        size, phase = form
        file.seek(phase)
        while data := file.read(size * _PACKETS_AT_A_TIME):
            packets_Nx6 = np.frombuffer(data[: len(data) // size * size], np.uint8).reshape(-1, size)[:, :6]
            for sync, high, low, flags, fifth, sixth in packets_Nx6.tolist():
                pid = (high & 0x1F) << 8 | low
                if sync != SYNC:
                    yield None
                elif pid != NULL_PID:
                    begins, adaptation, payload = bool(high & 0x40), bool(flags & 0x20), bool(flags & 0x10)
                    yield _Packet(
                        pid,
                        counter=flags & 0x0F,
                        counts=payload,
                        begins=begins,
                        of_program=begins and not adaptation and (fifth, sixth) == (0, PROGRAM_TABLE_ID),
                        announced=adaptation and fifth > 0 and bool(sixth & 0x80),
                        damaged=bool(high & 0x80),
                    )


def _form(head: np.ndarray) -> tuple[int, int] | None:
    """(bytes per packet, offset of the first one's sync byte) of uint8[N], the beginning of a file."""
    for size in SIZES:
        for phase in range(size):
            sync = head[phase::size]
            if len(sync) > 1 and (sync == SYNC).all():
                return size, phase
    return None
