"""A Mermaid flowchart as an SVG, so that the site needs no script for the drawing that README has as text.

Nodes stand one below the other in the order in which they are first named. An edge to the next node is an arrow down,
every other edge an arc on the right. It reads `id`, `id[text]`, `id["text"]`, `id((text))`, `-->` and `-- "text" -->`,
and refuses the rest.
"""

import re
from dataclasses import dataclass, field
from html import escape

NODE = re.compile(r'(\w+)(?:\["([^"]+)"\]|\[([^]"]+)\]|\(\(([^)]+)\)\))?')
EDGE = re.compile(r' *--(?: "([^"]+)" --)?> *')
ROW, HEIGHT, MIDDLE, CHARACTER = 64, 34, 160, 7.4  # pixels: rows, boxes, the column's centre, a letter's width
HEAD = ('<marker id="head" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="8" markerHeight="8" orient="auto">'
        '<path d="M0 0 8 4 0 8z"/></marker>')


@dataclass
class Flowchart:
    """Text and shape of each node by its id, and edges as (from, to, text)."""

    nodes: dict[str, tuple[str, bool]] = field(default_factory=dict)  # id -> text, whether it is round
    edges: list[tuple[str, str, str]] = field(default_factory=list)

    def node(self, line: str, at: int) -> tuple[str, int]:
        """The id of the node that stands at a place of a line, and where it ends. Raises ValueError."""
        if not (found := NODE.match(line, at)):
            raise ValueError(f"flowchart: no node at column {at + 1} of '{line}'")
        name, *texts = found.groups()
        text = next(filter(None, texts), None)
        if text or name not in self.nodes:
            self.nodes[name] = (text or name, bool(texts[2]))
        return name, found.end()


def parse(text: str) -> Flowchart:
    """A flowchart from its Mermaid source. Raises ValueError for what it can't draw."""
    header, *lines = filter(None, map(str.strip, text.splitlines()))
    if not re.fullmatch(r"flowchart (LR|TD|TB)", header):
        raise ValueError(f"flowchart: '{header}' begins no flowchart")
    chart = Flowchart()
    for line in lines:
        start, at = chart.node(line, 0)
        while at < len(line):
            if not (arrow := EDGE.match(line, at)):
                raise ValueError(f"flowchart: no arrow at column {at + 1} of '{line}'")
            end, at = chart.node(line, arrow.end())
            chart.edges.append((start, end, arrow[1] or ""))
            start = end
    return chart


def svg(chart: Flowchart) -> str:
    """The chart as one SVG element; its colours are the style sheet's."""
    names = list(chart.nodes)
    rows = {name: 24 + ROW * number for number, name in enumerate(names)}  # each node's centre
    half = {name: CHARACTER * len(text) / 2 + 14 for name, (text, _) in chart.nodes.items()}
    arcs = [edge for edge in chart.edges if names.index(edge[1]) != names.index(edge[0]) + 1]
    down = max((len(text) for *edge, text in chart.edges if (*edge, text) not in arcs), default=0)
    side = MIDDLE + max(*half.values(), CHARACTER * down + 10) + 10
    parts = [_box(rows[name], half[name], *chart.nodes[name]) for name in names]
    for start, end, text in chart.edges:
        if (start, end, text) not in arcs:
            parts.append(_arrow(f"M{MIDDLE} {rows[start] + HEIGHT / 2}V{rows[end] - HEIGHT / 2}"))
            parts.append(_text(MIDDLE + 10, (rows[start] + rows[end]) / 2, text))
    for number, (start, end, text) in enumerate(arcs):
        x = side + 14 * number
        parts.append(_arrow(f"M{MIDDLE + half[start]} {rows[start]}H{x}V{rows[end]}H{MIDDLE + half[end]}"))
        parts.append(_text(x + 8, (rows[start] + rows[end]) / 2, text))
    width = side + 14 * len(arcs) + CHARACTER * max((len(text) for *_, text in arcs), default=0)
    said = "; ".join(f"{chart.nodes[a][0]} to {chart.nodes[b][0]}" + (f" ({text})" if text else "")
                     for a, b, text in chart.edges)
    return (f'<svg class="flowchart" role="img" aria-label="{escape(said)}" '
            f'viewBox="0 0 {width:.0f} {rows[names[-1]] + 24}" style="max-width:{width:.0f}px">'
            f"{HEAD}{''.join(parts)}</svg>")


def _box(row: float, half: float, text: str, is_round: bool) -> str:
    return (f'<rect x="{MIDDLE - half:g}" y="{row - HEIGHT / 2:g}" width="{2 * half:g}" height="{HEIGHT}" '
            f'rx="{HEIGHT / 2 if is_round else 4:g}"/>' + _text(MIDDLE, row, text, "middle"))


def _arrow(path: str) -> str:
    return f'<path class="arrow" d="{path}" marker-end="url(#head)"/>'


def _text(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text x="{x:g}" y="{y + 5:g}" text-anchor="{anchor}">{escape(text)}</text>' if text else ""
