"""A second device for machines that have one: finds tensors left on the CPU where no GPU is there.

    with second_device() as device:               # torch.device("second", 0)
        run = fit(model, task.changed(device=device), Training(epochs=2))

Inside, tensors of that device hold real numbers, computed by the CPU. What a GPU refuses is refused here, too: an operation over tensors of
both devices (numbers without a dimension and CPU indices aside), a generator of the other device, `numpy()` before `cpu()`. Kernels, precision
and speed of a GPU are not imitated; this is about where tensors live, which is what breaks first.

The device takes PyTorch's slot for private backends, once for the process and before its first `backward`: use it in a process of its own,
and leave that by `os._exit`: PyTorch's thread for the device may abort an ordinary exit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

SECOND_NAME = "second"
SECOND = torch.device("privateuseone", 0)
BETWEEN = {"_to_copy", "copy_", "set_", "record_stream"}  # operations that may see both devices
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}


class SecondTensor(Tensor):
    """A tensor that says it lives on the second device; its numbers are in `held`."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> SecondTensor:
        self = Tensor._make_wrapper_subclass(
            cls, held.size(), strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype, device=SECOND
        )  # fmt: skip
        self.held = held
        return self

    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore[reportAssignmentType]

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return _run(func, args, kwargs or {})

    def __repr__(self, *, tensor_contents: object = None) -> str:
        return f"SecondTensor({self.held!r})"

    def tolist(self) -> Any:
        return self.held.tolist()

    def numpy(self, *, force: bool = False) -> Any:
        if not force:
            raise TypeError("can't convert a tensor of the second device to numpy; use Tensor.cpu() first")
        return self.held.detach().numpy()

    def __array__(self, dtype: Any = None) -> Any:
        return self.numpy()


class SecondGenerator(torch.Generator):
    """A generator that says it lives on the second device. Operations see a new handle of it, hence the addresses."""

    made: ClassVar[dict[int, SecondGenerator]] = {}

    def __init__(self) -> None:
        self.made[self._cdata] = self  # pyright: ignore[reportAttributeAccessIssue]  (PyTorch's stubs leave it out)

    @property
    def device(self) -> torch.device:
        return SECOND


class _Dispatch(TorchDispatchMode):
    """Every operation, those that make tensors included."""

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return _run(func, args, kwargs or {})


class _FromNumbers(TorchFunctionMode):
    """Tensors made of Python's numbers start on the CPU: PyTorch would look for a backend's memory."""

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.tensor, torch.as_tensor, torch.asarray) and kwargs.get("device") is not None:
            return func(*args, **{**kwargs, "device": None}).to(kwargs["device"])
        if func is Tensor.new_tensor and isinstance(args[0], SecondTensor):
            dtype, device = kwargs.get("dtype") or args[0].dtype, kwargs.get("device") or SECOND
            return torch.tensor(args[1], dtype=dtype).to(device)
        return func(*args, **kwargs)


@contextmanager
def second_device() -> Iterator[torch.device]:
    """The context in which the second device computes; yields that device."""
    if not hasattr(torch, SECOND_NAME):
        _setup_privateuseone_for_python_backend(SECOND_NAME)
    make = torch.Generator

    def generator(device: torch.device | str = "cpu") -> torch.Generator:
        return SecondGenerator() if torch.device(device) == SECOND else make(device)

    swapped = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(
        True
    )  # `module.double()` would set `data`, which `held` does not see
    try:
        with mock.patch.object(torch, "Generator", _like(make, generator)), _Dispatch(), _FromNumbers():
            yield SECOND
    finally:
        torch.__future__.set_swap_module_params_on_conversion(swapped)
        SecondGenerator.made.clear()


def _like(kind: type, call: Callable[..., Any]) -> Any:
    """`call` under the name of `kind`, good for `isinstance`."""

    class Meta(type(kind)):
        def __instancecheck__(cls, instance: object) -> bool:
            return isinstance(instance, kind)

        def __call__(cls, *args: Any, **kwargs: Any) -> Any:
            return call(*args, **kwargs)

    return Meta(kind.__name__, (), {})


def _run(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    name = func.overloadpacket.__name__
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    here = any(isinstance(t, SecondTensor) for t in tensors)
    target = kwargs.get("device")
    if here and name not in BETWEEN:
        watched = tree_leaves(args[:1]) if name in INDEXING else tensors
        for stray in watched:
            if isinstance(stray, Tensor) and not isinstance(stray, SecondTensor) and stray.dim() > 0:
                raise RuntimeError(f"{func}: expected all tensors on one device, found the second device and the CPU")
    on_second = torch.device(target) == SECOND if target is not None else here and name != "copy_"
    source = kwargs.get("generator")
    if source is not None and (source._cdata in SecondGenerator.made) != (on_second or here):
        raise RuntimeError(f"{func}: the generator is not on the device of the tensor that it fills")
    bare_args, bare = tree_map(_bare, args), {k: tree_map(_bare, v) for k, v in kwargs.items()}
    if target is not None:
        bare["device"] = torch.device("cpu")
    out = func(*bare_args, **bare)
    if name == "copy_":
        return args[0]
    if not on_second:
        return out
    out = tree_map(_wrap, out)
    if not here:
        return out
    return return_and_correct_aliasing(func, args, dict(kwargs), out)


def _bare(value: Any) -> Any:
    return value.held if isinstance(value, SecondTensor) else value


def _wrap(value: Any) -> Any:
    if not isinstance(value, Tensor) or isinstance(value, SecondTensor):
        return value
    with torch.inference_mode(False):  # a view of an ordinary tensor must be one, too
        return SecondTensor(value)
