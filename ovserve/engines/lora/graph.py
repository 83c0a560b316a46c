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
from numpy.typing import NDArray
from openvino import opset13 as ops

from ovserve.engines.lora.adapters import Adapter, Pair, quoted_keys
from ovserve.engines.lora.modules import Target, targets
from ovserve.errors import ModelError

__all__ = ["SCALE_INPUT", "Module", "adapt_model", "find_modules"]

SCALE_INPUT = "lora_scale"  # float32 (rows, adapters)

# Names of the operations that torch's linear layers and convolutions become when a model is exported by tracing.
_MODULE = re.compile(
    r"^(?:__module\.)?(?P<path>[^/]+)/aten::(?:linear(?:_\d+)?/MatMul|_?conv\w*/Convolution)(?:_\d+)?$"
)
_FLOAT16_MAX = float(np.finfo(np.float16).max)


@dataclass(slots=True)
class Module:
    """A module of the graph.

    Attributes:
        path: its name in the graph.
        operations: more than one if it is called several times.
        pairs: what adapters add to it, with the number of each adapter.
    """

    path: str
    operations: list[Any]
    pairs: list[tuple[int, Pair]] = field(default_factory=list)


def adapt_model(model: Any, component: str, adapters: Sequence[Adapter]) -> Any | None:
    """Return a copy of a model with the parts of all adapters for a component; None if no adapter has such a part.

    Raises:
        ModelError: an adapter has a module that the model does not have, or of another size; the message names them.
    """
    if not any(adapter.pairs.get(component) for adapter in adapters):
        return None
    adapted = model.clone()
    modules = find_modules(adapted, component, adapters)
    scale = ops.parameter(ov.PartialShape([-1, len(adapters)]), np.float32, name=SCALE_INPUT)
    scale.output(0).get_tensor().set_names({SCALE_INPUT})
    editor = _Editor(scale, len(adapters))
    for module in modules:
        for operation in module.operations:
            editor.add(operation, module)
    adapted.add_parameters([scale])
    adapted.validate_nodes_and_infer_types()
    return adapted


def find_modules(model: Any, component: str, adapters: Sequence[Adapter]) -> list[Module]:
    """Return the modules of a model that adapters change, with their pairs.

    Raises:
        ModelError: an adapter has a module that the model does not have, or of another size; the message names them.
    """
    modules = _modules(model)
    known = _names(modules)
    for number, adapter in enumerate(adapters):
        _assign(adapter, number, component, known)
    found = [module for module in modules if module.pairs]
    for module in found:
        for operation in module.operations:
            _check_sizes(operation, module, adapters)
    return found


def _modules(model: Any) -> list[Module]:
    found: dict[str, Module] = {}
    for operation in model.get_ordered_ops():
        if operation.get_type_name() in ("MatMul", "Convolution"):
            match = _MODULE.match(operation.get_friendly_name())
            if match:
                path = match["path"]
                found.setdefault(path, Module(path, [])).operations.append(operation)
    return list(found.values())


def _names(modules: Sequence[Module]) -> dict[str, Module]:
    """Return the modules by name, with `_` for dots; also without what the paths of all modules begin with.

    An export may have wrapped the model in other modules, whose names then come first.
    """
    known: dict[str, Module] = {}
    split = [module.path.split(".") for module in modules]
    shared = 0
    while split and all(len(parts) > shared + 1 and parts[shared] == split[0][shared] for parts in split):
        shared += 1
    for module, parts in zip(modules, split, strict=True):
        for start in range(shared + 1):
            known["_".join(parts[start:])] = module
    return known


def _assign(adapter: Adapter, number: int, component: str, known: Mapping[str, Module]) -> None:
    """Add an adapter's pairs to the modules that they change. Raises ModelError if one has no module."""
    pairs = adapter.pairs.get(component, {})
    missing = []
    for name, pair in pairs.items():
        target = targets(name, known)
        if target is None:
            missing.append(pair.key)
        else:
            _add_pair(adapter, number, pair, target, known)
    if missing:
        raise ModelError(
            f"{adapter.path}: {len(missing)} of its {len(pairs)} modules are not in this model's {component}; "
            f"is it made for another model? Missing: {quoted_keys(missing)}"
        )


def _add_pair(adapter: Adapter, number: int, pair: Pair, target: Target, known: Mapping[str, Module]) -> None:
    """Add a pair to the modules of its target, each with its rows of `up`. Raises ModelError if they do not fit."""
    modules = [known[name] for name in target.modules]
    sizes = [_weight_shape(module.operations[0])[0] for module in modules]
    up = pair.up
    if len(modules) > 1 and sum(sizes) != len(up):
        raise ModelError(f"{adapter.path}: {pair.key} has {len(up)} rows, but {', '.join(target.modules)} have {sizes}")
    if target.is_swapped:
        up = np.concatenate(np.split(up, 2)[::-1]) if len(up) % 2 == 0 else up
    parts = np.split(up, np.cumsum(sizes)[:-1]) if len(modules) > 1 else [up]
    for module, rows in zip(modules, parts, strict=True):
        if any(other == number for other, _ in module.pairs):
            raise ModelError(f"{adapter.path}: {pair.key} and another module of the file both change {module.path}")
        module.pairs.append((number, Pair(pair.key, pair.down, rows, pair.scale)))


def _check_sizes(operation: Any, module: Module, adapters: Sequence[Adapter]) -> None:
    """Check that the matrices fit an operation. Raises ModelError."""
    is_convolution = operation.get_type_name() == "Convolution"
    shape = _weight_shape(operation)
    outputs, inputs, *kernel = shape
    for number, pair in module.pairs:
        own = list(pair.down.shape[2:])
        is_fitting = pair.up.shape[0] == outputs and pair.down.shape[1] == inputs
        is_fitting &= own == kernel or (is_convolution and not own and all(side == 1 for side in kernel))
        if not is_fitting:
            raise ModelError(
                f"{adapters[number].path}: {pair.key} has the sizes {pair.down.shape} and {pair.up.shape}, but "
                f"{module.path} of this model has {shape}; is it made for another model?"
            )


class _Editor:
    """Adds branches to one graph."""

    def __init__(self, scale: Any, adapters: int) -> None:
        self._scale = scale
        self._adapters = adapters
        self._selected: dict[tuple[tuple[int, int, float], ...], Any] = {}

    def add(self, operation: Any, module: Module) -> None:
        """Add the branch of one operation."""
        is_convolution = operation.get_type_name() == "Convolution"
        shape = _weight_shape(operation)
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

    def _selected_scales(self, pairs: Sequence[tuple[int, Pair]]) -> Any:
        """Return the factor of each row of `down` for each row of the call: (rows, R)."""
        key = tuple((number, pair.rank, pair.scale) for number, pair in pairs)
        if key not in self._selected:
            select = np.zeros((self._adapters, sum(rank for _, rank, _ in key)), np.float32)
            begin = 0
            for number, rank, scale in key:
                select[number, begin : begin + rank] = scale
                begin += rank
            self._selected[key] = ops.matmul(self._scale, ops.constant(select), False, False)
        return self._selected[key]


def _weight_shape(operation: Any) -> tuple[int, ...]:
    """Return (out, in) of a linear layer, or (out, in, height, width) of a convolution."""
    shape = tuple(int(size) for size in operation.input_value(1).get_shape())
    if operation.get_type_name() == "Convolution" or operation.get_attributes()["transpose_b"]:
        return shape
    return shape[::-1]


def _with_kernel(down: NDArray[np.float32], shape: tuple[int, ...]) -> NDArray[np.float32]:
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


def _constant(values: NDArray[np.float32]) -> Any:
    """Return a matrix in half precision, converted in the graph; in float32 where it does not fit."""
    if values.dtype != np.float16 and np.abs(values).max(initial=0) > _FLOAT16_MAX:
        return ops.constant(np.ascontiguousarray(values, np.float32))
    return ops.convert(ops.constant(np.ascontiguousarray(values, np.float16)), "f32")


def _axes(*axes: int) -> Any:
    return ops.constant(np.array(axes, np.int64))
