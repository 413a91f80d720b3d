"""What autograd recorded: the kinds of nodes behind a tensor."""

from torch import Tensor


def recorded(*outputs: Tensor) -> set[str]:
    """Names of all nodes that the gradient of `outputs` passes through, such as ``MulBackward0``."""
    seen, todo = set(), [output.grad_fn for output in outputs]
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo += [parent for parent, _ in node.next_functions]
    return {node.name() for node in seen}
