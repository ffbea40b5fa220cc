"""Labels next to the points of a plot, moved so that they do not cover each other or the points."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.transforms import Bbox

Point = tuple[float, float]
RADII = (7, 12, 18, 26, 36, 48, 62, 78)
ANGLES = tuple(math.radians(a) for a in (0, 45, -45, 180, 135, -135, 90, -90, 22, -22, 158, -158))
LEADER_FROM = 14
"""Labels farther from their point than this many typographic points get a thin line to it."""


def gather(points: Sequence[Point], names: Sequence[str], near: float) -> list[tuple[int, str]]:
    """Join the names of points within `near` of each other: (index of one of them, names by line) for each group."""
    groups: list[list[int]] = []
    for i, point in enumerate(points):
        home = next((g for g in groups if math.dist(points[g[0]], point) <= near), None)
        if home is None:
            groups.append([i])
        else:
            home.append(i)
    return [(group[0], "\n".join(names[i] for i in group)) for group in groups]


def place(
    axes: Axes,
    points: Sequence[Point],
    names: Sequence[str],
    avoid: Sequence[tuple[Point, Point]] = (),
    size: float = 8.5,
) -> None:
    """Write each name near its point (data coordinates), the most crowded first, off the lines in `avoid`.

    The figure must have been drawn, so that its axes stay where they are.
    """
    scale = axes.figure.dpi / 72  # pixels in a typographic point
    pixels: list[Point] = [tuple(axes.transData.transform(point)) for point in points]
    taken = [Bbox.from_bounds(x - 4 * scale, y - 4 * scale, 8 * scale, 8 * scale) for x, y in pixels]
    taken += [_around(axes.transData.transform(line), scale) for line in avoid]
    room = axes.get_window_extent()
    labels = gather(pixels, names, near=5 * scale)
    labels.sort(key=lambda label: -sum(math.dist(pixels[label[0]], p) < 90 * scale for p in pixels))
    for i, name in labels:
        note = axes.annotate(name, points[i], (0, 0), textcoords="offset points", fontsize=size, color="#222222")
        box = note.get_window_extent()
        spots = list(_spots(pixels[i], box.width, box.height, scale))
        others = [pixel for pixel in pixels if math.dist(pixel, pixels[i]) > 5 * scale]
        costs = [_cost(pixels[i], *spot[2:], taken, room) + 60 * _claims(spot[2], pixels[i], others) for spot in spots]
        dx, dy, area, leader = spots[costs.index(min(costs))]
        note.set_position((dx, dy))
        if leader > LEADER_FROM:
            ends = axes.transData.inverted().transform([pixels[i], _nearest(pixels[i], area)])
            axes.plot(*zip(*ends), color="#999999", linewidth=0.6, zorder=1, scalex=False, scaley=False)
        taken.append(area)


def _around(line: Any, scale: float) -> Bbox:
    """Return the area of an upright or level line, given as its two ends in pixels."""
    (x0, y0), (x1, y1) = line.min(axis=0), line.max(axis=0)
    return Bbox.from_extents(x0 - scale, y0 - scale, x1 + scale, y1 + scale)


def _spots(pixel: Point, width: float, height: float, scale: float):
    """Return candidate places for a label: (dx, dy) in points, the area in pixels, the distance in points."""
    for radius, angle in itertools.product(RADII, ANGLES):
        x = pixel[0] + radius * scale * math.cos(angle) - width * (1 - math.cos(angle)) / 2
        y = pixel[1] + radius * scale * math.sin(angle) - height * (1 - math.sin(angle)) / 2
        yield (x - pixel[0]) / scale, (y - pixel[1]) / scale, Bbox.from_bounds(x, y, width, height), radius


def _cost(pixel: Point, area: Bbox, leader: float, taken: Sequence[Bbox], room: Bbox) -> float:
    """Return how bad a place is: pixels covered or outside the axes, lines that cross labels, and distance."""
    covered = sum(_overlap(area, other) for other in taken)
    outside = area.width * area.height - _overlap(area, room)
    crossed = 0
    if leader > LEADER_FROM:
        x, y = _nearest(pixel, area)
        along = [(pixel[0] + t * (x - pixel[0]), pixel[1] + t * (y - pixel[1])) for t in (0.3, 0.5, 0.7, 0.9)]
        crossed = sum(other.contains(*spot) for other in taken for spot in along)
    return covered + 3 * outside + 80 * crossed + 0.5 * leader


def _claims(area: Bbox, own: Point, others: Sequence[Point]) -> int:
    """Return how many other points a label at `area` would be nearer to than to its own."""
    away = math.dist(own, _nearest(own, area))
    return sum(math.dist(other, _nearest(other, area)) < away + 1 for other in others)


def _nearest(pixel: Point, area: Bbox) -> Point:
    """Return the place in `area` nearest to a pixel."""
    return min(max(pixel[0], area.x0), area.x1), min(max(pixel[1], area.y0), area.y1)


def _overlap(a: Bbox, b: Bbox) -> float:
    width, height = min(a.x1, b.x1) - max(a.x0, b.x0), min(a.y1, b.y1) - max(a.y0, b.y0)
    return max(width, 0.0) * max(height, 0.0)


def spread(heights: Sequence[float], gap: float, top: float = 1.0) -> list[float]:
    """Return positions below `top`, as close to `heights` as may be, with at least `gap` between neighbours."""
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    blocks: list[tuple[float, list[int]]] = []  # (bottom, members): a block is a stack of touching labels
    for i in order:
        blocks.append((heights[i], [i]))
        while len(blocks) > 1 and blocks[-1][0] < blocks[-2][0] + gap * len(blocks[-2][1]):
            _, members = blocks.pop()
            members = blocks.pop()[1] + members
            blocks.append((sum(heights[m] - gap * k for k, m in enumerate(members)) / len(members), members))
    placed = {m: bottom + gap * k for bottom, members in blocks for k, m in enumerate(members)}
    for m in reversed(order):  # push what sticks out down again
        placed[m] = min(placed[m], top)
        top = placed[m] - gap
    return [placed[i] for i in range(len(heights))]
