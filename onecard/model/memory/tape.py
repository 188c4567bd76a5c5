"""A rehearsal on paper: tensors that have a size and nothing else, and the backward pass over them.

The memory plan (`estimate.py`) writes a decoder layer down once, in the words of its forward pass; this module plays it
forward and backward as PyTorch's autograd would and remembers the most bytes that were alive at once. A `Sized` is
alive as long as Python holds it, as a tensor is, so what a variable keeps alive in the real code it keeps alive here.

It knows lifetimes: what an operation saves for its backward, in which order nodes run, where a gradient is passed on,
added in place, or copied. It does not know shapes, values, devices or allocators.
https://docs.pytorch.org/docs/stable/notes/autograd.html
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


class Storage:
    """Bytes that are alive as long as somebody holds this object."""

    __slots__ = ("n_bytes", "tape")

    def __init__(self, tape: Tape, n_bytes: int) -> None:
        self.tape, self.n_bytes = tape, n_bytes
        tape.count(n_bytes)

    def __del__(self) -> None:
        self.tape.count(-self.n_bytes)


class Sized:
    """A tensor of which only the number of bytes is known.

    node: what its backward pass starts with; a leaf has none. is_shared: somebody else may hold it, or it is a view;
    autograd then adds nothing to it in place.
    """

    __slots__ = ("is_shared", "n_bytes", "needs_grad", "node", "storage")

    def __init__(
        self, storage: Storage, n_bytes: int, *, needs_grad: bool = False, node: Node | None = None,
        is_shared: bool = False,
    ) -> None:  # fmt: skip
        self.storage, self.n_bytes, self.node, self.is_shared = storage, n_bytes, node, is_shared
        self.needs_grad = needs_grad or node is not None

    def share(self) -> Sized:
        """The same memory, held by more than one."""
        return Sized(self.storage, self.n_bytes, is_shared=True)


@dataclass(frozen=True)
class Back:
    """The backward side of one operation. Unless said otherwise it makes a new gradient for each of its inputs.

    saves, saves_output: what it needs, kept alive until then. trained: bytes of each transient gradient of a trained
    weight, which ends in a `.grad` that is there already. temporary: bytes that live only inside it.
    passes_on: the gradient of each input *is* the output's (addition, views).
    gives_views: its gradients are views (of a matrix product's), into which autograd does not add in place.
    """

    saves: Sequence[Sized] = ()
    saves_output: bool = False
    trained: Sequence[int] = ()
    temporary: int = 0
    passes_on: bool = False
    gives_views: bool = False


PLAIN = Back()
PASSES_ON = Back(passes_on=True)


@dataclass
class Node:
    """What one operation left behind for the backward pass: its number, whom it gives gradients, what it keeps."""

    number: int
    parents: list[tuple[Node | None, int]]
    saved: list[Storage]
    back: Back


class Tape:
    """Counts the bytes alive on one device, and the most there ever were.

    keeps_saved: False under a checkpoint, where nothing is kept for the backward pass but the inputs.
    """

    def __init__(self, *, keeps_saved: bool = True) -> None:
        self.keeps_saved = keeps_saved
        self.live_bytes = 0
        self.peak_bytes = 0
        self._n_nodes = 0
        self._stopped = False
        self._held: list[Storage] = []

    def count(self, n_bytes: int) -> None:
        """So many bytes more are alive; below 0: fewer."""
        self.live_bytes += n_bytes
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)

    def new(self, n_bytes: int, *, needs_grad: bool = False) -> Sized:
        """A tensor out of nothing: an input, a leaf."""
        return Sized(Storage(self, n_bytes), n_bytes, needs_grad=needs_grad)

    def elsewhere(self, n_bytes: int, *, needs_grad: bool = False) -> Sized:
        """A tensor of this size whose memory somebody else counts."""
        return Sized(Storage(self, 0), n_bytes, needs_grad=needs_grad)

    def hold(self, tensor: Sized) -> None:
        """Keep a tensor for as long as the tape: an operation's own attribute does, where autograd lets go."""
        if self.keeps_saved:
            self._held.append(tensor.storage)

    def stop(self) -> None:
        """What follows is not computed: a checkpoint computes a layer again only up to the last tensor that it saves.

        The graph goes on all the same, because the first pass has built it.
        https://docs.pytorch.org/docs/stable/checkpoint.html (early stop)
        """
        self._stopped = self.keeps_saved

    def use(self, n_bytes: int) -> None:
        """Memory that is taken and given back inside one operation."""
        self.peak_bytes = max(self.peak_bytes, self.live_bytes + n_bytes)

    def op(
        self, inputs: Sequence[Sized], n_bytes: int, back: Back = PLAIN, *, temporary: int = 0, is_view: bool = False
    ) -> Sized:
        """One operation; returns its output of `n_bytes`.

        temporary: bytes that live only inside it, beside the output. is_view: the output is a view of the first input
        and takes no memory; its gradient does, and has the size of that input.
        """
        storage = inputs[0].storage if is_view else Storage(self, 0 if self._stopped else n_bytes)
        self.use(0 if self._stopped else temporary)
        if not back.trained and not any(tensor.needs_grad for tensor in inputs):
            return Sized(storage, n_bytes)
        self._n_nodes += 1
        parents = [(tensor.node, tensor.n_bytes) for tensor in inputs if tensor.needs_grad]
        saved = [tensor.storage for tensor in back.saves] + ([storage] if back.saves_output else [])
        rules = Back((), False, back.trained, back.temporary, back.passes_on, back.gives_views)  # holds no tensor
        return Sized(storage, n_bytes, node=Node(self._n_nodes, parents, saved if self.keeps_saved else [], rules))

    def backward(self, end: Node | None, gradient: Sized) -> None:
        """Run all nodes below `end`, latest first, as autograd does; each frees what it saved when it is done."""
        self._stopped = False
        waiting: dict[int, tuple[Node, Sized]] = {}
        if end is not None:
            waiting[end.number] = (end, gradient)
        del end, gradient
        while waiting:
            node, received = waiting.pop(max(waiting))
            given = self._backward_of(node, received)
            del received
            while given:
                parent, grad = given.pop(0)
                if parent is not None:
                    there = waiting.pop(parent.number, None)
                    waiting[parent.number] = (parent, grad if there is None else _sum(there[1], grad))
                    del there
                del grad

    def _backward_of(self, node: Node, received: Sized) -> list[tuple[Node | None, Sized]]:
        if node.back.passes_on:
            one = received if len(node.parents) == 1 else received.share()
            given = [(parent, one) for parent, _ in node.parents]
        else:
            given = [
                (parent, Sized(Storage(self, n_bytes), n_bytes, is_shared=node.back.gives_views))
                for parent, n_bytes in node.parents
            ]
        self.use(node.back.temporary)
        for n_bytes in node.back.trained:
            self.use(n_bytes)
        node.saved.clear()
        return given


def _sum(one: Sized, other: Sized) -> Sized:
    """Autograd adds in place into a gradient that nobody else holds and that is no view; else the sum is a third."""
    if not one.is_shared:
        return one
    if not other.is_shared:
        return other
    return Sized(Storage(one.storage.tape, one.n_bytes), one.n_bytes)
