"""Run a planish model in ONNX Runtime, its KV cache kept where ONNX Runtime made it."""

import dataclasses
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
from onnxruntime.capi.onnxruntime_pybind11_state import OrtDevice, OrtValue, OrtValueVector

from planish.compiler.errors import NotPlanishModelError
from planish.compiler.runtime.language_model import UNLIMITED, Limits, check_call
from planish.compiler.runtime.processor import PRODUCTS_WITHOUT_SATURATION, cpu_flags
from planish.compiler.runtime.provider import Provider, check_provider, check_started

__all__ = ["Cache", "Session"]

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]

#: ONNX Runtime's name of a cache type -> numpy's.
_DTYPES: dict[str, type[np.generic]] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(uint8)": np.uint8,
    "tensor(int8)": np.int8,
}
_TOKEN_INPUTS = ("input_ids", "attention_mask", "position_ids", "num_logits_to_keep")
_CPU = OrtDevice(OrtDevice.cpu(), OrtDevice.default_memory(), 0)


@dataclasses.dataclass(frozen=True)
class Cache:
    """The keys and values of the tokens a model has seen.

    Attributes:
        tensors: one OrtValue per cache input of the model, in the order of the inputs.
        mask: int64 [batch, tokens], 1 for real tokens, 0 for padding.
        arrays: what owns the memory of `tensors`, where they do not own it themselves.
    """

    tensors: tuple[Any, ...]
    mask: Ints
    arrays: tuple[npt.NDArray[Any], ...] = ()

    def __len__(self) -> int:
        """Return the number of cached tokens, padding included."""
        return int(self.mask.shape[1])

    @property
    def nbytes(self) -> int:
        """Bytes of keys, values and their scales."""
        return sum(int(np.prod(t.shape())) * _DTYPES[t.data_type()]().itemsize for t in self.tensors)

    def take(self, rows: Sequence[int]) -> "Cache":
        """Return a copy that holds the sequences `rows` of the batch, in this order; any of them several times."""
        arrays = tuple(tensor.numpy()[list(rows)] for tensor in self.tensors)
        tensors = tuple(OrtValue.ortvalue_from_numpy(array, _CPU) for array in arrays)
        return Cache(tensors, self.mask[list(rows)], arrays)


@dataclasses.dataclass(frozen=True)
class _Slot:
    """One cache tensor: its input, the output that extends it, and what an empty one looks like."""

    past: str
    present: str
    dtype: type[np.generic]
    shape: tuple[int | str, ...]

    def empty(self, batch: int) -> Any:
        shape = [batch if dim == "batch" else 0 if dim == "past" else int(dim) for dim in self.shape]
        return OrtValue.ortvalue_from_shape_and_type(shape, self.dtype, _CPU)


class Session:
    """A planish model loaded by ONNX Runtime.

    The cache goes from one step to the next as ONNX Runtime's own tensors; it is never copied to numpy.

    Example:
        >>> session = Session("out/engines/ort/model.onnx", threads=2)  # doctest: +SKIP
        >>> logits, cache = session.run(np.array([[1, 2, 3]]))  # doctest: +SKIP
        >>> logits, cache = session.run(np.array([[4]]), cache)  # doctest: +SKIP
    """

    def __init__(self, model: str | Path, threads: int | None = None, provider: Provider | str = Provider.CPU) -> None:
        """Load `model`.

        Args:
            model: an ONNX file that planish wrote, its external data beside it.
            threads: threads of one operator; None leaves the number to ONNX Runtime (one per core).
            provider: where operators run; those that CUDA has no kernel for run on the CPU, see `runs_on`.

        Raises:
            NotPlanishModelError: if the file cannot be loaded, or planish did not write it.
            MissingExtraError: if the installed ONNX Runtime lacks the provider.
            DeviceError: if the provider does not start.
        """
        provider = Provider(provider)
        check_provider(provider)
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = threads or 0
        # ONNX Runtime would plan the memory anew for every length of the cache, and keep all the plans.
        options.enable_mem_pattern = False
        if not PRODUCTS_WITHOUT_SATURATION & set(cpu_flags()):
            # Products of unsigned by signed 8-bit codes saturate then, unless a slower kernel is asked for.
            options.add_session_config_entry("session.x64quantprecision", "1")
        if provider is Provider.CUDA:
            options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        try:
            self._session = ort.InferenceSession(str(model), options, providers=provider.names)
        except Exception as error:  # ONNX Runtime's exceptions have no common base of their own
            raise NotPlanishModelError(f"ONNX Runtime cannot load {model}: {error}") from error
        check_started(provider, self._session.get_providers())
        self._provider, self._cache_place = provider, provider.place
        inputs = {i.name: i for i in self._session.get_inputs()}
        if self._session.get_modelmeta().producer_name != "planish" or "input_ids" not in inputs:
            raise NotPlanishModelError(
                f"{model} was not written by planish. Give a bundle made by 'planish compile' or 'planish export'."
            )
        self._slots = tuple(
            _Slot(name, name.replace("past_key_values", "present", 1), _DTYPES[i.type], tuple(i.shape))
            for name, i in inputs.items()
            if name.startswith("past_key_values.")
        )
        self._inputs = [*_TOKEN_INPUTS, *(slot.past for slot in self._slots)]
        self._outputs = ["logits", *(slot.present for slot in self._slots)]
        self._vocabulary = next(int(o.shape[-1]) for o in self._session.get_outputs() if o.name == "logits")

    @property
    def limits(self) -> Limits:
        """None: ONNX Runtime takes what there is memory for."""
        return UNLIMITED

    @property
    def runs_on(self) -> str:
        """What runs the model, and where; with CUDA, how many of its operators run there."""
        title = f"ONNX Runtime {ort.__version__}, {self._provider}"
        if self._provider is Provider.CPU:
            return title
        counts = Counter[str]()
        for part in self._session.get_provider_graph_assignment_info():
            counts[part.ep_name] += len(part.get_nodes())
        return f"{title} ({counts[self._provider.names[0]]} of {counts.total()} operators, the others on the cpu)"

    @property
    def cache_inputs(self) -> tuple[str, ...]:
        """Names of the cache inputs, in the order of `Cache.tensors`."""
        return tuple(slot.past for slot in self._slots)

    @property
    def cache_bytes_per_token(self) -> int:
        """Bytes of cache that one token takes in one sequence, scales and zeros counted."""
        return sum(
            int(np.prod([int(dim) for dim in slot.shape if dim not in ("batch", "past")])) * slot.dtype().itemsize
            for slot in self._slots
        )

    def empty_cache(self, batch: int = 1) -> Cache:
        """Return the cache of `batch` sequences that hold no token yet."""
        return Cache(tuple(slot.empty(batch) for slot in self._slots), np.zeros((batch, 0), np.int64))

    def run(
        self,
        input_ids: npt.ArrayLike,
        cache: Cache | None = None,
        *,
        mask: npt.ArrayLike | None = None,
        logits_to_keep: int = 0,
    ) -> tuple[Floats, Cache]:
        """Run new tokens behind the cached ones.

        Args:
            input_ids: int64 [batch, sequence], the new tokens.
            cache: what the call before returned; None starts anew.
            mask: int64 [batch, sequence], 0 where `input_ids` holds padding; None means all tokens are real.
                Padding takes no position: real tokens are counted from 0.
            logits_to_keep: how many of the last positions get logits; 0 is all of them.

        Returns:
            Logits, float32 [batch, kept, vocab], and the cache extended by the new tokens. The old cache stays valid.

        Raises:
            ValueError: as `check_call` does.
            TokenizerError: likewise.
        """
        logits, extended, _ = self._step(input_ids, cache, mask, logits_to_keep, ())
        return logits, extended

    def run_traced(
        self, input_ids: npt.ArrayLike, cache: Cache | None, names: Sequence[str]
    ) -> tuple[Floats, Cache, list[npt.NDArray[Any]]]:
        """Run new tokens as `run` does, and also return the graph outputs called `names`."""
        return self._step(input_ids, cache, None, 0, names)

    def _step(
        self,
        input_ids: npt.ArrayLike,
        cache: Cache | None,
        mask: npt.ArrayLike | None,
        logits_to_keep: int,
        names: Sequence[str],
    ) -> tuple[Floats, Cache, list[npt.NDArray[Any]]]:
        ids = np.asarray(input_ids, np.int64)
        new_mask = np.ones_like(ids) if mask is None else np.asarray(mask, np.int64)
        check_call(ids, None if cache is None else len(cache.mask), new_mask, logits_to_keep, self._vocabulary)
        cache = cache or self.empty_cache(len(ids))
        seen = np.concatenate([cache.mask, new_mask], axis=1)
        positions = np.maximum(seen.cumsum(axis=1) - 1, 0)[:, len(cache) :]
        keep = np.asarray(logits_to_keep, np.int64)
        tokens = (
            ids,
            seen,
            np.ascontiguousarray(positions),
            keep,
        )  # must outlive the run: the feeds share their memory
        # An IOBinding would refuse num_logits_to_keep, which is an initializer that a feed overrides, and
        # run_with_ort_values takes as long for its own checks as dozens of the graph's nodes.
        feeds, fetches = OrtValueVector(), OrtValueVector()
        for value in (*(OrtValue.ortvalue_from_numpy(array, _CPU) for array in tokens), *cache.tensors):
            feeds.push_back(value)
        outputs = [*self._outputs, *names]
        places = [_CPU, *[self._cache_place] * len(self._slots), *[_CPU] * len(names)]
        self._session.run_with_ortvaluevector(ort.RunOptions(), self._inputs, feeds, outputs, fetches, places)
        logits, *rest = fetches
        present, extra = rest[: len(self._slots)], rest[len(self._slots) :]
        return logits.numpy(), Cache(tuple(present), seen), [value.numpy() for value in extra]
