"""Graphs as ComfyUI's canvas keeps them and as its API takes them; a node may be a subgraph."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping
from typing import Any

from graphs import Graph, Link, Node, Subgraph

WIDGETS = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}
LINE_HEIGHT, HEAD = 26, 60
INPUTS, OUTPUTS = -10, -20
"""Numbers that the canvas gives to the ends of a subgraph."""


def inputs_of(info: Mapping[str, Any], kind: str) -> dict[str, tuple[Any, dict[str, Any]]]:
    """Type and options of each input of a node, in its order."""
    groups = info[kind]["input"]
    found: dict[str, tuple[Any, dict[str, Any]]] = {}
    for group in ("required", "optional"):
        for name, entry in groups.get(group, {}).items():
            found[name] = (entry[0], entry[1] if len(entry) > 1 else {})
    return found


def is_widget(kind: Any) -> bool:
    return isinstance(kind, list) or kind in WIDGETS


def widget_values(info: Mapping[str, Any], node: Node) -> dict[str, Any]:
    """The value of each widget of a node, in its order."""
    values = {}
    for name, (kind, options) in inputs_of(info, node.kind).items():
        if not is_widget(kind):
            continue
        choices = kind if isinstance(kind, list) else options.get("options", [None])
        default = options.get("default", choices[0] if choices else None)
        given = node.given.get(name, default)
        values[name] = default if isinstance(given, Link) else given
    return values


def api_layout(graph: Graph, info: Mapping[str, Any]) -> dict[str, Any]:
    """What ``/prompt`` takes: subgraphs are dissolved, their nodes numbered ``3:1``, ``3:2``."""
    prompt = {}
    for number, node, links in _dissolved(graph):
        if node.kind not in info:  # a note
            continue
        unknown = set(node.given) - set(inputs_of(info, node.kind))
        if unknown:
            raise ValueError(f"{node.kind} has no input {sorted(unknown)}")
        inputs: dict[str, Any] = {
            k: v for k, v in widget_values(info, node).items() if v is not None
        }
        prompt[number] = {
            "class_type": node.kind,
            "inputs": inputs | links,
            "_meta": {"title": node.title or info[node.kind]["display_name"]},
        }
    return prompt


def _dissolved(graph: Graph) -> Iterator[tuple[str, Node, dict[str, list[Any]]]]:
    """Each node with its number and its links, which are numbers and outputs of other nodes."""

    def source(link: Link) -> list[Any]:
        if link.node.inside is None:
            return [str(link.node.number), link.output]
        within = link.node.inside.exits[link.output][1]
        return [f"{link.node.number}:{within.node.number}", within.output]

    def linked(node: Node) -> dict[str, Link]:
        return {name: link for name, link in node.given.items() if isinstance(link, Link)}

    for outer in graph.nodes:
        links = {name: source(link) for name, link in linked(outer).items()}
        if outer.inside is None:
            yield str(outer.number), outer, links
            continue
        for node in outer.inside.nodes:
            own = {
                name: [f"{outer.number}:{link.node.number}", link.output]
                for name, link in linked(node).items()
            }
            for entry in outer.inside.entries:
                if entry.node is node and entry.name in links:
                    own[entry.input] = links[entry.name]
            yield f"{outer.number}:{node.number}", node, own


def canvas_layout(name: str, graph: Graph, info: Mapping[str, Any]) -> dict[str, Any]:
    """What the canvas opens."""
    nodes, links = _wired(graph, info)
    inner = [node.inside for node in graph.nodes if node.inside is not None]
    return {
        "id": str(uuid.uuid5(uuid.NAMESPACE_URL, f"cntlora/{name}")),
        "revision": 0,
        "last_node_id": len(graph.nodes),
        "last_link_id": len(links),
        "nodes": nodes,
        "links": [list(link.values()) for link in links],
        "groups": [],
        **({"definitions": {"subgraphs": [_definition(x, info) for x in inner]}} if inner else {}),
        "config": {},
        "extra": {},
        "version": 0.4,
    }


def blueprint(subgraph: Subgraph, info: Mapping[str, Any], description: str) -> dict[str, Any]:
    """What ComfyUI offers as a node where a pack has it in its folder ``subgraphs``."""
    graph = Graph()
    graph.add_subgraph(subgraph, (40, 40), tall=300)
    content = canvas_layout(f"subgraphs/{subgraph.name}", graph, info)
    return content | {"extra": {"BlueprintDescription": description}}


def _wired(
    graph: Graph, info: Mapping[str, Any]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Nodes and links of a canvas, or of a subgraph without the links to its inputs and outputs."""
    links: list[dict[str, Any]] = []
    for node in graph.nodes:
        for slot, (input_name, kind) in enumerate(_sockets(info, node, graph)):
            link = node.given.get(input_name)
            if isinstance(link, Link):
                links.append(_link(links, link.node.number, link.output, node.number, slot, kind))
    if isinstance(graph, Subgraph):
        for place, entry in enumerate(graph.entries):
            sockets = _sockets(info, entry.node, graph)
            slot = [name for name, _ in sockets].index(entry.input)
            kind = sockets[slot][1]
            links.append(_link(links, INPUTS, place, entry.node.number, slot, kind))
        for place, (_, link) in enumerate(graph.exits):
            kind = info[link.node.kind]["output"][link.output]
            links.append(_link(links, link.node.number, link.output, OUTPUTS, place, kind))
    return [_canvas_node(node, info, graph, links) for node in graph.nodes], links


def _link(
    before: list[Any], source: int, output: int, target: int, slot: int, kind: str
) -> dict[str, Any]:
    return {
        "id": len(before) + 1,
        "origin_id": source,
        "origin_slot": output,
        "target_id": target,
        "target_slot": slot,
        "type": kind,
    }


def _definition(graph: Subgraph, info: Mapping[str, Any]) -> dict[str, Any]:
    """What a canvas keeps of a subgraph."""
    nodes, links = _wired(graph, info)

    def slots(kind: str, side: str, names: list[str], end: int) -> list[dict[str, Any]]:
        found = []
        for place, name in enumerate(names):
            (link,) = (x for x in links if (x[f"{side}_id"], x[f"{side}_slot"]) == (end, place))
            identity = str(uuid.uuid5(uuid.UUID(graph.id), f"{kind}/{name}"))
            found.append(
                {"id": identity, "name": name, "type": link["type"], "linkIds": [link["id"]]}
            )
        return found

    left, right = len(graph.entries), len(graph.exits)
    edge = max(node.at[0] + node.wide for node in graph.nodes) + 60
    return {
        "id": graph.id,
        "version": 1,
        "state": {
            "lastGroupId": 0,
            "lastNodeId": len(nodes),
            "lastLinkId": len(links),
            "lastRerouteId": 0,
        },
        "revision": 0,
        "config": {},
        "name": graph.name,
        "inputNode": {"id": INPUTS, "bounding": [-160, 40, 120, 40 + 20 * left]},
        "outputNode": {
            "id": OUTPUTS,
            "bounding": [edge, 40, 120, 40 + 20 * right],
        },
        "inputs": slots("input", "origin", [entry.name for entry in graph.entries], INPUTS),
        "outputs": slots("output", "target", [name for name, _ in graph.exits], OUTPUTS),
        "widgets": [],
        "nodes": nodes,
        "groups": [],
        "links": links,
        "extra": {},
    }


def _sockets(info: Mapping[str, Any], node: Node, graph: Graph) -> list[tuple[str, str]]:
    """Inputs that are no widgets, and after them the widgets that a link replaces."""
    if node.inside is not None:
        return _slots(info, node.inside)
    if node.kind not in info:
        return []
    entries = graph.entries if isinstance(graph, Subgraph) else []
    linked = {name for name, value in node.given.items() if isinstance(value, Link)}
    linked |= {entry.input for entry in entries if entry.node is node}
    found = inputs_of(info, node.kind).items()
    plain = [(name, kind) for name, (kind, _) in found if not is_widget(kind)]
    return [*plain, *((name, k) for name, (k, _) in found if is_widget(k) and name in linked)]


def _slots(info: Mapping[str, Any], inside: Subgraph) -> list[tuple[str, str]]:
    """Name and type of each input of a subgraph."""
    return [(x.name, inputs_of(info, x.node.kind)[x.input][0]) for x in inside.entries]


def _canvas_node(
    node: Node, info: Mapping[str, Any], graph: Graph, links: list[dict[str, Any]]
) -> dict[str, Any]:
    content: dict[str, Any] = {
        "id": node.number,
        "type": node.kind,
        "pos": list(node.at),
        "flags": {},
        "order": node.number - 1,
        "mode": 0,
        "inputs": [],
        "outputs": [],
        "properties": {},
    }
    if node.title:
        content["title"] = node.title
    if node.inside is None and node.kind not in info:
        content |= {"size": [node.wide, node.tall], "widgets_values": [node.given["text"]]}
        return content
    sockets = _sockets(info, node, graph)
    if node.inside is None:
        outputs = list(zip(info[node.kind]["output_name"], info[node.kind]["output"]))
        values, shown = _shown(info, node)
        properties: dict[str, Any] = {"Node name for S&R": node.kind}
    else:
        outputs = [(n, info[x.node.kind]["output"][x.output]) for n, x in node.inside.exits]
        values, shown, properties = [], 0, {"proxyWidgets": []}
    rows = max(len(sockets), len(outputs)) + shown
    entering = {x["target_slot"]: x["id"] for x in links if x["target_id"] == node.number}
    return content | {
        "size": [node.wide, node.tall or HEAD + LINE_HEIGHT * rows],
        "inputs": [
            {
                "name": name,
                "type": kind,
                "link": entering.get(slot),
                **({"widget": {"name": name}} if is_widget(kind) else {}),
            }
            for slot, (name, kind) in enumerate(sockets)
        ],
        "outputs": [
            {
                "name": name,
                "type": kind,
                "links": [
                    x["id"]
                    for x in links
                    if (x["origin_id"], x["origin_slot"]) == (node.number, slot)
                ],
            }
            for slot, (name, kind) in enumerate(outputs)
        ],
        "properties": properties,
        "widgets_values": values,
    }


def _shown(info: Mapping[str, Any], node: Node) -> tuple[list[Any], int]:
    """The values of a node's widgets, and the rows that these take up."""
    values, shown = [], 0
    for name, value in widget_values(info, node).items():
        kind, options = inputs_of(info, node.kind)[name]
        values.append(value)
        unseen = options.get("advanced") or options.get("hidden")
        shown += 0 if unseen else 4 if options.get("multiline") else 1
        fixed = options.get("control_after_generate", name in ("seed", "noise_seed"))
        if kind == "INT" and fixed:
            values.append("fixed")
            shown += 1
    return values, shown
