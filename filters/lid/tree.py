"""fastText's hierarchical softmax: the likeliest label of each hidden vector, over a Huffman tree of labels.

Rules: fastText 0.9.2, src/loss.cc HierarchicalSoftmaxLoss buildTree and dfs.  A caption is first led down the likelier
branch; where that ends above 1/2 no other label can win.  Other captions are scored against all labels, and those whose
two best labels are nearly equal are left to fastText itself, since float32 sums in another order may swap them.
Shapes: R captions, D dimensions, L labels, N = L - 1 inner nodes; node L + i of the tree is row i of nodes_ND.
"""

from typing import NamedTuple

import numpy as np

from filters.lid.model import FastTextModel

FLOOR = np.float32(1e-5)
"""fastText adds it to a probability before the logarithm (src/loss.cc std_log)."""
SURE = np.log(np.float32(0.52))
BLOCK_ROWS = 1024
"""Rows compared with all labels at once; filled up with zeros, for BLAS adds up a smaller matrix in another order."""
NEAR = 1e-3
"""Log probabilities closer than this are for fastText to tell apart.  Sums in another order moved them by less than
1e-6 on 511,279 real captions, and by less than 1e-4 on long ones."""


class LabelTree(NamedTuple):
    """The tree."""

    children: np.ndarray
    """int64 (L + N, 2): left and right node; -1 at labels.  The last node is the root."""
    levels: list[tuple[np.ndarray, np.ndarray, np.ndarray]]
    """From the root down: nodes of one depth, their parents, and 0 (left) or 1 (right)."""
    nodes_ND: np.ndarray


class Likeliest(NamedTuple):
    """Answers, each (R,)."""

    labels: np.ndarray
    log_probabilities: np.ndarray
    near: np.ndarray
    """bool: another label is as likely, about."""


def build_tree(model: FastTextModel) -> LabelTree:
    """Return the Huffman tree of the labels' counts, built as fastText builds it."""
    num_labels = len(model.labels)
    counts = model.label_counts + [int(1e15)] * (num_labels - 1)
    children = np.full((2 * num_labels - 1, 2), -1)
    leaf, inner = num_labels - 1, num_labels
    for parent in range(num_labels, len(counts)):
        for side in (0, 1):
            if leaf >= 0 and counts[leaf] < counts[inner]:
                children[parent, side], leaf = leaf, leaf - 1
            else:
                children[parent, side], inner = inner, inner + 1
        counts[parent] = counts[children[parent, 0]] + counts[children[parent, 1]]
    levels = []
    parents = np.array([len(counts) - 1])
    while len(parents := parents[parents >= num_labels]):
        sides = np.tile([0, 1], len(parents))
        above, parents = parents.repeat(2), children[parents].ravel()
        levels.append((parents, above, sides))
    return LabelTree(children, levels, model.nodes_ND)


def find_likeliest(tree: LabelTree, hidden_RD: np.ndarray) -> Likeliest:
    """Return the likeliest label of each row, its log probability, and whether another comes close."""
    labels, log_probabilities = _descend(tree, hidden_RD)
    near = np.zeros(len(labels), np.bool_)
    unsure = np.flatnonzero(log_probabilities <= SURE)
    for start in range(0, len(unsure), BLOCK_ROWS):
        some = unsure[start : start + BLOCK_ROWS]
        block_BD = np.zeros((BLOCK_ROWS, hidden_RD.shape[1]), np.float32)
        block_BD[: len(some)] = hidden_RD[some]
        found = _compare_all(tree, block_BD)
        labels[some], log_probabilities[some], near[some] = (values[: len(some)] for values in found)
    return Likeliest(labels, log_probabilities, near)


def _descend(tree: LabelTree, hidden_RD: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the node that following the likelier branch leads to, and its log probability; stops once it is small."""
    num_labels = len(tree.nodes_ND) + 1
    nodes = np.full(len(hidden_RD), len(tree.children) - 1)
    scores = np.zeros(len(hidden_RD), np.float32)
    rows = np.arange(len(hidden_RD)) if num_labels > 1 else np.zeros(0, np.int64)
    while len(rows):
        right = _sigmoid(np.einsum("rd,rd->r", tree.nodes_ND[nodes[rows] - num_labels], hidden_RD[rows]))
        scores[rows] += np.log(np.maximum(right, 1 - right) + FLOOR)
        nodes[rows] = tree.children[nodes[rows], (right > 0.5).astype(np.int64)]
        rows = rows[(nodes[rows] >= num_labels) & (scores[rows] > SURE)]
    return nodes, scores


def _compare_all(tree: LabelTree, hidden_RD: np.ndarray) -> Likeliest:
    """Return the likeliest of all labels of each row."""
    num_labels = len(tree.nodes_ND) + 1
    right_NR = _sigmoid(tree.nodes_ND @ hidden_RD.T)
    steps = np.stack([np.log(1 - right_NR + FLOOR), np.log(right_NR + FLOOR)])
    scores = np.zeros((len(tree.children), len(hidden_RD)), np.float32)
    for nodes, parents, sides in tree.levels:
        scores[nodes] = scores[parents] + steps[sides, parents - num_labels]
    scores_LR = scores[:num_labels]
    best = scores_LR.max(0)
    return Likeliest(scores_LR.argmax(0), best, (scores_LR > best - NEAR).sum(0) > 1)


def _sigmoid(x: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        return np.asarray(1 / (1 + np.exp(-x)), np.float32)
