"""Run a planish model as a TensorRT engine, its KV cache kept on the GPU."""

from pathlib import Path

import numpy as np
import numpy.typing as npt

from planish.compiler.backends.tensorrt.check import check_engine
from planish.compiler.backends.tensorrt.engine import Engine
from planish.compiler.backends.tensorrt.engine_json import EngineRecord
from planish.compiler.backends.tensorrt.flavour import flavour_of
from planish.compiler.backends.tensorrt.gpu import DeviceMemory, Gpu
from planish.compiler.backends.tensorrt.plugin_cache import NEW_LENGTHS, PAST_LENGTHS
from planish.compiler.errors import DeviceError, EngineLimitError, EngineMismatchError
from planish.compiler.runtime.engine_cache import EngineCache, Store, cache_tensors
from planish.compiler.runtime.engine_inputs import Call, call_by_lengths, call_by_slots
from planish.compiler.runtime.language_model import Limits, check_call

__all__ = ["EngineSession"]

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]

#: The inputs besides caches of an engine without plugins for the cache, and of one with them.
_BY_SLOTS = {"input_ids", "attention_mask", "write_indices", "position_ids", "num_logits_to_keep"}
_BY_LENGTHS = {"input_ids", PAST_LENGTHS, NEW_LENGTHS, "position_ids", "num_logits_to_keep"}


class EngineSession:
    """A TensorRT engine of a planish model; it runs as `planish.compiler.runtime.session.Session` does.

    The cache has room for as many tokens as the engine was built for, and is written in place; only logits come to the
    host.

    Example:
        >>> session = EngineSession("out/engines/rtx", "rtx")  # doctest: +SKIP
        >>> logits, cache = session.run([[1, 2, 3]])  # doctest: +SKIP
        >>> logits, cache = session.run([[4]], cache)  # doctest: +SKIP
    """

    def __init__(self, folder: str | Path, target: str) -> None:
        """Load an engine, after everything that can be wrong with it has been asked.

        Args:
            folder: of the engine, its engine.json and, if it has plugins, their library.
            target: 'rtx' or 'tensorrt'.

        Raises:
            EngineMismatchError: if this machine has no GPU, or the engine is for another one or another TensorRT.
            MissingExtraError: if TensorRT is not installed.
            BundleCorruptError: if a file is missing or changed.
            DeviceError: if the GPU cannot be used.
        """
        folder = Path(folder)
        self._record = check_engine(folder, target)
        self._by_lengths = _is_by_lengths(self._record)
        self._gpu = Gpu()
        self._engine = Engine(folder, self._record, self._gpu)
        in_place = {name: self._by_lengths or self._is_aliased(name) for name in self._record.outputs}
        self._tensors = cache_tensors(self._record, in_place)
        cached = {each.past for each in self._tensors}
        self._values = [name for name, given in self._record.inputs.items() if given.is_shape]
        self._inputs = {
            name: self._gpu.allocate(int(np.prod(given.max)) * np.dtype(given.dtype).itemsize)
            for name, given in self._record.inputs.items()
            if name not in cached and not given.is_shape
        }
        self._vocabulary = self._record.outputs["logits"].shape[-1]
        self._fed: list[npt.NDArray[np.generic]] = []
        self._logits: DeviceMemory | None = None

    @property
    def limits(self) -> Limits:
        """How many sequences, and how many tokens of each, the engine was built for."""
        return Limits(self._record.max_batch, self._record.max_context)

    @property
    def runs_on(self) -> str:
        """What runs the model, and where."""
        title, device = flavour_of(self._record.flavour).title, self._gpu.device
        return f"{title} {self._record.tensorrt}, {device.name} (SM {device.sm})"

    def empty_cache(self, batch: int = 1) -> EngineCache:
        """Return the cache of `batch` sequences that hold no token yet.

        Raises:
            EngineLimitError: if these are more sequences than the engine was built for.
            DeviceError: if the GPU's memory is too small.
        """
        self._check_batch(batch)
        return EngineCache(Store(self._gpu, self._tensors, batch), np.zeros((batch, 0), np.int64))

    def run(
        self,
        input_ids: npt.ArrayLike,
        cache: EngineCache | None = None,
        *,
        mask: npt.ArrayLike | None = None,
        logits_to_keep: int = 0,
    ) -> tuple[Floats, EngineCache]:
        """Run new tokens behind the cached ones, in several calls of the engine if they are more than it takes at once.

        Args:
            input_ids: int64 [batch, sequence], the new tokens; one at least.
            cache: what the call before returned; None starts anew.
            mask: int64 [batch, sequence], 0 where `input_ids` holds padding; None means all tokens are real.
                Padding takes no position: real tokens are counted from 0.
            logits_to_keep: how many of the last positions get logits; 0 is all of them.

        Returns:
            Logits, float32 [batch, kept, vocab], those of padding without meaning, and the cache extended by the new
            tokens. The old cache stays valid; if it is extended once more, the keys and values are copied.

        Raises:
            ValueError: as `check_call` does.
            TokenizerError: likewise.
            EngineLimitError: if these are more sequences or tokens than the engine was built for.
            DeviceError: if the GPU's memory is too small, or the engine fails.
        """
        ids = np.asarray(input_ids, np.int64)
        new = np.ones_like(ids) if mask is None else np.asarray(mask, np.int64)
        check_call(ids, None if cache is None else len(cache.mask), new, logits_to_keep, self._vocabulary)
        self._check_batch(len(ids))
        cache = cache or self.empty_cache(len(ids))
        seen = np.concatenate([cache.mask, new], axis=1)
        self._check_length(seen)
        store, past, total = cache.own(), len(cache), ids.shape[1]
        first_wanted = total - min(logits_to_keep or total, total)
        parts = []
        for start in range(0, total, self._record.max_prompt):
            stop = min(start + self._record.max_prompt, total)
            wanted = max(0, stop - max(start, first_wanted))
            logits = self._step(ids[:, start:stop], seen[:, : past + stop], store, wanted)
            if wanted:
                parts.append(logits)
        return np.concatenate(parts, axis=1) if len(parts) > 1 else parts[0], EngineCache(store, seen)

    def _step(self, ids: Ints, seen: Ints, store: Store, wanted: int) -> Floats:
        """Call the engine once; return the logits of the last `wanted` positions."""
        call = (
            call_by_lengths(ids, seen, wanted)
            if self._by_lengths
            else call_by_slots(ids, seen, self._record.max_context, wanted)
        )
        self._feed(call)
        for each in self._tensors:
            self._engine.bind(each.past, store.current[each.past].address, (store.batch, *each.shape))
            self._engine.bind(each.present, store.other[each.past].address)
        memory, logits = self._bind_logits(len(ids), call.keep)
        self._engine.start()
        # From here on the store holds more than what it was before, whatever becomes of the step.
        store.turn(ids.shape[1])
        self._gpu.download(memory, logits)
        self._gpu.synchronize()
        return call.pick(logits)

    def _feed(self, call: Call) -> None:
        # The arrays are read until the step is done.
        self._fed = []
        for name, memory in self._inputs.items():
            array = np.ascontiguousarray(call.feeds[name], self._record.inputs[name].dtype)
            self._gpu.upload(memory, array)
            self._engine.bind(name, memory.address, array.shape)
            self._fed.append(array)
        for name in self._values:
            value = np.array(call.keep, self._record.inputs[name].dtype)
            self._engine.bind_value(name, value)
            self._fed.append(value)

    def _bind_logits(self, batch: int, keep: int) -> tuple[DeviceMemory, Floats]:
        """Give the engine memory for logits; return it, and the array to fill with them, [batch, keep, vocab]."""
        logits = np.empty((batch, keep, self._vocabulary), np.float32)
        if self._logits is None or self._logits.nbytes < logits.nbytes:
            # The old memory is given back before the new is taken.
            self._logits = None
            self._logits = self._gpu.allocate(logits.nbytes)
        self._engine.bind("logits", self._logits.address)
        found = self._engine.shape_of("logits")
        if found != logits.shape:
            raise DeviceError(
                f"The engine would write logits of shape {list(found)} where {list(logits.shape)} were asked for. "
                f"Build it again with 'planish build --target {self._record.flavour}'."
            )
        return self._logits, logits

    def _is_aliased(self, output: str) -> bool:
        return self._engine.aliased_input(output) is not None

    def _check_batch(self, batch: int) -> None:
        most = self._record.max_batch
        if batch > most:
            raise EngineLimitError(
                f"The engine was built for {most} sequence(s) at once, and {batch} were given. Build it again with "
                f"'planish build --target {self._record.flavour} --max-batch-size {batch}'."
            )

    def _check_length(self, seen: Ints) -> None:
        room = self._record.max_context
        needed = int(seen.sum(axis=1).max()) if self._by_lengths else seen.shape[1]
        if needed > room:
            raise EngineLimitError(
                f"The engine was built for {room} tokens of a sequence, and these are {needed}. Build it again with "
                f"'planish build --target {self._record.flavour} --max-context {needed}'."
            )


def _is_by_lengths(record: EngineRecord) -> bool:
    """Say which of the two forms an engine's inputs have.

    Raises:
        EngineMismatchError: if it is neither.
    """
    names = {name for name in record.inputs if not name.startswith("past_key_values.")}
    if names not in (_BY_SLOTS, _BY_LENGTHS):
        raise EngineMismatchError(
            f"The engine was built by planish {record.planish} and takes {', '.join(sorted(names))}, which this "
            f"planish does not feed. Build it again with 'planish build --target {record.flavour}'."
        )
    return names == _BY_LENGTHS
