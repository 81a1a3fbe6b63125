"""The prefix tree of prompts, which stores and computes each shared prefix once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from lmcot.models.generation.stacks import Entry

SHORTEST_SHARED = 32
"""Minimum length of a shared prefix, since each part costs extra matrix products."""


class TreeNode:
    """Tokens between two forks of the tree, with their keys and values."""

    def __init__(self, tokens: tuple[int, ...], start: int, parent: TreeNode | None) -> None:
        self.tokens = tokens
        self.start = start
        """Position of the node's first token."""
        self.parent = parent
        self.children: list[TreeNode] = []
        self.users = 0
        """Number of prompts in use that end here or below."""
        self.done = 0
        """Number of tokens whose keys and values are computed."""
        self.keys: list[Tensor] = []
        """Keys per layer [key heads, tokens, width]."""
        self.values: list[Tensor] = []
        self.used = 0
        """Number of the last release that passed this node."""
        self.entry: Entry | None = None
        """The entry through which rows attend to this node."""

    def detach(self) -> None:
        """Copies the keys and values, so that they do not keep a larger tensor alive."""
        self.keys = [key.clone() for key in self.keys]
        self.values = [value.clone() for value in self.values]
        self.entry = None

    def path(self) -> list[TreeNode]:
        """The nodes from the root to this one."""
        above = self.parent.path() if self.parent else []
        return [*above, self] if self.tokens else above


class PrefixTree:
    """A tree in which each prompt is a path from the root to its own node."""

    def __init__(self, keep_tokens: int = 0) -> None:
        """Args: keep_tokens: maximum unused tokens that are kept for later prompts."""
        self._keep_tokens = keep_tokens
        self._releases = 0
        self.root = TreeNode((), 0, None)
        self.tokens = 0
        """Number of tokens in the tree."""
        self.idle_tokens = 0
        """Number of unused tokens."""

    def insert(self, tokens: Sequence[int], shareable: int) -> TreeNode:
        """Adds a prompt and returns its new node, below the prefix that it shares.

        Args:
            shareable: maximum tokens to share with other prompts; less than the prompt, since
                the logits of the last tokens are needed.
        """
        tokens = tuple(tokens)
        node, position = self.root, 0
        while True:
            child, common = _longest(node, tokens[position:shareable])
            if child is None or common < SHORTEST_SHARED:
                break
            node = child if common == len(child.tokens) else self._split(child, common)
            position += common
        leaf = TreeNode(tokens[position:], position, node)
        node.children.append(leaf)
        self.tokens += len(leaf.tokens)
        self.idle_tokens += len(leaf.tokens)
        for one in leaf.path():
            if one.users == 0:
                self.idle_tokens -= len(one.tokens)
            one.users += 1
        return leaf

    def shared(self, tokens: Sequence[int], shareable: int) -> int:
        """The number of tokens that a prompt would share with others."""
        tokens = tuple(tokens)
        node, position = self.root, 0
        while True:
            child, common = _longest(node, tokens[position:shareable])
            if child is None or common < SHORTEST_SHARED:
                return position
            position += common
            if common < len(child.tokens):
                return position
            node = child

    def release(self, leaf: TreeNode) -> None:
        """Releases a prompt and evicts unused nodes, the least recently used first."""
        self._releases += 1
        path = leaf.path()
        for node in path:
            node.users -= 1
            node.used = self._releases
            if node.users == 0:
                self.idle_tokens += len(node.tokens)
        for node in reversed(path):
            if node.users == 0 and node.done < len(node.tokens):
                self._drop(node)  # cancelled before it was fully read
        self._shrink(self._keep_tokens)
        for node in path:
            if node.users == 0 and node.parent is not None:
                node.detach()

    def clear(self) -> None:
        """Drops all unused nodes."""
        self._shrink(0)

    def _shrink(self, keep: int) -> None:
        while self.idle_tokens > keep:
            leaves = [node for node in self._all() if node.users == 0 and not node.children]
            self._drop(min(leaves, key=lambda node: node.used))

    def _drop(self, node: TreeNode) -> None:
        assert node.parent is not None
        for child in list(node.children):
            self._drop(child)
        node.parent.children.remove(node)
        node.parent = None
        self.tokens -= len(node.tokens)
        self.idle_tokens -= len(node.tokens)

    def _split(self, node: TreeNode, at: int) -> TreeNode:
        """Moves the first tokens to a new parent; prompts that end in the old node still do."""
        assert node.parent is not None
        upper = TreeNode(node.tokens[:at], node.start, node.parent)
        upper.users, upper.used, upper.children = node.users, node.used, [node]
        upper.done = min(node.done, at)
        upper.keys = [key[:, :at] for key in node.keys]
        upper.values = [value[:, :at] for value in node.values]
        node.parent.children[node.parent.children.index(node)] = upper
        node.tokens, node.start, node.parent = node.tokens[at:], node.start + at, upper
        node.done = max(node.done - at, 0)
        node.keys = [key[:, at:] for key in node.keys]
        node.values = [value[:, at:] for value in node.values]
        node.entry = None
        return upper

    def _all(self) -> Iterator[TreeNode]:
        waiting = list(self.root.children)
        while waiting:
            node = waiting.pop()
            waiting.extend(node.children)
            yield node


def _longest(node: TreeNode, tokens: tuple[int, ...]) -> tuple[TreeNode | None, int]:
    """The child with the longest common prefix, and its length."""
    found: tuple[TreeNode | None, int] = (None, 0)
    for child in node.children:
        common = _common(child.tokens, tokens)
        if common > found[1]:
            found = (child, common)
    return found


def _common(one: tuple[int, ...], other: tuple[int, ...]) -> int:
    shorter = min(len(one), len(other))
    if one[:shorter] == other[:shorter]:
        return shorter
    return next(index for index in range(shorter) if one[index] != other[index])
