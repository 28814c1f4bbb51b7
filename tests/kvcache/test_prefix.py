"""The prefix tree against a naive dict of lists; its size against the edges that it must have."""

from __future__ import annotations

from collections.abc import Collection

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from engine.kvcache.prefix import ID_BYTES, Node, PrefixTree, n_common, packed, unpacked

Key = tuple[int, ...]
# Few values, so that prefixes meet; those of one byte order or sign would look alike otherwise.
KEYS = st.lists(st.sampled_from([0, 1, 256, 2**31 - 1]), max_size=9).map(tuple)


def common(a: Key, b: Key) -> int:
    """How many of their first numbers are the same, one by one."""
    n = 0
    while n < min(len(a), len(b)) and a[n] == b[n]:
        n += 1
    return n


def naive_edges(keys: Collection[Key]) -> set[tuple[Key, int]]:
    """(path, length of the last edge) of all nodes that a tree of `keys` has: the keys, and where
    two of them part."""
    ends = set(keys) | {a[: common(a, b)] for a in keys for b in keys if a != b}
    above = {a: max((b for b in ends if a[: len(b)] == b != a), key=len, default=()) for a in ends}
    return {(a, len(a) - len(above[a])) for a in ends if a}


def tree_edges(tree: PrefixTree[int]) -> set[tuple[Key, int]]:
    """The same of a tree, by its own links; every link must be in both directions."""
    edges, stack = set(), [tree._root]
    while stack:
        node = stack.pop()
        for first, child in node.children.items():
            assert child.parent is node
            assert child.edge[:ID_BYTES] == first
            assert child.end == node.end + len(child.edge) // ID_BYTES
            edges.add((tuple(unpacked(child.path)), len(child.edge) // ID_BYTES))
            stack.append(child)
    return edges


class Tree(RuleBasedStateMachine):
    """Puts, replaces and removes; `naive` has what is kept."""

    def __init__(self) -> None:
        super().__init__()
        self.tree: PrefixTree[int] = PrefixTree()
        self.naive: dict[Key, int] = {}
        self.nodes: dict[Key, Node[int]] = {}
        self.n_puts = 0

    @rule(key=KEYS)
    def put(self, key: Key) -> None:
        self.n_puts += 1
        node = self.tree.put(packed(key), self.n_puts)
        # Splits and merges around it leave a node its identity.
        assert self.nodes.setdefault(key, node) is node
        self.naive[key] = self.n_puts

    @precondition(lambda self: self.naive)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.naive)))
        node = self.nodes.pop(key)
        self.tree.remove(node)
        del self.naive[key]
        assert node.kept is None
        # Who still holds it reads its own numbers.
        assert tuple(unpacked(node.path)) == key

    @rule(key=KEYS, longest=st.none() | st.integers(0, 9))
    def match(self, key: Key, longest: int | None) -> None:
        match = self.tree.match(packed(key), longest)
        most = len(key) if longest is None else min(longest, len(key))
        kept = [key[:n] for n in range(most, -1, -1) if key[:n] in self.naive]
        assert match.node is (self.nodes[kept[0]] if kept else None)
        assert match.n_known == max((common(key, other) for other in self.naive), default=0)

    @invariant()
    def as_the_dict_of_lists(self) -> None:
        assert {n.kept: tuple(unpacked(n.path)) for n in self.tree} == {
            v: key for key, v in self.naive.items()
        }
        for key, node in self.nodes.items():
            above = [n for n in range(len(key)) if key[:n] in self.naive]
            assert (node.end, node.kept) == (len(key), self.naive[key])
            assert node.kept_above == max(above, default=0)

    @invariant()
    def as_large_as_what_it_keeps(self) -> None:
        edges = tree_edges(self.tree)
        assert edges == naive_edges(self.naive)
        assert self.tree.n_bytes == sum(ID_BYTES * n for _, n in edges)


TestTree = Tree.TestCase
TestTree.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


def test_a_split_and_a_merge() -> None:
    tree: PrefixTree[str] = PrefixTree()
    long = tree.put(packed([1, 2, 3, 4]), "long")
    assert tree.n_bytes == 16
    short = tree.put(packed([1, 2]), "short")
    assert (short.edge, long.edge, long.parent) == (packed([1, 2]), packed([3, 4]), short)
    branch = tree.put(packed([1, 2, 5]), "branch")
    assert tree.n_bytes == 20
    tree.remove(short)
    assert (short.parent is not None, set(short.children.values())) == (True, {long, branch})
    tree.remove(branch)
    assert (long.edge, tree.n_bytes) == (packed([1, 2, 3, 4]), 16)
    tree.remove(long)
    assert (list(tree), tree.n_bytes) == ([], 0)


@given(st.lists(st.integers(-(2**31), 2**31 - 1)))
def test_packed_ids_are_unpacked(ids: list[int]) -> None:
    assert unpacked(packed(ids)) == ids
    assert len(packed(ids)) == ID_BYTES * len(ids)


@pytest.mark.parametrize("wrong", [2**31, -(2**31) - 1])
def test_no_number_wraps(wrong: int) -> None:
    with pytest.raises(OverflowError):
        packed([wrong])


@settings(max_examples=300)
@given(KEYS, KEYS, KEYS, st.integers(0, 9))
def test_n_common(start: Key, a: Key, b: Key, at: int) -> None:
    """Numbers that share bytes, but are not the same, are not common."""
    a, b = start + a, start + b
    assert n_common(packed(a), packed(b), min(at, len(b))) == common(a, b[at:])


def test_n_common_of_every_length() -> None:
    for n in range(70):
        for last in range(n + 1):
            a, b = [7] * n, [7] * n
            b[last:] = [8] * (n - last)
            assert n_common(packed(a), packed([3, *b]), 1) == last
