"""LoRA adapters for the pipelines of OpenVINO GenAI: files as the library applies them whole, and weights of a call.

The library finds the module of a tensor by searching its name in those of the graph's operations, after it has changed
it: it misses names that it mangles, and a short name can match several operations. So each file is made again in
memory, under names that the library does not change and that match exactly the operations of one module, with
alpha / rank multiplied into the matrices, which the library does not read. Rules, each shown by a test in
tests/e2e/test_lora_traps.py:
- Each call gets every adapter, in one order. Other adapters than in the call before make it set the matrices again,
  and pictures are then wrong.
- Of weights that change, it sees only the last. So a marker, an adapter of no module, is the last; its weight differs
  from call to call.
- It reads an input of the model wrongly beside an adapter, unless that is the output of the only text encoder. So
  classes with other inputs are refused (`models.classes`), and so is a module that reads another input.
Runs in: worker, device thread.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import openvino as ov
import openvino_genai as og
from numpy.typing import NDArray

from ovserve.engines.checks import check_adapters
from ovserve.engines.lora.adapters import Adapter, Pair, check_components, quoted_keys, read_adapter
from ovserve.engines.lora.graph import Module, find_modules
from ovserve.engines.lora.names import DENOISER
from ovserve.engines.lora.tensors import safetensors
from ovserve.engines.protocol import Work
from ovserve.errors import ModelError
from ovserve.models.classes import CLASSES
from ovserve.models.profile import ModelProfile
from ovserve.settings.loras import LoraSettings
from ovserve.wire.request import ImageRequest

__all__ = ["GenaiLoras"]

_PREFIXES = {DENOISER: "", "text_encoder": "lora_te."}  # by which the library tells components apart
# Parts of names that the library changes, or takes for the end of a name.
_MANGLED = re.compile(r"input_blocks|middle_block|output_blocks|\.processor\.|lora")
_TEXT_INPUT = "encoder_hidden_states"
_MARKER = "marker.lora_te"  # a module of no component, of which the library does not warn
_MARKS = 1024  # weights of the marker; an error in a call may leave one component with the weights of the call before


class GenaiLoras:
    """The adapters of one model.

    Args:
        profile: the model.
        settings: its adapters.
    """

    def __init__(self, profile: ModelProfile, settings: Sequence[LoraSettings]) -> None:
        self._profile = profile
        self._settings = settings
        self._adapters: list[tuple[str, Any]] = []
        self._marker: Any = None
        self._calls = 0

    def read(self) -> None:
        """Read the files and make the library's adapters.

        Raises:
            ModelError: the library cannot apply adapters to this model, or a file cannot be read, or not all of it can
                be applied; the message names the file and the modules.
        """
        name = self._profile.pipeline_class
        serving = CLASSES[name].genai
        if serving is None or not serving.adapters:
            raise ModelError(
                f"model {self._profile.name}: engine genai does not apply LoRA adapters to class {name} reliably; "
                "use stepwise"
            )
        core, adapters = ov.Core(), [read_adapter(entry.path) for entry in self._settings]
        parts = {DENOISER: self._profile.traits.denoiser, "text_encoder": "text_encoder"}
        models = {}
        for component, directory in parts.items():
            path = self._profile.component(directory) / "openvino_model.xml"
            if any(adapter.pairs.get(component) for adapter in adapters):
                models[component] = core.read_model(str(path))
        for entry, adapter in zip(self._settings, adapters, strict=True):
            check_components(adapter, parts)
            tensors: dict[str, NDArray[np.float32]] = {}
            for component in adapter.pairs:
                tensors |= _tensors(models[component], component, adapter)
            self._adapters.append((entry.alias, _adapter(tensors)))
        zero = np.zeros((1, 1), np.float32)
        self._marker = _adapter({f"{_MARKER}.lora_A.weight": zero, f"{_MARKER}.lora_B.weight": zero})

    def check(self, request: Work | ImageRequest) -> None:
        """Check that the model has every adapter of a request. Raises InvalidValue."""
        check_adapters(request, [entry.alias for entry in self._settings])

    def at_construction(self) -> Any:
        """Return what a pipeline needs when it is compiled."""
        return self._config({}, og.AdapterConfig(og.AdapterConfig.Mode.MODE_DYNAMIC))

    def of_call(self, work: Work) -> Any:
        """Return what a call needs to apply the adapters of a picture, and no others."""
        return self._config(dict(work.request.adapters), og.AdapterConfig())

    def _config(self, weights: dict[str, float], config: Any) -> Any:
        self._calls += 1
        for alias, adapter in self._adapters:
            config.add(adapter, weights.get(alias, 0.0))
        config.add(self._marker, float(self._calls % _MARKS))
        return config


def _adapter(tensors: dict[str, NDArray[np.float32]]) -> Any:
    return og.Adapter(ov.Tensor(np.frombuffer(safetensors(tensors), np.uint8).copy()))


def _tensors(model: Any, component: str, adapter: Adapter) -> dict[str, NDArray[np.float32]]:
    """Return the matrices of an adapter for one model, by the names under which the library applies them.

    Raises:
        ModelError: not all of them can be applied.
    """
    operations = [each for each in model.get_ops() if each.get_type_name() in ("MatMul", "Convolution")]
    names = [each.get_friendly_name() for each in operations]
    found, refused = {}, []
    for module in find_modules(model, component, [adapter]):
        (_, pair), *_ = module.pairs
        keys = list(_keys(module, names))
        if not keys or pair.down.ndim != 2 or _reads_an_input(module):
            refused.append(pair.key)
            continue
        for key in keys:
            for role, matrix in zip("AB", _matrices(module, pair), strict=True):
                found[f"{_PREFIXES[component]}{key}.lora_{role}.weight"] = matrix
    if refused:
        raise ModelError(
            f"{adapter.path}: engine genai cannot apply {len(refused)} of its modules for the {component}, which are "
            f"convolutions above 1 x 1 or layers of an input; use stepwise: {quoted_keys(refused)}"
        )
    return found


def _keys(module: Module, names: Sequence[str]) -> Iterator[str]:
    """Yield the names that match all operations of a module and no others; nothing where there are no such names."""
    own = {operation.get_friendly_name() for operation in module.operations}
    keys, matched = [], set()
    for name in sorted(own, key=len):
        key = name.partition(".")[2]
        if name in matched or not key or _MANGLED.search(key):
            continue
        keys.append(key)
        matched |= {other for other in names if f".{key}" in other}
    if matched == own:
        yield from keys


def _reads_an_input(module: Module) -> bool:
    """Return whether a module reads an input of the model that is not the text encoder's output."""
    for operation in module.operations:
        source = operation.input_value(0)
        while source.get_node().get_type_name() == "Convert":
            source = source.get_node().input_value(0)
        if source.get_node().get_type_name() == "Parameter" and _TEXT_INPUT not in source.get_names():
            return True
    return False


def _matrices(module: Module, pair: Pair) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    down, up = pair.down.astype(np.float32), pair.up.astype(np.float32) * np.float32(pair.scale)
    if module.operations[0].get_type_name() == "Convolution":
        return down[:, :, None, None], up[:, :, None, None]
    return down, up
