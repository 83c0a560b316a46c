"""The compiled models of one directory: text encoders, UNet, VAE encoder and decoder.

Every infer request belongs to one slot. A slot runs one call at a time: on a CPU in its own stream with a fixed number
of threads. The number does not depend on the load, because another number of threads changes the last bits of a result
(measured); another batch does not.

Each slot has its own compiled models with one stream each. One compiled model with several streams would hold the
weights once, but the CPU plugin (2026.4.1) then packs them in all streams at the same time, with a race: of ten
compilations of the built-in model with NUM_STREAMS=2 on a busy machine, one gave other bits than the rest, and
occasionally one gave noise instead of pictures. With one stream every compilation gives the same bits, which are those
of the library's own pipelines.
"""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
from numpy.typing import NDArray
from openvino import opset13 as ops
from openvino.preprocess import PrePostProcessor

from ovserve.engines.schedulers.noise import Array
from ovserve.errors import ModelError
from ovserve.models.profile import ModelProfile
from ovserve.settings.options import ModelSettings

__all__ = ["Components", "Layout", "Requests", "component_config"]

log = logging.getLogger(__name__)

# Larger models are compiled again, because an export is held in memory together with the compiled model.
EXPORT_LIMIT_BYTES = 256 * 1024 * 1024

UNET_INPUTS = frozenset({"sample", "timestep", "encoder_hidden_states", "timestep_cond", "text_embeds", "time_ids"})


@dataclass(frozen=True, slots=True)
class Layout:
    """How a device is divided: `streams` calls side by side, each on `threads` CPU threads (0: the plugin's choice)."""

    streams: int = 1
    threads: int = 0


@dataclass(slots=True)
class Requests:
    """The infer requests of one slot. Used by one thread at a time."""

    unet: Any
    text_encoders: tuple[Any, ...]
    vae_encoder: Any
    vae_decoder: Any


@dataclass(frozen=True, slots=True)
class VaeConfig:
    """vae_decoder/config.json as the library reads it."""

    latent_channels: int
    scaling_factor: np.float32
    shift_factor: np.float32
    scale: int  # side of a latent cell in pixels
    samples: bool = True  # the encoder returns mean and log-variance, not latents


class Feeds:
    """UNet inputs of the native size for measuring, filled with the same noise each time; `types` by input name."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], types: dict[str, Any]) -> None:
        self._shapes = shapes
        self.types = types

    def of(self, rows: int, *, timestep_per_row: bool = True) -> dict[str, NDArray[Any]]:
        """Return inputs with `rows` rows; row i is the same for every value of `rows`.

        Args:
            rows: number of rows.
            timestep_per_row: give each row a different timestep, instead of all rows that of the first.
        """
        feed = {name: np.concatenate([self._row(name, index) for index in range(rows)]) for name in self._shapes}
        return feed if timestep_per_row else feed | {"timestep": self._row("timestep", 0)}

    def second(self, *, timestep_per_row: bool = True) -> dict[str, NDArray[Any]]:
        """Return the second row of `of(2)` alone."""
        feed = {name: self._row(name, 1) for name in self._shapes}
        return feed if timestep_per_row else feed | {"timestep": self._row("timestep", 0)}

    def quarter(self) -> tuple[Feeds, int]:
        """Return feeds of half the width and height, and the ratio of the areas, 4.

        If the UNet could not halve such sides often enough, return these feeds and 1.
        """
        channels, height, width = self._shapes["sample"]
        if height % 16 or width % 16:
            return self, 1
        return Feeds(self._shapes | {"sample": (channels, height // 2, width // 2)}, self.types), 4

    def _row(self, name: str, index: int) -> NDArray[Any]:
        if name == "timestep":
            # Timesteps differ between rows: a row compared with itself alone then shows whether the graph uses them.
            return np.array([(500 + 137 * index) % 1000], self.types[name])
        noise: Array = np.random.default_rng((index, len(name))).standard_normal((1, *self._shapes[name]), np.float32)
        return noise.astype(self.types[name])


def component_config(directory: Path) -> dict[str, Any]:
    """Read the JSON object in `directory`/config.json.

    Raises:
        ModelError: the file cannot be read or holds no JSON object.
    """
    path = directory / "config.json"
    try:
        document = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read: {error}") from None
    if not isinstance(document, dict):
        raise ModelError(f"{path} does not hold a JSON object")
    return document


def _number(document: Mapping[str, Any], key: str, default: float) -> float:
    value = document.get(key)
    return default if value is None else float(value)


@dataclass
class Components:
    """The models of one directory. Call `read` once, then `compile` for a layout; again for another layout.

    Attributes:
        inputs: names of the UNet's inputs.
        time_cond_dim: length of LCM's guidance embedding (arXiv:2310.04378, section 4.2); 0 for other models.
        timestep_per_row: whether rows of one call may be at different timesteps.
        feeds: inputs for measuring the UNet.
    """

    profile: ModelProfile
    settings: ModelSettings
    core: Any = field(default_factory=ov.Core)
    inputs: frozenset[str] = frozenset()
    in_channels: int = 4
    time_cond_dim: int = 0
    timestep_per_row: bool = True
    vae: VaeConfig = VaeConfig(4, np.float32(1), np.float32(0), 8)
    requests: list[Requests] = field(default_factory=list)
    feeds: Feeds = field(init=False)
    _unets: dict[Layout, list[Any]] = field(default_factory=dict)

    def read(self) -> None:
        """Read every model and check that the engine can drive it.

        Raises:
            ModelError: a file cannot be read, or a model has unsupported inputs or outputs.
        """
        directory = self.profile.directory
        self._devices = _devices(self.settings)
        self._models = {name: self._read(name) for name in self._names()}
        config = component_config(directory / "unet")
        self.in_channels = int(_number(config, "in_channels", 4))
        self.time_cond_dim = max(0, int(_number(config, "time_cond_proj_dim", 0)))
        self._read_vae()
        self._read_unet()
        self.feeds = self._feeds()
        self._models["vae_decoder"] = self._with_uint8_output(self._models["vae_decoder"])

    def _names(self) -> list[str]:
        encoders = ["text_encoder", "text_encoder_2"][: self.profile.text_encoders]
        vae = ["vae_encoder", "vae_decoder"] if (self.profile.directory / "vae_encoder").is_dir() else ["vae_decoder"]
        return [*encoders, "unet", *vae]

    def _read(self, name: str) -> Any:
        path = self.profile.directory / name / "openvino_model.xml"
        try:
            return self.core.read_model(path)
        except RuntimeError as error:
            raise ModelError(f"{path} cannot be read: {_reason(error)}") from None

    def _read_vae(self) -> None:
        config = component_config(self.profile.directory / "vae_decoder")
        encoder = self._models.get("vae_encoder")
        names = encoder.output(0).get_names() if encoder else {"latent_parameters"}
        if not names & {"latent_sample", "latent_parameters"}:
            raise ModelError(f"vae_encoder: output is {sorted(names)}; expected latent_sample or latent_parameters")
        self.vae = VaeConfig(
            latent_channels=int(_number(config, "latent_channels", 4)),
            scaling_factor=np.float32(_number(config, "scaling_factor", 1.0)),
            shift_factor=np.float32(_number(config, "shift_factor", 0.0)),
            scale=2 ** (len(config.get("block_out_channels") or [64]) - 1),
            samples="latent_sample" not in names,
        )
        if self.in_channels not in (self.vae.latent_channels, 2 * self.vae.latent_channels + 1):
            plain, masked = self.vae.latent_channels, 2 * self.vae.latent_channels + 1
            raise ModelError(f"unet: in_channels is {self.in_channels}; expected {plain}, or {masked} for inpainting")

    def _read_unet(self) -> None:
        unet = self._models["unet"]
        self.inputs = frozenset(name for port in unet.inputs for name in port.get_names() & UNET_INPUTS)
        if len(self.inputs) < len(unet.inputs) or not {"sample", "timestep", "encoder_hidden_states"} <= self.inputs:
            raise ModelError(
                f"unet: inputs are {sorted(str(port.get_names()) for port in unet.inputs)}; "
                f"expected sample, timestep, encoder_hidden_states and only {', '.join(sorted(UNET_INPUTS))}"
            )
        if unet.input("sample").get_partial_shape()[0].is_static:
            raise ModelError(
                "unet: shapes are static, so rows cannot join a call; export dynamic shapes or set engine to genai"
            )
        shape = unet.input("timestep").get_partial_shape()
        if shape.is_static:
            self.timestep_per_row = self._reshape_timestep(unet)

    def _reshape_timestep(self, unet: Any) -> bool:
        """Give `timestep` one value for each row, where the export has one for all; return whether the graph allows it.

        Most graphs do.
        """
        shape = unet.input("timestep").get_partial_shape()
        try:
            unet.reshape({"timestep": ov.PartialShape([-1])})
        except RuntimeError:
            unet.reshape({"timestep": shape})
            log.info("the UNet takes one timestep for all rows; only rows at the same timestep share a call")
            return False
        return True

    def _with_uint8_output(self, decoder: Any) -> Any:
        """Return the decoder with the library's pre- and postprocessing: scaled latents in, uint8 (N, H, W, 3) out."""
        process = PrePostProcessor(decoder)
        if self.vae.scaling_factor != 1:
            process.input().preprocess().scale(float(self.vae.scaling_factor))
        if self.vae.shift_factor != 0:
            process.input().preprocess().mean(-float(self.vae.shift_factor))

        def to_levels(port: Any) -> Any:
            half = ops.constant(np.array([0.5], np.float32))
            full = ops.constant(np.array([255.0], np.float32))
            unit = ops.clamp(ops.add(ops.multiply(port, half), half), 0.0, 1.0)
            return ops.multiply(unit, full).output(0)

        process.output().postprocess().custom(to_levels)
        process.output().postprocess().convert_element_type(ov.Type.u8)
        process.output().model().set_layout(ov.Layout("NCHW"))
        process.output().tensor().set_layout(ov.Layout("NHWC"))
        return process.build()

    # --- for measuring ---

    @property
    def denoiser_device(self) -> str:
        """Device of the UNet."""
        return self._devices[1]

    @property
    def unet_bytes(self) -> int:
        """Size of the UNet's weights file."""
        return (self.profile.directory / "unet" / "openvino_model.bin").stat().st_size

    def cpu_threads(self) -> int:
        """Return the threads that the plugin uses for one stream: the cores this process may use."""
        parameter = ops.parameter(ov.PartialShape([1]), np.float32)
        probe = ov.Model([ops.result(ops.abs(parameter))], [parameter])
        compiled = self.core.compile_model(probe, "CPU", {"NUM_STREAMS": 1})
        return max(1, int(compiled.get_property("INFERENCE_NUM_THREADS")))

    def _feeds(self) -> Feeds:
        unet, size, scale = self._models["unet"], self.profile.native, self.vae.scale
        shapes: dict[str, tuple[int, ...]] = {}
        for name in self.inputs:
            dimensions = list(unet.input(name).get_partial_shape())[1:]
            shapes[name] = tuple(d.get_length() if d.is_static else 0 for d in dimensions)
        shapes["sample"] = (self.in_channels, size.height // scale, size.width // scale)
        shapes["encoder_hidden_states"] = (self.profile.prompt_tokens, shapes["encoder_hidden_states"][-1])
        return Feeds(shapes, {name: unet.input(name).get_element_type().to_dtype() for name in self.inputs})

    # --- compiling ---

    def compile_unet(self, layout: Layout) -> list[Any]:
        """Compile only the UNet, for measuring, and return an infer request for each slot. `compile` reuses them."""
        compiled = self._compile("unet", layout)
        copies = [self._compile_copy(compiled, layout) for _ in range(1, layout.streams)]
        self._unets[layout] = [each.create_infer_request() for each in (compiled, *copies)]
        return self._unets[layout]

    def measured_unets(self, layout: Layout) -> list[Any]:
        """Return the infer requests that `compile_unet` made for this layout."""
        return self._unets[layout]

    def compile(self, layout: Layout, beat: Callable[[str], None]) -> None:
        """Compile all models for this layout; `requests` then has one entry for each slot.

        Raises:
            ModelError: a device cannot compile a model.
        """
        self.requests = []
        unets = self._unets[layout] if layout in self._unets else self.compile_unet(layout)
        self._unets = {}
        beat("load")
        for slot in range(layout.streams):
            made = {}
            for name in self._models:
                if name == "unet":
                    made[name] = unets[slot]
                else:
                    made[name] = self._compile(name, layout).create_infer_request()
                beat("load")
            self.requests.append(
                Requests(
                    unet=made["unet"],
                    text_encoders=tuple(request for name, request in made.items() if name.startswith("text_encoder")),
                    vae_encoder=made.get("vae_encoder"),
                    vae_decoder=made["vae_decoder"],
                )
            )

    def release_sources(self) -> None:
        """Free the uncompiled models; `compile` cannot be called again."""
        self._models.clear()

    def _compile(self, name: str, layout: Layout) -> Any:
        device = self._devices[0 if name.startswith("text") else 1 if name == "unet" else 2]
        try:
            return self.core.compile_model(self._models[name], device, self._properties(name, device, layout))
        except RuntimeError as error:
            raise ModelError(f"{name} cannot be compiled for {device}: {_reason(error)}") from None

    def _compile_copy(self, compiled: Any, layout: Layout) -> Any:
        """Compile the UNet once more. Importing an export of the first is four times as fast, with the same bits."""
        device = self._devices[1]
        if not device.startswith("CPU") or self.settings.cache_dir or self.unet_bytes > EXPORT_LIMIT_BYTES:
            return self._compile("unet", layout)
        exported = io.BytesIO()
        compiled.export_model(exported)
        exported.seek(0)
        return self.core.import_model(exported, device, self._properties("unet", device, layout))

    def _properties(self, name: str, device: str, layout: Layout) -> dict[str, Any]:
        properties: dict[str, Any] = json.loads(self.settings.plugin_config) if self.settings.plugin_config else {}
        if self.settings.cache_dir:
            properties["CACHE_DIR"] = str(self.settings.cache_dir)
        if device.startswith("CPU"):
            properties["NUM_STREAMS"] = 1
            if layout.threads:
                properties["INFERENCE_NUM_THREADS"] = layout.threads
            # Pinned threads of two slots, or of two workers, would share cores while other cores are idle.
            properties.setdefault("ENABLE_CPU_PINNING", False)
        overflows = self.profile.family == "sdxl" and name.startswith("vae") and "GPU" in device
        if overflows and not self._models[name].has_rt_info(["runtime_options", "ACTIVATIONS_SCALE_FACTOR"]):
            # As in the library: SDXL's VAE overflows float16 unless the export has a scale for its activations.
            properties.setdefault("INFERENCE_PRECISION_HINT", "f32")
        return properties


def _devices(settings: ModelSettings) -> tuple[str, str, str]:
    names = settings.device.split()
    text, denoiser, vae = names if len(names) == 3 else names * 3
    if any("NPU" in name for name in (text, denoiser, vae)):
        raise ModelError(
            f"device is {settings.device!r}: an NPU requires static shapes, so rows cannot join a call; "
            "set engine to genai"
        )
    return text, denoiser, vae


def _reason(error: RuntimeError) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else "unknown error"


# --- running, in a slot ---


def run_unet(request: Any, feed: Mapping[str, NDArray[Any]]) -> Array:
    """Run the UNet and return a copy of its output: float32 (rows, C, H/8, W/8).

    Raises:
        RuntimeError: the call failed, or the UNet cannot work at this size.
    """
    request.infer(dict(feed), share_inputs=True)
    found = np.array(request.get_output_tensor(0).data)
    rows, _, height, width = feed["sample"].shape
    if (len(found), *found.shape[2:]) != (rows, height, width):
        # The UNet cannot halve these sides often enough. The plugin then silently keeps the output of the call before.
        raise RuntimeError(f"the UNet cannot work on {height} x {width} latents")
    return found


def run_decoder(request: Any, latents: Array) -> NDArray[np.uint8]:
    """Decode latents (1, C, h, w); return a copy of the pixels, uint8 (H, W, 3)."""
    request.infer({0: np.ascontiguousarray(latents)}, share_inputs=True)
    return np.array(request.get_output_tensor(0).data[0])


def run_encoder(request: Any, image: Array) -> Array:
    """Encode an image float32 (1, 3, H, W), -1..1; return a copy of the VAE encoder's output."""
    request.infer({0: image}, share_inputs=True)
    return np.array(request.get_output_tensor(0).data)


def normalised_levels(core: Any) -> Array:
    """Return the model input for each of the 256 pixel levels: float32 (256,), -1..1.

    Computed by the same graph as in the library's image processor. A division in numpy differs in the last bit, which
    bfloat16 amplifies to a difference of up to fourteen levels.
    """
    parameter = ops.parameter(ov.PartialShape([-1, -1, -1, -1]), np.float32)
    process = PrePostProcessor(ov.Model([ops.result(parameter)], [parameter]))
    process.input().tensor().set_layout(ov.Layout("NHWC")).set_element_type(ov.Type.u8)
    process.input().model().set_layout(ov.Layout("NCHW"))
    process.input().preprocess().convert_layout(ov.Layout("NCHW")).convert_element_type(ov.Type.f32).scale(127.5).mean(
        1.0
    )
    request = core.compile_model(process.build(), "CPU").create_infer_request()
    levels = np.repeat(np.arange(256, dtype=np.uint8)[None, :, None, None], 3, axis=3)
    request.infer({0: levels}, share_inputs=True)
    return np.array(request.get_output_tensor(0).data[0, 0, :, 0])
