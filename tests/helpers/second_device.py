"""A second device without hardware: its tensors hold CPU tensors, refuse to mix with others, and note each crossing.

It takes torch's one free device type, for the whole process and for good, so tests with it have a process of their own.
"""

import torch
from torch.utils import _pytree as pytree
from torch.utils import backend_registration

AVAILABLE = hasattr(backend_registration, "_setup_privateuseone_for_python_backend")  # torch 2.10 or newer
CROSSINGS: list[tuple[str, torch.dtype, tuple[int, ...]]] = []  # ("there" or "back", dtype, shape)
_MAY_MIX = ("aten::_to_copy", "aten::copy_")
_library = torch.library.Library("aten", "IMPL")


def second_device() -> torch.device:
    backend_registration._setup_privateuseone_for_python_backend("far")
    for name in ("empty.memory_format", "empty_strided"):  # whatever makes a tensor there calls one of them
        _library.impl(name, _maker(getattr(torch.ops.aten, name.split(".")[0])), "PrivateUse1")
    _library.impl("_copy_from", _copy_from, "PrivateUse1")
    return torch.device("far:0")


def _copy_from(source, target, non_blocking=False):
    """What torch.tensor([...], device=...) ends in."""
    target.held.copy_(source)
    return target


def _maker(make):
    return lambda *sizes, device=None, **options: FarTensor(make(*sizes, device="cpu", **options))


class FarTensor(torch.Tensor):
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held):
        options = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype}
        made = torch.Tensor._make_wrapper_subclass(cls, held.shape, **options, device=torch.device("far:0"))
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})

    def __repr__(self):
        return f"FarTensor({self.held})"


def _run(func, args, kwargs):
    tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    far = [isinstance(tensor, FarTensor) for tensor in tensors]
    name = func.name().split(".")[0]
    if any(far) and name not in _MAY_MIX:
        here = [tuple(t.shape) for t, there in zip(tensors, far, strict=True) if not there and t.dim()]
        assert not here, f"{func} mixes the devices: {here} are on the CPU"
    result_is_far = any(far)
    if kwargs.get("device") is not None:
        result_is_far = torch.device(kwargs["device"]).type == "far"
        kwargs = {**kwargs, "device": "cpu"} if result_is_far else kwargs
    if name in _MAY_MIX:
        source, there = (tensors[0], result_is_far) if name == "aten::_to_copy" else (tensors[1], far[0])
        if isinstance(source, FarTensor) != there:
            CROSSINGS.append(("there" if there else "back", source.dtype, tuple(source.shape)))
    held = pytree.tree_map(lambda x: x.held if isinstance(x, FarTensor) else x, (args, kwargs))
    result = func(*held[0], **held[1])
    if name.endswith("_"):  # in place
        return args[0]
    wrap = lambda x: FarTensor(x) if result_is_far and isinstance(x, torch.Tensor) else x  # noqa: E731
    return pytree.tree_map(wrap, result)
