"""Claims about cells: their strings, how many there are, which are one topology."""

from __future__ import annotations

import pytest

from components.curation.asp.nas_cell import OPERATIONS, Architecture, all_architectures
from components.pipeline.errors import DataContractError

#: The string that NATS-Bench's own documentation shows.
PUBLISHED = "|nor_conv_1x1~0|+|none~0|none~1|+|none~0|none~1|skip_connect~2|"


@pytest.mark.parametrize(("nodes", "count"), [(2, 5), (3, 125), (4, 15_625)])
def test_every_cell_is_its_string_and_there_are_as_many_as_operations_allow(
    nodes: int, count: int
) -> None:
    cells = list(all_architectures(nodes))
    assert len({*cells}) == len({str(cell) for cell in cells}) == len(cells) == count
    assert all(Architecture.parse(str(cell)) == cell for cell in cells)
    assert {cell.nodes for cell in cells} == {nodes}


def test_edges_are_read_by_target_and_source() -> None:
    cell = Architecture.parse(PUBLISHED)
    assert str(cell) == PUBLISHED
    assert cell.operations == ("nor_conv_1x1", *["none"] * 4, "skip_connect")
    assert cell.incoming[2] == ((0, "none"), (1, "none"), (2, "skip_connect"))


@pytest.mark.parametrize(
    ("text", "place", "what"),
    [
        ("", 0, "node 1 is '', not between"),
        ("|none~0|+none~0|none~1|", 9, "node 2 is 'none~0|none~1|', not between"),
        ("|none~0|+|none~0|none~1", 9, "not between two"),
        ("|none~0|+", 9, "node 2 is ''"),
        ("||", 1, "comes from '', not from '0'"),
        ("|none|", 1, "comes from '', not from '0'"),
        ("|none~0|+|none~1|none~0|", 10, "edge 'none~1' of node 2 comes from '1', not from '0'"),
        ("|none~0|+|none~0|none~01|", 17, "comes from '01', not from '1'"),
        ("|none~0|+|none~0|conv~1|", 17, "there is no operation 'conv'"),
        ("| none~0|", 1, "there is no operation ' none'"),
        ("|none~0|none~1|", 8, "node 1 has more than 1 edges"),
        ("|none~0|+|none~0|", 16, "node 2 has 1 of its 2 edges"),
    ],
)
def test_a_wrong_string_is_told_with_its_place(text: str, place: int, what: str) -> None:
    with pytest.raises(DataContractError) as told:
        Architecture.parse(text)
    assert told.value.where == f"architecture {text!r} character {place}"
    assert what in told.value.what
    assert all(operation in str(told.value) for operation in OPERATIONS)


@pytest.mark.parametrize("operations", [(), ("none",) * 2, ("none",) * 5, ("conv",)])
def test_operations_that_make_no_cell_are_refused(operations: tuple[str, ...]) -> None:
    with pytest.raises(ValueError):
        Architecture(operations)


def test_four_nodes_have_as_many_topologies_as_published() -> None:
    """6,466 of 15,625: what NATS-Bench counts (D-X-Y/NATS-Bench issue 43)."""
    assert len({cell.expression for cell in all_architectures(4)}) == 6_466
    assert len({cell.expression for cell in all_architectures(3)}) == 60


def test_cells_that_compute_the_same_are_one_topology() -> None:
    def of(*operations: str) -> str:
        return Architecture(operations).expression

    # An edge that leads nowhere, and a way through a skip.
    assert of("none", "nor_conv_3x3", "none") == of("avg_pool_3x3", "nor_conv_3x3", "none")
    assert of("skip_connect", "none", "nor_conv_3x3") == of("nor_conv_3x3", "none", "skip_connect")
    assert of("skip_connect", "nor_conv_3x3", "avg_pool_3x3") == of(
        "skip_connect", "avg_pool_3x3", "nor_conv_3x3"
    )
    assert of("nor_conv_3x3", "none", "nor_conv_1x1") != of("nor_conv_1x1", "none", "nor_conv_3x3")
    # Once and twice the input are not the same.
    assert of("none", "skip_connect", "none") != of("skip_connect", "skip_connect", "skip_connect")
