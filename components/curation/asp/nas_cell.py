"""The cells of NAS-Bench-201 (arXiv 2001.00326) and their strings.

A cell is a graph of numbered nodes: node 0 is the input, the last one the output, and from every
node an edge goes to each later one. An edge applies an operation, a node sums what its edges bring.
Four nodes make 5⁶ = 15,625 cells, three nodes the 5³ = 125 of our own small space. Knows nothing
of networks.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from components.pipeline.errors import DataContractError

NONE, SKIP = "none", "skip_connect"
CONV_1X1, CONV_3X3 = "nor_conv_1x1", "nor_conv_3x3"
POOL = "avg_pool_3x3"
#: In the order of NAS-Bench-201.
OPERATIONS = (NONE, SKIP, CONV_1X1, CONV_3X3, POOL)


@dataclass(frozen=True)
class Architecture:
    """A cell.

    Attributes:
        operations: one an edge, by target and then by source: 0→1, 0→2, 1→2, 0→3 …
    """

    operations: tuple[str, ...]

    def __post_init__(self) -> None:
        if edges_of(self.nodes) != len(self.operations) or self.nodes < 2:
            raise ValueError(f"no cell has {len(self.operations)} edges: 1, 3, 6, 10 … would do")
        for operation in self.operations:
            if operation not in OPERATIONS:
                raise ValueError(f"operation {operation!r} is none of {', '.join(OPERATIONS)}")

    @classmethod
    def parse(cls, text: str) -> Architecture:
        """Of a string such as ``|nor_conv_3x3~0|+|none~0|skip_connect~1|``.

        Raises:
            DataContractError: it is no such string; the character is told, counted from 0.
        """
        operations: list[str] = []
        begin = 0
        for target, node in enumerate(text.split("+"), start=1):
            if len(node) < 2 or node[0] != "|" or node[-1] != "|":
                raise _wrong(text, begin, f"node {target} is {node!r}, not between two '|'")
            edges = node[1:-1].split("|")
            place = begin + 1
            for source, edge in enumerate(edges):
                name, _, number = edge.partition("~")
                if source >= target:
                    raise _wrong(text, place, f"node {target} has more than {target} edges")
                if number != str(source):
                    what = f"edge {edge!r} of node {target} comes from {number!r}, not from"
                    raise _wrong(text, place, f"{what} '{source}'")
                if name not in OPERATIONS:
                    raise _wrong(text, place, f"there is no operation {name!r}")
                operations.append(name)
                place += len(edge) + 1
            if len(edges) < target:
                what = f"node {target} has {len(edges)} of its {target} edges"
                raise _wrong(text, place - 1, what)
            begin += len(node) + 1
        return cls(tuple(operations))

    def __str__(self) -> str:
        return "+".join(
            "".join(["|", *(f"{operation}~{source}|" for source, operation in incoming)])
            for incoming in self.incoming
        )

    @property
    def nodes(self) -> int:
        """The input and the output among them."""
        nodes = 1
        while edges_of(nodes) < len(self.operations):
            nodes += 1
        return nodes

    @property
    def incoming(self) -> tuple[tuple[tuple[int, str], ...], ...]:
        """Source and operation of the edges of node 1, 2 …"""
        rest = iter(self.operations)
        return tuple(
            tuple((source, next(rest)) for source in range(target))
            for target in range(1, self.nodes)
        )

    @property
    def expression(self) -> str:
        """What the output computes of the input: equal for cells that count as one topology.

        The definition is that of NATS-Bench (``to_unique_str(consider_zero=True)``, by which there
        are 6,466 topologies of four nodes): a skip is its source; ``none``, and anything of a node
        that is nothing but one ``none``, is ``#``; edges of a node have no order. It takes an
        operation on nothing for nothing, though a convolution's normalisation has a bias, and does
        not see that a sum of nothings is nothing or that sums may be grouped otherwise.
        """
        text_N = ["0"]
        for incoming in self.incoming:
            terms = []
            for source, operation in incoming:
                if operation == NONE or text_N[source] == "#":
                    terms.append("#")
                else:
                    of = text_N[source]
                    terms.append(of if operation == SKIP else f"({of})@{operation}")
            text_N.append("+".join(sorted(terms)))
        return text_N[-1]


def edges_of(nodes: int) -> int:
    """Edges of a cell of so many nodes."""
    return nodes * (nodes - 1) // 2


def all_architectures(nodes: int) -> Iterator[Architecture]:
    """Every cell of so many nodes, the last edge changing fastest."""
    for operations in itertools.product(OPERATIONS, repeat=edges_of(nodes)):
        yield Architecture(operations)


def _wrong(text: str, place: int, what: str) -> DataContractError:
    return DataContractError(
        what,
        where=f"architecture {text!r} character {place}",
        remedy="write every node as |operation~0|operation~1|…|, one edge for each earlier node, "
        f"with a + between nodes; operations: {', '.join(OPERATIONS)}",
    )
