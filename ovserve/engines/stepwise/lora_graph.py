"""Adds LoRA adapters to a model's graph, with one input that says for each row how much of each adapter to apply.

For each module that an adapter changes, with its adapters stacked along the rank (R rows in all):

    x ──▶ MatMul or Convolution ──▶ (+ bias) ──▶ + ──▶
    └───▶ down (R, in) ──▶ × s (rows, R) ──▶ up (out, R) ─┘       s = lora_scale (rows, adapters) · select (adapters, R)

`select` holds each adapter's alpha / rank. The sum comes after the bias, so that the plugin still fuses the two as in
the model without adapters. A row with zeros in `lora_scale` adds zeros.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import openvino as ov
from openvino import opset13 as ops

from ovserve.engines.lora.adapters import Adapter, Pair, quoted_keys
from ovserve.engines.lora.names import targets
from ovserve.engines.schedulers.noise import Array, f32
from ovserve.errors import ModelError

__all__ = ["SCALE_INPUT", "adapt_model"]

SCALE_INPUT = "lora_scale"  # float32 (rows, adapters)

# Names of the operations that torch's linear layers and convolutions become when a model is exported by tracing.
_MODULE = re.compile(
    r"^(?:__module\.)?(?P<path>[^/]+)/aten::(?:linear(?:_\d+)?/MatMul|_?conv\w*/Convolution)(?:_\d+)?$"
)
_FLOAT16_MAX = float(np.finfo(np.float16).max)


@dataclass(slots=True)
class _Module:
    """A module of the graph: its operations, more than one if it is called several times, and its adapters."""

    path: str
    operations: list[Any]
    pairs: list[tuple[int, Pair]] = field(default_factory=list)  # with the number of the adapter


def adapt_model(model: Any, component: str, adapters: Sequence[Adapter]) -> Any | None:
    """Return a copy of a model with the parts of all adapters for a component; None if no adapter has such a part.

    Raises:
        ModelError: an adapter has a module that the model does not have, or of another size; the message names them.
    """
    if not any(adapter.pairs.get(component) for adapter in adapters):
        return None
    adapted = model.clone()
    modules = _modules(adapted)
    known = _names(modules)
    for number, adapter in enumerate(adapters):
        _assign(adapter, number, component, known)
    scale = ops.parameter(ov.PartialShape([-1, len(adapters)]), f32, name=SCALE_INPUT)
    scale.output(0).get_tensor().set_names({SCALE_INPUT})
    editor = _Editor(scale, len(adapters), [adapter.path.name for adapter in adapters])
    for module in modules:
        if module.pairs:
            for operation in module.operations:
                editor.add(operation, module)
    adapted.add_parameters([scale])
    adapted.validate_nodes_and_infer_types()
    return adapted


def _modules(model: Any) -> list[_Module]:
    found: dict[str, _Module] = {}
    for operation in model.get_ordered_ops():
        if operation.get_type_name() in ("MatMul", "Convolution"):
            match = _MODULE.match(operation.get_friendly_name())
            if match:
                path = match["path"]
                found.setdefault(path, _Module(path, [])).operations.append(operation)
    return list(found.values())


def _names(modules: Sequence[_Module]) -> dict[str, _Module]:
    """Return the modules by name, with `_` for dots; also without what the paths of all modules begin with.

    An export may have wrapped the model in other modules, whose names then come first.
    """
    known: dict[str, _Module] = {}
    split = [module.path.split(".") for module in modules]
    shared = 0
    while split and all(len(parts) > shared + 1 and parts[shared] == split[0][shared] for parts in split):
        shared += 1
    for module, parts in zip(modules, split, strict=True):
        for start in range(shared + 1):
            known["_".join(parts[start:])] = module
    return known


def _assign(adapter: Adapter, number: int, component: str, known: Mapping[str, _Module]) -> None:
    """Add an adapter's pairs to the modules that they change. Raises ModelError if one has no module."""
    pairs = adapter.pairs.get(component, {})
    missing = []
    for name, pair in pairs.items():
        found = targets(name, known)
        if not found:
            missing.append(pair.key)
        for target in found:
            rows = np.split(pair.up, target.parts)[target.part] if target.parts > 1 else pair.up
            known[target.module].pairs.append((number, Pair(pair.key, pair.down, rows, pair.scale)))
    if missing:
        raise ModelError(
            f"{adapter.path}: {len(missing)} of its {len(pairs)} modules are not in this model's {component}; "
            f"is it made for another model? Missing: {quoted_keys(missing)}"
        )


class _Editor:
    """Adds branches to one graph."""

    def __init__(self, scale: Any, adapters: int, names: Sequence[str]) -> None:
        self._scale = scale
        self._adapters = adapters
        self._names = names
        self._selected: dict[tuple[tuple[int, int, float], ...], Any] = {}

    def add(self, operation: Any, module: _Module) -> None:
        """Add the branch of one operation. Raises ModelError if an adapter does not fit it."""
        is_convolution = operation.get_type_name() == "Convolution"
        shape = _weight_shape(operation, is_convolution)
        for number, pair in module.pairs:
            self._check(number, pair, module, shape, is_convolution)
        source, rank = operation.input_value(0), len(operation.get_output_partial_shape(0))
        down = np.concatenate([_with_kernel(pair.down, shape) for _, pair in module.pairs])
        up = np.concatenate([pair.up for _, pair in module.pairs], axis=1)
        selected = self._selected_scales(module.pairs)
        if is_convolution:
            attributes = operation.get_attributes()
            inner = ops.convolution(
                source,
                _constant(down),
                attributes["strides"],
                attributes["pads_begin"],
                attributes["pads_end"],
                attributes["dilations"],
                attributes["auto_pad"],
            )
            inner = ops.multiply(inner, ops.unsqueeze(selected, _axes(2, 3)))
            branch = ops.convolution(inner, _constant(up[:, :, None, None]), [1, 1], [0, 0], [0, 0], [1, 1])
        else:
            between = list(range(1, rank - 1))
            if between:
                selected = ops.unsqueeze(selected, _axes(*between))
            inner = ops.multiply(ops.matmul(source, _constant(down), False, True), selected)
            branch = ops.matmul(inner, _constant(up), False, True)
        end = _after_bias(operation)
        readers = list(end.output(0).get_target_inputs())
        total = ops.add(end.output(0), branch)
        for reader in readers:
            reader.replace_source_output(total.output(0))

    def _check(self, number: int, pair: Pair, module: _Module, shape: tuple[int, ...], is_convolution: bool) -> None:
        outputs, inputs, *kernel = shape
        is_fitting = pair.up.shape[0] == outputs and pair.down.shape[1] == inputs
        own = list(pair.down.shape[2:])
        is_fitting &= own == kernel or (is_convolution and not own and all(side == 1 for side in kernel))
        if not is_fitting:
            raise ModelError(
                f"{self._names[number]}: {pair.key} has the sizes {pair.down.shape} and {pair.up.shape}, but "
                f"{module.path} of this model has {shape}; is it made for another model?"
            )

    def _selected_scales(self, pairs: Sequence[tuple[int, Pair]]) -> Any:
        """Return the factor of each row of `down` for each row of the call: (rows, R)."""
        key = tuple((number, pair.rank, pair.scale) for number, pair in pairs)
        if key not in self._selected:
            select = np.zeros((self._adapters, sum(rank for _, rank, _ in key)), f32)
            begin = 0
            for number, rank, scale in key:
                select[number, begin : begin + rank] = scale
                begin += rank
            self._selected[key] = ops.matmul(self._scale, ops.constant(select), False, False)
        return self._selected[key]


def _weight_shape(operation: Any, is_convolution: bool) -> tuple[int, ...]:
    """Return (out, in) of a linear layer, or (out, in, height, width) of a convolution."""
    shape = tuple(int(size) for size in operation.input_value(1).get_shape())
    if is_convolution or operation.get_attributes()["transpose_b"]:
        return shape
    return shape[::-1]


def _with_kernel(down: Array, shape: tuple[int, ...]) -> Array:
    """Return `down` with as many dimensions as the module's weights."""
    return down.reshape(*down.shape, *(1,) * (len(shape) - down.ndim))


def _after_bias(operation: Any) -> Any:
    """Return the addition of the bias if that is all that follows an operation, else the operation itself."""
    readers = list(operation.output(0).get_target_inputs())
    if len(readers) != 1 or readers[0].get_node().get_type_name() != "Add":
        return operation
    addition = readers[0].get_node()
    other = addition.input_value(1 - readers[0].get_index()).get_node()
    while other.get_type_name() in ("Convert", "Reshape") and other.get_input_size():
        other = other.input_value(0).get_node()
    return addition if other.get_type_name() == "Constant" else operation


def _constant(values: Array) -> Any:
    """Return a matrix in half precision, converted in the graph; in float32 where it does not fit."""
    if values.dtype != np.float16 and np.abs(values).max(initial=0) > _FLOAT16_MAX:
        return ops.constant(np.ascontiguousarray(values, f32))
    return ops.convert(ops.constant(np.ascontiguousarray(values, np.float16)), "f32")


def _axes(*axes: int) -> Any:
    return ops.constant(np.array(axes, np.int64))
