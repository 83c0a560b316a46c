"""Make models with the widths of FLUX.2 klein 4B or Z-Image and few blocks, with random weights, without a download.

    ENVIRONMENT/bin/python -m benchmarks.peers.make_transformers FOLDER --family flux2-klein

With all blocks, such a model and its text encoder have 8 to 10 billion parameters: too many for a small machine. Each
model here has the true widths (hidden sizes, heads, MLPs, latent channels, vocabulary) and few blocks. For each kind of
block there is one model with more blocks of that kind, so that `bench_sizes.py` can extrapolate seconds and memory to
the full depth. The text encoder is a kind of its own: it runs once for an edit, so its depth changes the rest of an
edit, ready time and memory, but not the seconds of a step.

Writes FOLDER/NAME-BLOCKS/openvino and .../int8, and FOLDER/NAME-parts. Models that have an equal part share its files
by hard links. Needs the packages of `transformers.txt`; takes up to 10 GB of memory and about 12 GB of disk per family.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import openvino as ov
import torch
from optimum.exporters.openvino.convert import export_models, export_tokenizer, get_diffusion_models_for_export_ext
from optimum.exporters.openvino.utils import save_config
from optimum.intel import OVConfig
from optimum.utils import DEFAULT_DUMMY_SHAPES
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3Model

from benchmarks.peers.compress import compress
from scripts.fixtures.tiny_pipelines import DYNAMIC_SHIFT, qwen_tokenizer

Blocks = Mapping[str, int]  # kind of block to how many of them

SEED = 2
TEXT_WIDTH = 2560  # of Qwen3-4B
TEXT_LAYERS = 36
TEXT_VOCABULARY = 151_936  # size of the embedding table; the tokenizer uses the first few hundred entries
TEXT_WINDOW = 40_960
KLEIN_TEXT_LAYERS = (9, 18, 27)  # whose hidden states are the embedding; engines find them by these numbers
OTHERS = ("vae_encoder", "vae_decoder")
SMALL = "small"  # part of scheduler, tokenizer and model index
EXAMPLE = {"height": 32, "width": 32}  # latents of the calls that are traced: small, because they run
NATIVE = "512x512"  # otherwise 1024x1024, where the warm-up of engine stepwise takes minutes


@dataclass(frozen=True, slots=True)
class Family:
    """How to make the models of a family.

    Attributes:
        name: prefix of the directories.
        full: the blocks of the published model.
        depths: the blocks of the models to make: one more than there are kinds of blocks.
        parts: the exported parts that have blocks, to the kinds in them.
        make: returns the pipeline; of the parts that have blocks, only the one of this name has weights.
    """

    name: str
    full: Blocks
    depths: tuple[Blocks, ...]
    parts: Mapping[str, tuple[str, ...]]
    make: Callable[[Blocks, str], Any]


@contextlib.contextmanager
def _made_if(is_wanted: bool) -> Iterator[None]:
    """Make modules in half precision, which takes half of the memory; without weights unless wanted."""
    torch.manual_seed(SEED)
    torch.set_default_dtype(torch.float16)
    try:
        with contextlib.nullcontext() if is_wanted else torch.device("meta"):
            yield
    finally:
        torch.set_default_dtype(torch.float32)


def _text_encoder(kind: Any, layers: int, wanted: str) -> Any:
    config = Qwen3Config(
        vocab_size=TEXT_VOCABULARY,
        hidden_size=TEXT_WIDTH,
        intermediate_size=9728,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=TEXT_WINDOW,
        rope_parameters={"rope_theta": 1e6, "rope_type": "default"},
        tie_word_embeddings=True,
    )
    with _made_if(wanted == "text_encoder"):
        return kind(config).eval()


def _vae(kind: Any, channels: int, **options: Any) -> Any:
    torch.manual_seed(SEED)
    return kind(
        sample_size=1024,
        latent_channels=channels,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        **options,
    ).eval()


def make_klein(blocks: Blocks, wanted: str) -> Any:
    """Return FLUX.2 klein 4B, distilled, with so many double and single blocks."""
    with _made_if(wanted == "transformer"):
        transformer = diffusers.Flux2Transformer2DModel(
            patch_size=1,
            in_channels=128,
            num_layers=blocks["double"],
            num_single_layers=blocks["single"],
            attention_head_dim=128,
            num_attention_heads=24,
            joint_attention_dim=3 * TEXT_WIDTH,
            timestep_guidance_channels=256,
            mlp_ratio=3.0,
            axes_dims_rope=(32, 32, 32, 32),
            rope_theta=2000,
            guidance_embeds=False,
        ).eval()
    return diffusers.Flux2KleinPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**DYNAMIC_SHIFT),
        vae=_vae(diffusers.AutoencoderKLFlux2, 32),
        text_encoder=_text_encoder(Qwen3ForCausalLM, blocks["text"], wanted),
        tokenizer=qwen_tokenizer()[0],
        transformer=transformer,
        is_distilled=True,
    )


def make_z_image(blocks: Blocks, wanted: str) -> Any:
    """Return Z-Image-Turbo with so many of its main blocks; the four blocks of the refiners stay."""
    with _made_if(wanted == "transformer"):
        transformer = diffusers.ZImageTransformer2DModel(
            all_patch_size=(2,),
            all_f_patch_size=(1,),
            in_channels=16,
            dim=3840,
            n_layers=blocks["main"],
            n_refiner_layers=2,
            n_heads=30,
            n_kv_heads=30,
            norm_eps=1e-5,
            qk_norm=True,
            cap_feat_dim=TEXT_WIDTH,
            rope_theta=256.0,
            t_scale=1000.0,
            axes_dims=[32, 48, 48],
            axes_lens=[1536, 512, 512],
        ).eval()
    vae = _vae(
        diffusers.AutoencoderKL,
        16,
        shift_factor=0.1159,
        scaling_factor=0.3611,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    return diffusers.ZImagePipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=_text_encoder(Qwen3Model, blocks["text"], wanted),
        tokenizer=qwen_tokenizer()[0],
        transformer=transformer,
    )


FAMILIES = {
    "flux2-klein": Family(
        "klein",
        {"double": 5, "single": 20, "text": TEXT_LAYERS},
        (
            {"double": 1, "single": 1, "text": 3},
            {"double": 3, "single": 1, "text": 3},
            {"double": 1, "single": 4, "text": 3},
            {"double": 1, "single": 1, "text": 6},
        ),
        {"transformer": ("double", "single"), "text_encoder": ("text",)},
        make_klein,
    ),
    "z-image": Family(
        "zimage",
        {"main": 30, "text": TEXT_LAYERS},
        ({"main": 1, "text": 2}, {"main": 4, "text": 2}, {"main": 1, "text": 5}),
        {"transformer": ("main",), "text_encoder": ("text",)},
        make_z_image,
    ),
}


def export(pipeline: Any, part: str, directory: Path) -> None:
    """Export one part of a pipeline in half precision.

    optimum's `main_export` would quantise a large one, and write all of them.
    """
    if part == SMALL:
        pipeline.scheduler.save_pretrained(directory / "scheduler")
        pipeline.tokenizer.save_pretrained(directory / "tokenizer")
        export_tokenizer(pipeline.tokenizer, directory / "tokenizer", task="text-to-image")
        pipeline.save_config(directory)
        (directory / "ovserve.json").write_text(json.dumps({"sizes": {"native": NATIVE}}), "utf-8")
        return
    _, found = get_diffusion_models_for_export_ext(pipeline)
    module, config = found[part]
    if hasattr(module, "save_config"):
        module.save_config(directory)
    else:
        save_config(module.config, directory)
    export_models(
        {part: (module, config)},
        output_dir=directory,
        output_names=["openvino_model.xml"],
        input_shapes=DEFAULT_DUMMY_SHAPES | EXAMPLE,
        ov_config=OVConfig(dtype="fp16"),
        stateful=False,
        patch_16bit_model=part not in OTHERS,
        library_name="diffusers",
    )


def rename_hidden_states(path: Path, layers: int) -> None:
    """Name the first hidden states of a short text encoder as those of the layers that FLUX.2 klein uses.

    Raises:
        ValueError: the text encoder has some of these layers, but not all.
    """
    if layers > KLEIN_TEXT_LAYERS[-1]:
        return
    if not len(KLEIN_TEXT_LAYERS) <= layers <= KLEIN_TEXT_LAYERS[0]:
        raise ValueError(f"text is {layers}; it must be 3 to 9, or 28 and more")
    model = ov.Core().read_model(path)
    for index, layer in enumerate(KLEIN_TEXT_LAYERS):
        model.output(f"hidden_states.{index}").get_tensor().set_names({f"hidden_states.{layer}"})
    renamed = path.with_name("renamed.xml")
    ov.save_model(model, renamed, compress_to_fp16=True)
    del model  # it maps the file that is replaced
    renamed.replace(path)
    renamed.with_suffix(".bin").replace(path.with_suffix(".bin"))


def _scratch(path: Path) -> Path:
    """Return the place for an unfinished directory; remove what an interrupted run left there."""
    scratch = path.with_name(f"{path.name}.part")
    shutil.rmtree(scratch, ignore_errors=True)
    return scratch


def make_model(family: Family, blocks: Blocks, folder: Path) -> Path:
    """Make the parts of a model that do not exist yet; return its directory, which has links to them."""
    store = folder / f"{family.name}-parts"
    label = {name: "-".join([name, *(str(blocks[kind]) for kind in kinds)]) for name, kinds in family.parts.items()}
    label |= {name: name for name in (*OTHERS, SMALL)}
    wanted = {name: store / "openvino" / place for name, place in label.items()}
    for name, path in wanted.items():
        if not path.is_dir():
            scratch = _scratch(path)
            export(family.make(blocks, name), name, scratch)
            if name == "text_encoder" and family.name == "klein":
                rename_hidden_states(scratch / "openvino_model.xml", blocks["text"])
            scratch.rename(path)
    made = folder / "-".join([family.name, *(str(count) for count in blocks.values())])
    for weights in ("openvino", "int8"):
        directory = made / weights
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        for name, place in label.items():
            part = store / weights / place
            if not part.is_dir():
                scratch = _scratch(part)
                (shutil.copytree if name == SMALL else compress)(wanted[name], scratch)
                scratch.rename(part)
            target = directory if name == SMALL else directory / name
            shutil.copytree(part, target, copy_function=os.link, dirs_exist_ok=True)
    (made / "blocks.json").write_text(json.dumps({"blocks": blocks, "full": family.full}), "utf-8")
    return made


def parse_blocks(text: str) -> dict[str, int]:
    """Return the blocks that a text such as `double=1,single=2,text=3` means."""
    return {kind: int(count) for kind, _, count in (each.partition("=") for each in text.split(","))}


def main() -> None:
    """Write the models of a family."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder to write to")
    parser.add_argument("--family", choices=FAMILIES, required=True)
    parser.add_argument(
        "--blocks", type=parse_blocks, action="append", metavar="KIND=N,...", help="of one model (all that it needs)"
    )
    options = parser.parse_args()
    family = FAMILIES[options.family]
    for blocks in options.blocks or family.depths:
        if tuple(blocks) != tuple(family.full):
            parser.error(f"--blocks needs {', '.join(family.full)}, in this order")
        print(make_model(family, blocks, options.folder), flush=True)


if __name__ == "__main__":
    main()
