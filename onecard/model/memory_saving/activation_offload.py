"""What can wait in RAM while the card works: the inputs of checkpointed layers.

Knows tensors, streams and modules. It does not know what a loss is, how a step is cut, or whether offloading is worth
it: the plan (`model/memory/estimate.py`) decides that. Nothing here changes a value: losses and gradients are bitwise
the same.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake
from torch.autograd.graph import saved_tensors_hooks

from onecard.console import warn
from onecard.model.hardware import current_stream, new_stream, on_stream

MIN_BYTES = 1 << 20
CHUNK_BYTES = 8 << 20


class ActivationOffload:
    """Tensors that autograd saves wait in RAM between the forward and the backward pass of one micro-batch.

        offload = ActivationOffload(model, device)
        with offload:                                   # once per micro-batch; the buffers are used again
            loss = ...
            loss.backward()

    With non-reentrant checkpointing of the layers (`load.py`) autograd saves one tensor per layer, its input
    (batch, seq, hidden), and a few outside the layers. Each floating-point one of at least `min_bytes` that is no
    weight is copied to RAM by a side stream; it leaves the card when the next one is saved. In the backward pass the
    tensor of layer n - 1 is on its way back while layer n computes (`ahead`; without it the card holds one input less
    and waits for each copy). https://docs.pytorch.org/docs/stable/autograd.html#hooks-for-saved-tensors

    On the card at once, in layer inputs, beyond what the running layer itself uses: forward 0, backward 1 with
    `ahead`, else 0; between the two, the one that was saved last, until `settle`. Where things leave the card depends
    on the order of the calls alone, not on how fast a copy is, so a rehearsal measures what every step will need.

    Saved tensors with gaps or overlaps (slices, expanded masks) and tensor subclasses stay on the card.
    `kinds`: the types of tensors that may go. `host_bytes`: RAM held now; `peak_host_bytes`: the most so far;
    `n_packed`: tensors sent in the last block.
    """

    kinds: tuple[type, ...] = (Tensor,)

    def __init__(
        self,
        model: nn.Module,
        device: torch.device | str,
        min_bytes: int = MIN_BYTES,
        *,
        ahead: bool = True,
        chunk_bytes: int = CHUNK_BYTES,
    ) -> None:
        self.model, self.min_bytes, self.ahead = model, min_bytes, ahead
        # "cuda" alone means the current card; tensors always name theirs with its number.
        self.device = torch.empty(0, device=device).device
        self.n_packed, self._outbound = 0, True
        self._pool = Pool(chunk_bytes, pinned=self.device.type == "cuda")
        self._side = SideStream(self.device)
        self._hooks: saved_tensors_hooks | None = None
        self._weights: set[int] = set()
        self._alive: weakref.WeakValueDictionary[int, _Packed] = weakref.WeakValueDictionary()
        self._newest: _Packed | None = None
        self._coming: _Packed | None = None

    @property
    def host_bytes(self) -> int:
        """Bytes of RAM that the buffers hold now, in use or not."""
        return self._pool.n_bytes

    @property
    def peak_host_bytes(self) -> int:
        """The most bytes of RAM that the buffers ever held."""
        return self._pool.peak_bytes

    def __enter__(self) -> ActivationOffload:
        if self._hooks is not None:
            raise RuntimeError("this ActivationOffload is in use: one block per micro-batch, not one inside another")
        # Anew in each block: whoever moved or quantised a weight in between gave it another storage.
        weights = [*self.model.parameters(), *self.model.buffers()]
        self._weights = {_memory(weight) for weight in weights} - {0}
        self.n_packed, self._outbound = 0, True
        self._hooks = saved_tensors_hooks(self._pack, self._unpack)
        self._hooks.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        hooks, self._hooks = self._hooks, None
        if hooks is not None:
            hooks.__exit__()
        for packed in list(self._alive.values()):
            self._withdraw(packed)
        self._alive.clear()
        self._newest = self._coming = None
        self._pool.take_all_back()

    def turn_back(self) -> None:
        """The forward pass is over: nothing more goes to RAM in this block.

        Call it before `backward` where checkpoints are reentrant: those compute a layer again with these hooks in
        force, and what that saves is needed at once.
        """
        self.settle()
        self._outbound = False

    def settle(self) -> None:
        """Let the card's copy of the tensor that was saved last go, once it is in RAM.

        The next saved tensor does this by itself; call it before a long stretch that saves none, such as the loss.
        """
        newest, self._newest = self._newest, None
        if newest is not None and newest.card is not None:
            newest.intact = newest.unchanged()
            self._side.let_compute_wait(newest.copied)
            newest.card = None

    def release(self) -> None:
        """Give the RAM back; the next block takes new buffers. Pinned ones go back to torch, which keeps them."""
        if self._hooks is None:
            self._pool.clear()

    def _pack(self, tensor: Tensor) -> Tensor | _Packed:
        if not self._belongs_in_ram(tensor):
            # An output may not be held by its own graph node: that would be a cycle which is never freed.
            return tensor if tensor.grad_fn is None else tensor.detach()
        if self._newest is not None and self._newest.is_of(tensor):
            return self._newest
        # One copy at a time. The stream that computes waits for the one before, which has had a whole layer's time;
        # from there on its memory may be used again. `Tensor.record_stream` would do without that wait, but memory
        # would then come back at a moment that depends on how fast the copies are: peaks would differ from step to
        # step, and no rehearsal could promise anything.
        self.settle()
        packed = _Packed(self, self.n_packed, tensor.detach())
        self._alive[packed.index] = packed  # before it owns buffers, so that an interrupt loses none
        packed.chunks = self._pool.take(tensor.nbytes)
        with self._side.after_compute():
            for chunk, piece in zip(packed.chunks, _pieces(tensor, self._pool.chunk_bytes), strict=True):
                chunk[: len(piece)].copy_(piece, non_blocking=True)
        packed.copied = self._side.mark()
        self.n_packed += 1
        self._newest = packed
        return packed

    def _unpack(self, saved: Tensor | _Packed) -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        if saved.card is None:
            self._bring_back(saved)
        elif saved is self._newest:
            saved.intact = saved.unchanged()
        if not saved.intact:
            raise RuntimeError(
                f"a saved tensor {tuple(saved.shape)} was changed in place after it was saved, on its way to RAM; "
                "this model cannot use activation offload"
            )
        self._side.let_compute_wait(saved.copied)
        card, saved.card, saved.used = saved.card, None, True
        if saved is self._newest:
            self._newest = None
        if saved is self._coming:
            self._coming = None
        if self.ahead and self._coming is None:
            self._send_for_next(saved.index)
        assert card is not None
        return card

    def _send_for_next(self, index: int) -> None:
        """Start the copy back of the tensor that was saved before `index` and has not been needed yet."""
        for earlier in range(index - 1, -1, -1):
            packed = self._alive.get(earlier)
            if packed is not None and not packed.used and packed.card is None:
                self._bring_back(packed)
                self._coming = packed
                return

    def _bring_back(self, packed: _Packed) -> None:
        if not packed.chunks:
            raise RuntimeError("this graph's tensors were in RAM and are gone: call backward inside the offload block")
        # Allocated by the stream that computes, so that it may free the memory like any other tensor's. The side
        # stream starts behind it: the memory may still be read by work that was queued earlier.
        card = torch.empty_strided(packed.shape, packed.stride, dtype=packed.dtype, device=self.device)
        packed.card, packed.copied = card, None
        with self._side.after_compute():
            for piece, chunk in zip(_pieces(card, self._pool.chunk_bytes), packed.chunks, strict=True):
                piece.copy_(chunk[: len(piece)], non_blocking=True)
        packed.copied = self._side.mark()

    def _belongs_in_ram(self, tensor: Tensor) -> bool:
        return (
            self._outbound
            and type(tensor) in self.kinds
            and tensor.device == self.device
            and tensor.is_floating_point()
            and tensor.layout is torch.strided
            and tensor.nbytes >= max(self.min_bytes, 1)
            and _memory(tensor) not in self._weights
            and is_dense(tensor)
        )

    def _withdraw(self, packed: _Packed) -> None:
        """Take buffers and card memory from a tensor that nobody will ask for again."""
        card, packed.card = packed.card, None
        if card is not None:
            self._side.let_compute_wait(packed.copied)
        chunks, packed.chunks = packed.chunks, []
        self._pool.give(chunks)


class _Packed:
    """One saved tensor: its bytes in RAM, its form, and its copy on the card while there is one."""

    def __init__(self, offload: ActivationOffload, index: int, card: Tensor) -> None:
        self.offload, self.index = offload, index
        self.card: Tensor | None = card
        self.shape, self.stride, self.dtype, self.version = card.shape, card.stride(), card.dtype, card._version
        self.chunks: list[Tensor] = []
        self.copied: Any = None
        self.used, self.intact = False, True

    def is_of(self, tensor: Tensor) -> bool:
        """Whether `tensor` is the one on the card: the same memory, form and version."""
        card = self.card
        if card is None or _memory(card) != _memory(tensor) or self.version != tensor._version:
            return False
        here = (self.shape, self.stride, self.dtype, card.storage_offset())
        return here == (tensor.shape, tensor.stride(), tensor.dtype, tensor.storage_offset())

    def unchanged(self) -> bool:
        """Whether nobody wrote into the original while it was copied."""
        return self.card is None or self.card._version == self.version

    def __del__(self) -> None:
        if self.chunks:  # the graph let go of it: after its backward pass, or dropped without one
            self.offload._withdraw(self)


class Pool:
    """RAM in chunks of one size, handed out and taken back; it grows to the largest need and stays there.

    Equal chunks fit tensors of every length, so nothing is pinned anew when lengths change, and a tensor wastes less
    than one chunk; torch's own pinned cache rounds each tensor up to a power of two, up to twice the RAM.
    """

    def __init__(self, chunk_bytes: int, *, pinned: bool, what: str = "offloaded activations") -> None:
        self.chunk_bytes, self.pinned, self.what = chunk_bytes, pinned, what
        self.all: list[Tensor] = []
        self.free: list[Tensor] = []
        self.peak_bytes = 0

    @property
    def n_bytes(self) -> int:
        return len(self.all) * self.chunk_bytes

    def take(self, n_bytes: int) -> list[Tensor]:
        n_chunks = -(-n_bytes // self.chunk_bytes)
        while len(self.free) < n_chunks:
            chunk = self._new()
            self.all.append(chunk)
            self.free.append(chunk)
        self.peak_bytes = max(self.peak_bytes, self.n_bytes)
        return [self.free.pop() for _ in range(n_chunks)]

    def give(self, chunks: list[Tensor]) -> None:
        self.free.extend(chunks)

    def take_all_back(self) -> None:
        self.free = list(self.all)

    def clear(self) -> None:
        self.all, self.free = [], []

    def _new(self) -> Tensor:
        if self.pinned:
            try:
                return torch.empty(self.chunk_bytes, dtype=torch.uint8, pin_memory=True)
            except RuntimeError as reason:
                self.pinned = False
                held = f"{self.n_bytes / 2**30:.1f} GiB"
                words = str(reason).strip().splitlines()[:1]
                warn(
                    f"no more RAM could be pinned for {self.what} (after {held}: {''.join(words)}); ordinary "
                    "RAM is used for the rest, which is slower. Free RAM or raise `ulimit -l` to mend it"
                )
        return torch.empty(self.chunk_bytes, dtype=torch.uint8)


class SideStream:
    """The stream that copies, beside the one that computes; on a CPU there is neither, and everything is in order."""

    def __init__(self, device: torch.device) -> None:
        self.stream = new_stream(device) if device.type == "cuda" else None

    @contextmanager
    def after_compute(self) -> Iterator[None]:
        """Queue copies here, behind everything that the computing stream has been given so far."""
        if self.stream is None:
            yield
            return
        self.stream.wait_stream(current_stream(self.stream.device))
        with on_stream(self.stream):
            yield

    def mark(self) -> Any:
        return self.stream.record_event() if self.stream is not None else None

    def may_write(self, tensor: Tensor) -> None:
        """Let its memory be used again only after the copies that this stream was given before it was freed."""
        if self.stream is not None:
            tensor.record_stream(self.stream)

    def let_compute_wait(self, event: Any) -> None:
        if self.stream is None:
            return
        compute = current_stream(self.stream.device)
        if event is None:  # interrupted between a copy and its mark
            compute.wait_stream(self.stream)
        else:
            compute.wait_event(event)


def _memory(tensor: Tensor) -> int:
    """A number that tensors over the same memory have in common, in the plan's model without bytes, too."""
    return tensor.untyped_storage()._cdata if is_fake(tensor) else tensor.untyped_storage().data_ptr()


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill one stretch of memory, in whatever order: no gaps, no overlaps."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride != expected:
                return False
            expected *= size
    return True


def _pieces(tensor: Tensor, piece_bytes: int) -> tuple[Tensor, ...]:
    """The memory of a dense tensor as bytes, in pieces of at most `piece_bytes`; copies of these need no scratch."""
    flat = tensor.detach().as_strided((tensor.numel(),), (1,))
    return flat.view(torch.uint8).split(piece_bytes)
