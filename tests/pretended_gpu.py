"""A GPU that is not there: tensors on it are on the CPU and marked, and whatever a real GPU would refuse is refused.

PyTorch lets a mode see every function that is called on tensors. This one takes a GPU that is asked for away from the
call, runs it on the CPU, and marks the storage of what comes out as on the GPU. Tensors of both places in one call,
apart from numbers of no dimension and indices, are an error, as they are where there is a GPU; what PyTorch makes
without being asked for a device is on the CPU. Backward passes are not watched. Numbers are those of the CPU.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode

__all__ = ["GPU", "PretendedGpu"]

GPU = torch.device("cuda")

_PROPERTIES = "__get__"
_COPYING = (Tensor.copy_, Tensor.__setitem__)
_INDEXING = (Tensor.__getitem__, Tensor.__setitem__)


class PretendedGpu(TorchFunctionMode):
    """Pretends, while it is entered; `used` counts the calls that ran on the GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.used = 0
        # A weak reference keeps the address of a storage from being given to another.
        self._storages: dict[int, StorageWeakRef] = {}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func == Tensor.device.__get__:
            return GPU if self._is_here(args[0]) else torch.device("cpu")
        if func == Tensor.numpy and self._is_here(args[0]):
            raise TypeError("numpy: the tensor is on the GPU")
        if func in (Tensor.to, Tensor.cpu):
            return self._to(func, args, kwargs)
        here = any(map(self._is_here, _tensors((args, kwargs))))
        if func not in (Tensor.backward, torch.autograd.backward):
            self._check(func, args, kwargs)
        if kwargs.get("device") is not None:
            here = torch.device(kwargs.pop("device")).type == "cuda"
        result = func(*args, **kwargs)
        self.used += here
        return self._marked(result) if here and func not in _COPYING else result

    def _to(self, func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Tensor:
        x, *wanted = args
        there = self._is_here(x) and func != Tensor.cpu
        for each in [*wanted, kwargs.pop("device", None)]:
            if isinstance(each, torch.device):
                there = each.type == "cuda"
            if isinstance(each, Tensor):
                there = self._is_here(each)
        dtypes = [each.dtype if isinstance(each, Tensor) else each for each in [*wanted, kwargs.pop("dtype", None)]]
        found = x.to(next((each for each in dtypes if isinstance(each, torch.dtype)), x.dtype))
        if there != self._is_here(x):
            found = found.clone()
        return self._marked(found) if there else found

    def _check(self, func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> None:
        if getattr(func, "__name__", "") == _PROPERTIES or func in _COPYING:
            return
        if func in _INDEXING:
            # Whatever is indexed may be so by numbers on the CPU, not the other way round.
            wrong = not self._is_here(args[0]) and any(map(self._is_here, _tensors(args[1:])))
        else:
            # Numbers of no dimension on the CPU go with everything.
            places = [self._is_here(tensor) for tensor in _tensors((args, kwargs)) if tensor.dim()]
            wrong = len(set(places)) > 1
        if wrong:
            raise RuntimeError(f"{getattr(func, '__name__', func)}: tensors are on the GPU and on the CPU")

    def _is_here(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self._storages

    def _marked(self, result: Any) -> Any:
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            self._storages[storage._cdata] = StorageWeakRef(storage)
        return result


def _tensors(content: Any) -> Iterator[Tensor]:
    if isinstance(content, Tensor):
        yield content
    elif isinstance(content, dict):
        yield from _tensors(list(content.values()))
    elif isinstance(content, list | tuple):
        for each in content:
            yield from _tensors(each)
