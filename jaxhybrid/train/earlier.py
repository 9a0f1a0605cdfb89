"""Trees as they were before modules owned their parameters: `q_proj` for q_proj/kernel, `q_bias` for q_proj/bias.

What was written then has no `LAYOUT` beside its arrays. It is read under its old names and given its new ones.
"""

from typing import Any

import jax

LAYOUT = 2  # of the trees that are written now


def in_earlier_layout(tree: Any) -> Any:
    """A tree of parameters, or a state that holds some, under the earlier names."""
    if not isinstance(tree, dict):
        return jax.tree.map(in_earlier_layout, tree, is_leaf=_is_dict) if _holds_dicts(tree) else tree
    earlier: dict[str, Any] = {}
    for name, child in tree.items():
        if _is_module(child):
            earlier |= {_earlier_name(name, leaf): value for leaf, value in child.items()}
        elif name == "mlp":
            earlier |= in_earlier_layout(child)
        else:
            earlier[name] = in_earlier_layout(child)
    return earlier


def from_earlier_layout(earlier: Any, like: Any) -> Any:
    """The reverse; `like` has the structure of the result."""
    if not isinstance(like, dict):
        if not _holds_dicts(like):
            return earlier
        return jax.tree.map(lambda inner, old: from_earlier_layout(old, inner), like, earlier, is_leaf=_is_dict)
    tree = {}
    for name, child in like.items():
        if _is_module(child):
            tree[name] = {leaf: earlier[_earlier_name(name, leaf)] for leaf in child}
        else:
            tree[name] = from_earlier_layout(earlier if name == "mlp" else earlier[name], child)
    return tree


def _is_dict(node: Any) -> bool:
    return isinstance(node, dict)


def _holds_dicts(node: Any) -> bool:
    return any(map(_is_dict, jax.tree.leaves(node, is_leaf=_is_dict)))


def _is_module(node: Any) -> bool:
    return isinstance(node, dict) and node.keys() <= {"kernel", "bias", "scale", "embedding", "taps"} and bool(node)


def _earlier_name(module: str, leaf: str) -> str:
    return module.replace("_proj", "_bias") if leaf == "bias" else module
