"""Word problems: the tables are groups of the right kind; elements are drawn evenly."""

import itertools

import numpy as np
import pytest

from m3jax.data.tasks import word_problem
from m3jax.data.tasks.word_problem import cyclic_table, permutation_table
from tests.data.tasks.frequencies import assert_frequencies, evenly
from tests.data.tasks.oracles import permutations
from tests.data.tasks.test_tasks import sample

TABLES = {
    "z60": cyclic_table(60),
    "s3": permutation_table(3, even=False),
    "a4": permutation_table(4, even=True),
    "a5": permutation_table(5, even=True),
    "s5": permutation_table(5, even=False),
}
GROUPS = pytest.mark.parametrize("name", TABLES)
ORDERS = {"z60": 60, "s3": 6, "a4": 12, "a5": 60, "s5": 120}


@GROUPS
def test_tables_are_groups(name):
    table, order = TABLES[name], ORDERS[name]
    assert table.shape == (order, order)
    np.testing.assert_array_equal(table[0], np.arange(order))
    np.testing.assert_array_equal(table[:, 0], np.arange(order))
    for rows in (table, table.T):
        np.testing.assert_array_equal(np.sort(rows, axis=1), np.tile(np.arange(order), (order, 1)))
    np.testing.assert_array_equal(table[table], table[:, table])  # (ab)c = a(bc)
    assert (table == table.T).all() == (name == "z60")


@GROUPS
def test_tables_compose_permutations(name):
    elements = permutations(name)
    assert len(elements) == ORDERS[name]
    for (i, a), (j, b) in itertools.product(enumerate(elements), repeat=2):
        assert elements[TABLES[name][i, j]] == tuple(a[k] for k in b)


def derived_orders(table: np.ndarray) -> list[int]:
    """Orders of the group, its commutator subgroup, and so on, until they stay."""
    inverse = np.argmin(table, axis=1)  # where the product is 0, the identity
    orders, group = [], set(range(len(table)))
    while len(group) not in orders:
        orders.append(len(group))
        members = np.array(sorted(group))
        a, b = members[:, None], members[None, :]
        group = set(table[table[a, b], inverse[table[b, a]]].ravel().tolist())
        while len(closed := group | set(table[np.ix_(sorted(group), sorted(group))].ravel().tolist())) > len(group):
            group = closed
    return orders


def test_which_groups_are_solvable():
    # Layers of commuting transitions are enough for the ones that come down to 1.
    expected = {"z60": [60, 1], "s3": [6, 3, 1], "a4": [12, 4, 1], "a5": [60], "s5": [120, 60]}
    assert {name: derived_orders(table) for name, table in TABLES.items()} == expected


@GROUPS
def test_elements_and_products_are_even(name):
    batch = sample(name, 1, 2048, 12, 12)
    expected = evenly(range(ORDERS[name]))
    assert_frequencies(batch.tokens[:, 1:], expected)
    for position in (1, 2, 12):
        assert_frequencies(batch.targets[:, position], expected)


def test_any_group_makes_a_task():
    task = word_problem("c2", cyclic_table(2))
    assert (task.name, task.vocab_size, task.chance, task.positions(8)) == ("c2", 9, 1 / 2, 9)
