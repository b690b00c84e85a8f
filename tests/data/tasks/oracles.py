"""The tasks' definitions again, in plain Python: from a row of tokens and its length to the answers by position.

Each checks the form of the row, padding included, and shares no code or constant with the generators.
"""

import itertools

SPELLING = {
    "modular_arithmetic": ("_", "+", "-", "*", "=", "0", "1", "2", "3", "4"),
    "modular_arithmetic_brackets": ("0", "1", "2", "3", "4", "+", "-", "*", "(", ")", "=", "_"),
}


def spell(row: list[int], alphabet: str) -> str:
    return "".join(SPELLING[alphabet][token] for token in row)


def unpadded(row: list[int], n: int, padding: int) -> list[int]:
    assert row[n:] == [padding] * (len(row) - n), "what follows the sequence is padding"
    assert padding not in row[:n]
    return row[:n]


def parity(row: list[int], length: int) -> dict[int, int]:
    bits = [{1: 0, 2: 1}[token] for token in unpadded(row, length - 1, 0)]
    return {length - 2: 2 if bits.count(1) % 2 else 1}


def even_pairs(row: list[int], length: int) -> dict[int, int]:
    letters = unpadded(row, length, 0)
    assert set(letters) <= {1, 2}
    unequal = sum(a != b for a, b in itertools.pairwise(letters))
    return {length - 1: 2 if unequal % 2 else 1}


def cycle_navigation(row: list[int], length: int) -> dict[int, int]:
    place = 0
    for token in unpadded(row, length, 0):
        place = {0: [0, 1, 4], 1: [1, 2, 0], 2: [2, 3, 1], 3: [3, 4, 2], 4: [4, 0, 3]}[place][token - 1]
    return {length - 1: 4 + place}


def modular_arithmetic(row: list[int], length: int) -> dict[int, int]:
    text = spell(unpadded(row, length - 1, 0), "modular_arithmetic")
    assert length % 2 == 1
    assert set(text[:-1:2]) <= set("01234")
    assert set(text[1:-1:2]) <= set("+-*")
    assert text[-1] == "="
    return {length - 2: 5 + eval(text[:-1]) % 5}


def brackets(row: list[int], length: int) -> dict[int, int]:
    assert row[length - 2 :] == ([0] + [11] * len(row))[: len(row) - length + 2], (
        "the place of the answer, then padding"
    )
    text = spell(row[: length - 2], "modular_arithmetic_brackets")
    assert text[-1] == "="
    tree(text[:-1])
    return {length - 3: eval(text[:-1]) % 5}


def brackets_without_times(row: list[int], length: int) -> dict[int, int]:
    assert 7 not in row
    return brackets(row, length)


def tree(text: str):
    """Parses an expression of the grammar: a nested tuple (size, left, operator, right), or a leaf's text."""
    if len(text) < 5:
        form = "".join("d" if c in "01234" else c for c in text)
        assert form == ["d", "-d", "(d)", "(-d)"][len(text) - 1], text
        return text
    assert text[0] == "(", text
    assert text[-1] == ")", text
    depth = 0
    for i, c in enumerate(text):
        depth += {"(": 1, ")": -1}.get(c, 0)
        # The operator comes after at least one token of the left side; an earlier minus is the left side's own.
        if depth == 1 and i >= 2 and c in "+-*":
            return len(text), tree(text[1:i]), c, tree(text[i + 1 : -1])
    raise AssertionError(f"no operator in {text}")


def permutations(name: str) -> list[tuple[int, ...]]:
    """The elements of s3, a4, a5, s5 and of z60, whose element i turns a cycle of 60 by i."""
    if name == "z60":
        return [tuple((i + turn) % 60 for i in range(60)) for turn in range(60)]
    elements = sorted(itertools.permutations(range(int(name[1]))))
    return [e for e in elements if name[0] == "s" or (len(e) - _cycles(e)) % 2 == 0]


def _cycles(permutation: tuple[int, ...]) -> int:
    seen, n = set(), 0
    for start in permutation:
        n += start not in seen
        while start not in seen:
            seen.add(start)
            start = permutation[start]
    return n


def word_problem(name: str):
    elements = permutations(name)
    order = len(elements)

    def answers(row: list[int], length: int) -> dict[int, int]:
        bos, *word = unpadded(row, length + 1, order)
        assert bos == order + 1
        product, expected = elements[0], {0: bos}
        for i, factor in enumerate(word, start=1):
            product = tuple(product[j] for j in elements[factor])
            expected[i] = elements.index(product)
        return expected

    return answers


def mqar(pairs: int, vocab_size: int, *, blank: bool):
    def answers(row: list[int], length: int) -> dict[int, int]:
        assert row[length:] == [0] * (len(row) - length)
        memory = dict(zip(row[: 2 * pairs : 2], row[1 : 2 * pairs : 2], strict=True))
        assert len(memory) == len(set(memory.values())) == pairs
        assert all(1 <= key < vocab_size // 2 for key in memory)
        assert all(vocab_size // 2 <= value < vocab_size for value in memory.values())
        if not blank:
            return {}  # any token may stand between the queries: only the generator knows which are queries
        return {i: memory[row[i]] for i in range(2 * pairs, length) if row[i] != 0}

    return answers


ORACLES = {
    "parity": parity,
    "even_pairs": even_pairs,
    "cycle_navigation": cycle_navigation,
    "modular_arithmetic": modular_arithmetic,
    "modular_arithmetic_brackets": brackets,
    "modular_arithmetic_brackets_without_times": brackets_without_times,
    **{name: word_problem(name) for name in ("z60", "s3", "a4", "a5", "s5")},
    "mqar_blank_4": mqar(4, 8192, blank=True),
}
