"""What a workflow consists of: nodes, links, and nodes that are graphs themselves."""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Link:
    """An output of another node."""

    node: Node
    output: int


@dataclass(eq=False)
class Node:
    """A node of a graph: what is not given takes its default.

    Attributes:
        kind: The node's id in ComfyUI.
        at: Column and height on the canvas, in pixels.
        given: Links and widget values by input.
        title: Over the node, where it is not the usual one.
        tall: Height on the canvas, in pixels; by default as its widgets need.
        wide: Width on the canvas, in pixels.
        number: Its number in the graph.
        inside: What a subgraph consists of.
    """

    kind: str
    at: tuple[int, int]
    given: dict[str, Any] = field(default_factory=dict)
    title: str | None = None
    tall: int = 0
    wide: int = 330
    number: int = 0
    inside: Subgraph | None = None

    def out(self, output: int = 0) -> Link:
        return Link(self, output)


class Graph:
    """Nodes in the order in which they run."""

    def __init__(self) -> None:
        self.nodes: list[Node] = []

    def add(self, kind: str, at: tuple[int, int], *, title: str | None = None, tall: int = 0,
            wide: int = 330, **given: Any) -> Node:  # fmt: skip
        node = Node(kind, at, given, title, tall, wide, len(self.nodes) + 1)
        self.nodes.append(node)
        return node

    def add_subgraph(self, inside: Subgraph, at: tuple[int, int], *, tall: int, wide: int = 330,
                     **given: Link) -> Node:  # fmt: skip
        """A subgraph as a node; the values of its widgets are those of the nodes in it."""
        node = Node(
            inside.id, at, dict(given), inside.name, tall, wide, len(self.nodes) + 1, inside
        )
        self.nodes.append(node)
        return node

    def note(self, at: tuple[int, int], text: str, tall: int = 160) -> None:
        self.add("MarkdownNote", at, tall=tall, text=text)


@dataclass(frozen=True)
class Entry:
    """An input of a subgraph: its name, and the node and input within that it stands for."""

    name: str
    node: Node
    input: str


class Subgraph(Graph):
    """Nodes that are one node from outside.

    Args:
        name: Shown over the node, and the name of its file.
        key: What tells this subgraph from others of the same name.
    """

    def __init__(self, name: str, key: str) -> None:
        super().__init__()
        self.name = name
        self.id = str(uuid.uuid5(uuid.NAMESPACE_URL, f"cntlora/subgraph/{key}"))
        self.entries: list[Entry] = []
        self.exits: list[tuple[str, Link]] = []

    def entry(self, node: Node, name: str) -> None:
        """Let an input of a node be one of the subgraph."""
        self.entries.append(Entry(name, node, name))

    def exit(self, name: str, link: Link) -> None:
        """Let an output of a node be one of the subgraph."""
        self.exits.append((name, link))
