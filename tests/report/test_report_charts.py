"""Charts: colours that are seen and told apart, points where their values are, the Pareto front, images that decode."""

import base64
import itertools
import random
import struct
import xml.etree.ElementTree as ET
import zlib

import pytest

from attnpred.report.charts import Axis, Level, Point, front, line_chart, scatter_chart, spread
from attnpred.report.heat import grid_chart, image_chart, png
from attnpred.report.look import COLOURS, DARK, LIGHT, as_hex, contrast, ink_on, looks, shade
from attnpred.report.svg import WIDTH, Scale, standalone

SVG = "{http://www.w3.org/2000/svg}"
LINES = [f"c{i}" for i in range(COLOURS)]
BLINDNESS = {  # linear RGB to what is seen: Machado, Oliveira and Fernandes 2009, severity 1
    "none": ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    "protan": ((0.152286, 1.052583, -0.204868), (0.114503, 0.786281, 0.099216), (-0.003882, -0.048116, 1.051998)),
    "deutan": ((0.367322, 0.860646, -0.227968), (0.280085, 0.672501, 0.047413), (-0.011820, 0.042940, 0.968881)),
    "tritan": ((1.255528, -0.076749, -0.178779), (-0.078411, 0.930809, 0.147602), (0.004733, 0.691367, 0.303900)),
}


def linear(colour: str) -> list[float]:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    return [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]


def lab(rgb: list[float]) -> list[float]:
    """Linear sRGB to CIE L*a*b* (D65)."""
    matrix = ((0.4124, 0.3576, 0.1805), (0.2126, 0.7152, 0.0722), (0.0193, 0.1192, 0.9505))
    xyz = [sum(a * b for a, b in zip(row, rgb, strict=True)) for row in matrix]
    f = [t ** (1 / 3) if t > 0.008856 else 7.787 * t + 16 / 116 for t in (xyz[0] / 0.9505, xyz[1], xyz[2] / 1.089)]
    return [116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])]


def test_contrast_is_that_of_wcag() -> None:
    assert contrast("#000000", "#ffffff") == pytest.approx(21) == contrast("#ffffff", "#000000")
    assert contrast("#777777", "#ffffff") == pytest.approx(4.478, abs=1e-3)


@pytest.mark.parametrize("palette", [LIGHT, DARK], ids=["light", "dark"])
def test_words_and_lines_are_seen(palette: dict[str, str]) -> None:
    for words in ("ink", "quiet", "link"):
        assert min(contrast(palette[words], palette[ground]) for ground in ("page", "panel")) >= 4.5
    for line in LINES:
        assert contrast(palette[line], palette["page"]) >= 3


@pytest.mark.parametrize("blind", BLINDNESS)
@pytest.mark.parametrize("palette", [LIGHT, DARK], ids=["light", "dark"])
def test_colours_are_told_apart(palette: dict[str, str], blind: str) -> None:
    seen = {}
    for name in LINES:
        rgb = linear(palette[name])
        seen[name] = lab(
            [min(1, max(0, sum(a * b for a, b in zip(row, rgb, strict=True)))) for row in BLINDNESS[blind]]
        )
    gaps = {(a, b): sum((x - y) ** 2 for x, y in zip(seen[a], seen[b], strict=True)) ** 0.5 for a, b in itertools.combinations(LINES, 2)}  # fmt: skip
    assert min(gaps.values()) > 15, min(gaps, key=lambda pair: gaps[pair])


def test_a_heat_map_grows_lighter_and_its_figures_are_read() -> None:
    colours = [as_hex(shade(i / 40)) for i in range(41)]
    assert all(lab(linear(a))[0] < lab(linear(b))[0] for a, b in itertools.pairwise(colours))
    assert min(contrast(ink_on(colour), colour) for colour in colours) >= 4.5


def test_looks_differ_and_stay() -> None:
    found = looks(f"p{i}" for i in range(40))
    assert len({(look.colour, look.marker) for look in found.values()}) == 40 == len({look.letter for look in found.values()})  # fmt: skip
    assert found["p25"].letter == "Z" and found["p26"].letter == "AA"


def test_the_front_is_what_nothing_beats() -> None:
    chance = random.Random(1)
    points = [Point(chance.randrange(8), chance.randrange(8)) for _ in range(60)]
    for lower in (False, True):
        sign = 1 if lower else -1
        naive = {
            p for p in points
            if not any(q.x <= p.x and sign * q.y <= sign * p.y and (q.x, q.y) != (p.x, p.y) for q in points)
        }  # fmt: skip
        assert set(front(points, lower)) == naive


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize(("low", "high"), [(0.1, 0.9), (3.9, 5.6), (1, 1000), (0.031, 0.25), (7, 3e9)])
def test_ticks_are_inside_and_few(low: float, high: float, log: bool) -> None:
    ticks = Scale(low, high, 0, 1, log).ticks()
    assert 2 <= len(ticks) <= 7 and ticks == sorted(ticks)
    assert low * 0.999 <= ticks[0] and ticks[-1] <= high * 1.001


def test_names_are_moved_apart() -> None:
    places = spread([1.0, 0.99, 0.985, 0.5, 0.499], gap=0.05, high=1.0)
    assert max(places) <= 1.0 and all(a - b > 0.0499 for a, b in itertools.pairwise(places))
    assert spread([0.9, 0.5], 0.05, 1.0) == [0.9, 0.5]


@pytest.mark.parametrize("kind", ["lines", "scatter"])
def test_series_without_a_look_of_their_own_are_grey(kind: str) -> None:
    series = {name: [Point(1, i), Point(2, i + 0.5)] for i, name in enumerate("abcd")}
    draw = line_chart if kind == "lines" else scatter_chart
    made = draw("n", "t", "d", series, looks(series), Axis("x"), Y, own=frozenset("bd"))
    root = ET.fromstring(made.svg)
    texts = {"".join(text.itertext()) for text in root.iter(f"{SVG}text")}
    assert {"B  b", "D  d", "2 more policies"} <= texts and not {"A  a", "C  c"} & texts
    grey = [
        e
        for e in root
        if "line" in e.get("class", "").split() and e.tag == f"{SVG}{'path' if kind == 'lines' else 'circle'}"
    ]
    assert len(grey) == (2 if kind == "lines" else 4)
    whole = draw("n", "t", "d", series, looks(series), Axis("x"), Y)
    assert "more policies" not in whole.svg


def test_among_points_only_the_front_has_whiskers() -> None:
    points = [Point(1, 0.5, (0.4, 0.6)), Point(2, 0.3, (0.2, 0.4)), Point(3, 0.9, (0.8, 1.0))]
    made = scatter_chart("n", "t", "d", {"a": points}, looks("a"), Axis("x"), Y)
    assert made.svg.count('class="thin faint"') == 2


SERIES = {
    "a <b>": [Point(0.1, 0.5, (0.4, 0.6), "note & more"), Point(0.5, 0.75)],
    "z" * 90: [Point(0.1, 0.25), Point(0.5, 1.0, (0.9, 1.0))],
}
X, Y = Axis("budget", True, ((0.1, "10 %"), (0.5, "50 %"))), Axis("accuracy")


def placed(root: ET.Element) -> list[tuple[float, float]]:
    """Return where markers are, those of the legend left out."""
    places = []
    for group in root.findall(f"{SVG}g"):
        for path in group.findall(f"{SVG}path"):
            if "transform" in path.attrib:
                x, y = path.attrib["transform"][10:-1].split()
                places.append((float(x), float(y)))
    return places


@pytest.mark.parametrize("kind", ["lines", "scatter"])
def test_markers_stand_at_their_values(kind: str) -> None:
    if kind == "lines":
        made = line_chart("n", "T <i>", "D", SERIES, looks(SERIES), X, Y, Level("full", 1.25, (1.2, 1.3)))
    else:
        made = scatter_chart("n", "T <i>", "D", SERIES, looks(SERIES), X, Y)
    root = ET.fromstring(made.svg)
    assert root.attrib["role"] == "img" and root.attrib["aria-labelledby"] == "n-title n-words"
    assert [root[0].text, root[1].text] == ["T <i>", "D"]
    places = placed(root)
    assert len(places) == 4
    values = [p.y for points in SERIES.values() for p in points]
    slopes = [(places[i][1] - places[0][1]) / (values[i] - values[0]) for i in (1, 2, 3)]
    assert all(slope == pytest.approx(slopes[0], rel=0.01) and slope < 0 for slope in slopes)
    _, _, width, height = map(float, root.attrib["viewBox"].split())
    assert width == WIDTH and all(0 < x < width and 0 < y < height for x, y in places)
    texts = ["".join(text.itertext()) for text in root.iter(f"{SVG}text")]
    assert "A  a <b>" in texts and {"A", "B"} <= set(texts) and not any(len(text) > 60 for text in texts)
    assert [t.text for t in root.iter(f"{SVG}title")][1:] == ["note & more"]


def test_rings_mark_the_front_but_not_what_is_outside_it() -> None:
    series = {"a": [Point(1, 0.5), Point(2, 0.4)], "b": [Point(3, 0.9)], "oracle": [Point(0.5, 1.0)]}
    made = scatter_chart("n", "t", "d", series, looks(series), Axis("ms"), Y, outside=frozenset({"oracle"}))
    rings = [e for e in ET.fromstring(made.svg) if e.tag == f"{SVG}circle"]
    assert len(rings) == 2
    assert len([e for e in ET.fromstring(scatter_chart("n", "t", "d", series, looks(series), Axis("ms"), Y).svg) if e.tag == f"{SVG}circle"]) == 1  # fmt: skip


def test_a_file_for_papers_has_its_own_colours() -> None:
    made = line_chart("n", "t", "d", SERIES, looks(SERIES), X, Y)
    text = standalone(made)
    root = ET.fromstring(text)
    assert root.tag == f"{SVG}svg" and "var(" not in text
    assert f".c0{{color:{LIGHT['c0']}}}" in text


def decoded(data: bytes) -> tuple[int, int, bytes]:
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    place, found = 8, {}
    while place < len(data):
        (size,) = struct.unpack(">I", data[place : place + 4])
        kind, content = data[place + 4 : place + 8], data[place + 8 : place + 8 + size]
        assert struct.unpack(">I", data[place + 8 + size : place + 12 + size])[0] == zlib.crc32(kind + content)
        found[kind] = content
        place += 12 + size
    width, height = struct.unpack(">II", found[b"IHDR"][:8])
    assert len(found[b"PLTE"]) == 768
    return width, height, zlib.decompress(found[b"IDAT"])


def test_a_png_holds_the_cells() -> None:
    assert decoded(png([[0.0, 0.5, 1.0], [2.0, -1.0, 0.25]])) == (3, 2, bytes([0, 0, 128, 255, 0, 255, 0, 64]))


def test_heat_maps_say_their_figures() -> None:
    made = grid_chart("n", "t", "d", ["0 %", "50 %"], ["1,024"], {(0, 0): 0.25, (1, 0): 1.0}, 1.0, ("depth", "tokens"))
    root = ET.fromstring(made.svg)
    assert len(list(root.iter(f"{SVG}rect"))) == 2
    assert {"0.25", "1.00", "0 %", "1,024"} <= {t.text for t in root.iter(f"{SVG}text")}


def test_an_image_has_its_first_row_at_the_bottom() -> None:
    made = image_chart("n", "t", "d", [[0, 0], [1, 1]], ("x", "y"), ("low", "high"))
    (image,) = ET.fromstring(made.svg).iter(f"{SVG}image")
    kind, _, data = image.attrib["href"].partition(",")
    assert kind == "data:image/png;base64"
    assert decoded(base64.b64decode(data)) == (2, 2, bytes([0, 255, 255, 0, 0, 0]))
