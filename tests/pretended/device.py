"""A pretended CUDA device: tensors that say `cuda:0` and hold their data on the host, and a count of what is launched there.

Counted are operations that start a kernel, copies between host and device for which the host waits, those for which it does
not, reads of the device (`item`, `nonzero`, boolean indices), and operations on tensors of both. `device.cpp` makes torch believe
in the device. To be used in a process of its own.
"""

import collections
import traceback

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_map

CUDA = torch.device("cuda:0")
ATEN = torch.ops.aten

# Only the description of a tensor changes, or memory is asked for.
NO_KERNEL = {
    "view", "_unsafe_view", "transpose", "t", "permute", "expand", "slice", "select", "unbind", "unsqueeze", "squeeze", "alias",
    "detach", "as_strided", "split", "split_with_sizes", "reshape", "_reshape_alias", "lift_fresh", "empty", "empty_like",
    "new_empty", "new_empty_strided", "empty_strided", "diagonal", "unfold", "is_pinned", "size", "stride", "sym_size", "_version",
}  # fmt: skip
READS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "unique_consecutive", "is_nonzero"}


def believe():
    """Let Python's side of torch believe in the device that the compiled `device.cpp` registers."""
    torch.cuda._lazy_init = lambda: None
    torch._C._ensureCUDADeviceGuardSet()
    torch.cuda.current_device = lambda: 0
    torch.cuda.is_available = lambda: True
    torch.cuda.amp.common.amp_definitely_not_available = lambda: False
    torch.cuda.is_bf16_supported = lambda *_, **__: True
    torch.cuda.get_device_capability = lambda *_: (9, 0)
    torch.Tensor.pin_memory = _pin


def _pin(tensor):
    pinned = tensor.clone()
    pinned.is_pinned_here = True
    return pinned


class Cuda(torch.Tensor):
    """A tensor on the device; `elem` holds its data."""

    @staticmethod
    def __new__(cls, elem, requires_grad=False):
        tensor = torch.Tensor._make_wrapper_subclass(
            cls, elem.size(), strides=elem.stride(), storage_offset=elem.storage_offset(), dtype=elem.dtype,
            layout=elem.layout, device=CUDA, requires_grad=requires_grad,
        )  # fmt: skip
        tensor.elem = elem
        return tensor

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise RuntimeError(f"{function} outside of a count")

    def __getitem__(self, index):
        # As torch's own, which asks for the real device.
        index = index if isinstance(index, tuple) else (index,)
        if any(isinstance(part, torch.Tensor) and part.dim() for part in index):
            return ATEN.index.Tensor(self, [part if isinstance(part, torch.Tensor) else None for part in index])
        n_real = sum(part is not None and part is not Ellipsis for part in index)
        out, axis = self, 0
        for part in index:
            if part is Ellipsis:
                axis += self.dim() - n_real
            elif part is None:
                out, axis = ATEN.unsqueeze(out, axis), axis + 1
            elif isinstance(part, slice):
                if part != slice(None):
                    out = ATEN.slice.Tensor(out, axis, part.start, part.stop, part.step or 1)
                axis += 1
            else:
                out = ATEN.select.int(out, axis, int(part))
        return out

    def __setitem__(self, index, value):
        if isinstance(index, tuple) and any(isinstance(part, torch.Tensor) for part in index):
            parts = [part if isinstance(part, torch.Tensor) else None for part in index]
            ATEN.index_put_(self, parts, value)
        else:
            ATEN.copy_(self[index], value if isinstance(value, torch.Tensor) else torch.tensor(value))

    def __repr__(self):
        return f"Cuda({tuple(self.shape)}, {self.dtype})"


def moved(module):
    """A module with its parameters and buffers on the device, in place."""
    for each in module.modules():
        for name, parameter in list(each._parameters.items()):
            if parameter is not None:
                each._parameters[name] = Cuda(parameter.detach(), parameter.requires_grad)
        for name, buffer in list(each._buffers.items()):
            if buffer is not None:
                each._buffers[name] = Cuda(buffer)
    return module


class Count(TorchDispatchMode):
    """Counts what is done on the device inside a `with` statement.

    Attributes
    ----------
    kernels, blocking, sent, mixes
        Kernels by operation; copies and reads that the host waits for, copies that it does not wait for, and operations on
        tensors of host and device, each by kind and line of scfm.
    composed
        Operators to run as the functions they are made of, by name.
    """

    def __init__(self, composed):
        super().__init__()
        self.composed = composed
        self.clear()

    def clear(self):
        self.kernels, self.blocking, self.sent, self.mixes = (collections.Counter() for _ in range(4))

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        namespace, name = function._schema.name.split("::")
        if namespace == "scfm" and name in self.composed:
            with self:
                return self.composed[name](*args, **kwargs)
        if function._can_decompose():
            with self:
                result = function.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        return self._run(function, name, args, kwargs)

    def _run(self, function, name, args, kwargs):
        tensors = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, torch.Tensor)]
        here, on_host = [t for t in tensors if isinstance(t, Cuda)], [t for t in tensors if not isinstance(t, Cuda)]
        target = None if kwargs.get("device") is None else torch.device(kwargs["device"]).type
        if target is not None:
            kwargs["device"] = torch.device("cpu")
        if name == "record_stream":
            return None
        bare_args, bare_kwargs = tree_map(_bare, args), tree_map(_bare, kwargs)
        result = function(*bare_args, **bare_kwargs)
        if name == "_to_copy" and here and target == "cpu":
            self._note(self.blocking, "to the host")
            return result
        if name == "_to_copy" and on_host and target == "cuda":
            waits = not (kwargs.get("non_blocking") and getattr(on_host[0], "is_pinned_here", False))
            self._note(self.blocking if waits else self.sent, "to the device")
            return Cuda(result)
        if name == "copy_" and here and on_host:
            self._note(self.blocking, "copy_")
            return args[0]
        if not here and target != "cuda":
            return result
        self._count(name, bare_args, bare_kwargs, args, on_host if here else [])
        known = {id(tensor.elem): tensor for tensor in here}
        return tree_map(lambda value: _wrapped(value, name, known), result)

    def _count(self, name, bare_args, bare_kwargs, args, on_host):
        if name in READS or (name == "repeat_interleave" and bare_kwargs.get("output_size") is None):
            self._note(self.blocking, name)
        if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            for part, bare in zip(args[1], bare_args[1]):
                if bare is not None and bare.dtype in (torch.bool, torch.uint8):
                    self._note(self.blocking, "boolean index")
                if part is not None and not isinstance(part, Cuda):
                    self._note(self.blocking, "index on the host")
        elif any(tensor.dim() for tensor in on_host):
            self._note(self.mixes, name)
        if name not in NO_KERNEL:
            self.kernels[name] += 1

    def _note(self, counter, kind):
        frames = [frame for frame in traceback.extract_stack() if "/scfm/" in frame.filename]
        where = f"{frames[-1].filename.split('/scfm/')[-1]}:{frames[-1].lineno}" if frames else "outside"
        counter[f"{kind} {where}"] += 1


def _bare(value):
    return value.elem if isinstance(value, Cuda) else value


def _wrapped(value, name, known):
    if not isinstance(value, torch.Tensor) or name == "_local_scalar_dense":
        return value
    return known[id(value)] if id(value) in known else Cuda(value)


def on_host(function):
    """A stand-in for a kernel: called with the data, counted as one launch."""

    def call(*args, **kwargs):
        count = torch.utils._python_dispatch._get_current_dispatch_mode()
        count.kernels[function.__name__] += 1
        with _disable_current_modes():
            results = function(*tree_map(_bare, args), **tree_map(_bare, kwargs))
        return tuple(Cuda(result) if isinstance(result, torch.Tensor) else result for result in results)

    return call
