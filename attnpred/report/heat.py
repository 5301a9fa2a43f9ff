"""Heat maps: a small grid of numbers (depth against length), and a large one as an image (attention over the steps).

In a small one every cell has its number, in black or white, whichever is read better. A large one is a PNG inside the
picture, written here (PNG specification, 3rd edition: an 8-bit palette, one row of pixels per line), as a cell for each
of 10^5 values would make the page slow; beside it stands the scale.
"""

import base64
import struct
import zlib
from collections.abc import Mapping, Sequence

from attnpred.report.look import as_hex, ink_on, shade
from attnpred.report.svg import WIDTH, Picture, picture, tag, words_at


def grid_chart(
    name: str, title: str, words: str, rows: Sequence[str], columns: Sequence[str],
    values: Mapping[tuple[int, int], float], high: float, labels: tuple[str, str],
) -> Picture:  # fmt: skip
    """Draw values (row, column), 0 to `high` from dark to bright; a cell that was not measured stays empty."""
    left, top, tall = 54.0, 30.0, 22.0
    wide = min(64.0, (WIDTH - left - 6) / len(columns))
    body = [words_at(2, 12, f"{labels[0]} (down), {labels[1]} (across)", class_="quiet")]
    body += [words_at(left + wide * (j + 0.5), top - 5, text, class_="middle") for j, text in enumerate(columns)]
    body += [words_at(left - 6, top + tall * i + 15, text, class_="end") for i, text in enumerate(rows)]
    for (i, j), value in values.items():
        colour = as_hex(shade(value / high if high > 0 else 0.0))
        x, y = left + wide * j, top + tall * i
        body.append(tag("rect", x=x, y=y, width=wide - 1, height=tall - 1, fill=colour))
        body.append(tag("g", words_at(x + wide / 2, y + 15, f"{value:.2f}", class_="middle"), color=ink_on(colour)))
    return picture(name, title, words, top + tall * len(rows) + 6, "".join(body))


def image_chart(
    name: str, title: str, words: str, cells: Sequence[Sequence[float]], labels: tuple[str, str], ends: tuple[str, str]
) -> Picture:
    """Draw `cells`, shares from 0 to 1, the first row at the bottom; labels: across and up; ends: words of the scale."""
    left, top, tall = 18.0, 6.0, 190.0
    wide = WIDTH - left - 4
    source = "data:image/png;base64," + base64.b64encode(png(cells[::-1])).decode()
    body = [
        tag("image", href=source, x=left, y=top, width=wide, height=tall, preserveAspectRatio="none", class_="pixels"),
        words_at(left + wide / 2, top + tall + 15, f"{labels[0]} ({len(cells[0])})", class_="middle quiet"),
        tag("g", words_at(0, 0, f"{labels[1]} ({len(cells)})", class_="middle quiet"), transform=f"translate(11 {top + tall / 2}) rotate(-90)"),
    ]  # fmt: skip
    bar, y = 90.0, top + tall + 24
    for i in range(45):
        body.append(tag("rect", x=WIDTH / 2 - bar / 2 + 2.0 * i, y=y, width=2.1, height=9, fill=as_hex(shade(i / 44))))
    body.append(words_at(WIDTH / 2 - bar / 2 - 6, y + 9, ends[0], class_="end"))
    body.append(words_at(WIDTH / 2 + bar / 2 + 6, y + 9, ends[1]))
    return picture(name, title, words, y + 16, "".join(body))


def png(cells: Sequence[Sequence[float]]) -> bytes:
    """Return a PNG of shares from 0 to 1, a pixel each, in the colours of `look.shade`."""
    size = struct.pack(">IIBBBBB", len(cells[0]), len(cells), 8, 3, 0, 0, 0)
    palette = b"".join(bytes(shade(i / 255)) for i in range(256))
    lines = b"".join(b"\0" + bytes(round(255 * min(max(v, 0.0), 1.0)) for v in line) for line in cells)
    chunks = ((b"IHDR", size), (b"PLTE", palette), (b"IDAT", zlib.compress(lines, 9)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
