"""Results of operations on fake tensors, made from what equal operations gave before.

A trace runs the same operations on tensors of the same form again and again: forward, again in the backward pass, in
each layer and chunk. torch's own cache for this is most of the time of a trace. Knows tensors; does not know models.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

CPU = torch.device("cpu")
# A FakeTensorMode gives these other strides for sides of length 1.
OF_THE_MODE = frozenset([torch.ops.aten.view.default])
MOST_ENTRIES = 10_000  # some 1,000 for each size of a model that is traced

Form = tuple[torch.dtype, tuple[int, ...], tuple[int, ...], int]  # and shape, strides, offset
# Of each result: the number of the input that it is (no form) or whose memory it has, -1 for none; its form.
Result = tuple[int, Form | None]

_entries: dict[Any, tuple[type | None, list[Result]] | None] = {}


def run(func: Any, args: Any, kwargs: Any, attributes: dict[str, Any]) -> Any:
    """What func(*args, **kwargs) gives; attributes: of the fake tensors of the mode at work, see `attributes_of`."""
    inputs: list[Tensor] = []
    try:
        key = _key((func, args, *kwargs.items()), inputs)
        entry = _entries.get(key)
    except TypeError:  # an argument of another kind
        return func(*args, **kwargs)
    if entry is None and key not in _entries:
        if len(_entries) >= MOST_ENTRIES:
            _entries.clear()
        entry = _entry_on_meta(func, args, kwargs)
        if entry is not None:
            _entries[key] = entry
    if entry is not None:
        return _again(*entry, inputs, attributes)
    out = func(*args, **kwargs)
    if key not in _entries:
        in_form = key == _key((func, args, *kwargs.items()), [])  # no resize_ or set_
        _entries[key] = _entry(out, inputs) if in_form else None
    return out


def attributes_of(mode: FakeTensorMode) -> dict[str, Any]:
    """What a new fake tensor of `mode` on the CPU has as its attributes."""
    return dict(vars(FakeTensor(mode, torch.empty(0, device="meta"), CPU)))


def _key(value: Any, inputs: list[Tensor]) -> Any:
    """What tells arguments apart; appends their tensors to `inputs`. Raises TypeError for real tensors."""
    kind = type(value)
    if isinstance(value, FakeTensor):
        inputs.append(value)
        return _form(value)
    if kind is tuple or kind is list or kind is torch.Size:
        return kind, tuple([_key(each, inputs) for each in value])
    if isinstance(value, Tensor):
        raise TypeError
    return kind, value


def _form(tensor: Tensor) -> Form:
    return tensor.dtype, tensor.shape, tensor.stride(), int(tensor.storage_offset())


def _entry_on_meta(func: Any, args: Any, kwargs: Any) -> tuple[type | None, list[Result]] | None:
    """The entry by torch's own function for shapes, without what a FakeTensorMode does around it, which takes most.

    None for operations that such a mode treats in its own way.
    """
    if getattr(func, "namespace", "") != "aten" or "device" in kwargs or func in OF_THE_MODE:
        return None
    inputs: list[Tensor] = []
    with torch._C._DisableTorchDispatch():
        args, kwargs = _plain(args, inputs), {name: _plain(value, inputs) for name, value in kwargs.items()}
        if not inputs:
            return None
        forms = [_form(each) for each in inputs]
        try:
            out = func(*args, **kwargs)
        except (RuntimeError, TypeError, NotImplementedError):  # the mode knows another way, or says what is wrong
            return None
        return _entry(out, inputs) if forms == [_form(each) for each in inputs] else None


def _plain(value: Any, inputs: list[Tensor]) -> Any:
    """The same arguments with tensors on the meta device in the place of fake ones, which are appended to `inputs`."""
    if isinstance(value, FakeTensor):
        plain = torch.empty(0, dtype=value.dtype, device="meta")
        plain.set_(value.untyped_storage(), value.storage_offset(), value.shape, value.stride())
        inputs.append(plain)
        return plain
    return type(value)([_plain(each, inputs) for each in value]) if type(value) in (tuple, list) else value


def _entry(out: Any, inputs: list[Tensor]) -> tuple[type | None, list[Result]] | None:
    """How to make `out` from inputs of the same form; None where that is not known."""
    several = type(out) in (tuple, list)
    results = [_result(each, inputs) for each in (out if several else (out,))]
    own = [each.untyped_storage()._cdata for each, found in zip(out if several else (out,), results, strict=True)
           if found is not None and found[0] < 0]  # fmt: skip
    if len(own) != len(set(own)):
        return None
    known = [found for found in results if found is not None]
    return (type(out) if several else None, known) if len(known) == len(results) else None


def _result(out: Any, inputs: list[Tensor]) -> Result | None:
    for number, each in enumerate(inputs):
        if each is out:
            return number, None
    if type(out) not in (FakeTensor, Tensor) or out.dtype.is_complex or getattr(out, "constant", None) is not None:
        return None
    form, storage = _form(out), out.untyped_storage()
    owners = [number for number, each in enumerate(inputs) if each.untyped_storage()._cdata == storage._cdata]
    if owners:
        return (owners[0], form) if len(owners) == 1 else None
    dtype, shape, strides, offset = form
    extent = 1 + sum((n - 1) * step for n, step in zip(shape, strides, strict=True)) if out.numel() else 0
    return (-1, form) if offset == 0 and storage.nbytes() == extent * dtype.itemsize else None


def _again(several: type | None, results: list[Result], inputs: list[Tensor], attributes: dict[str, Any]) -> Any:
    made: list[Tensor] = []
    with torch._C._DisableTorchDispatch():
        for number, form in results:
            if form is None:
                made.append(inputs[number])
                continue
            dtype, shape, strides, offset = form
            if number < 0:
                plain = torch.empty_strided(shape, strides, dtype=dtype, device="meta")
            else:
                plain = torch.empty(0, dtype=dtype, device="meta")
                plain.set_(inputs[number].untyped_storage(), offset, shape, strides)
            fake = Tensor._make_subclass(FakeTensor, plain, False, dispatch_device=True, device_for_backend_keys=CPU)
            vars(fake).update(attributes)
            made.append(fake)
    return several(made) if several else made[0]
