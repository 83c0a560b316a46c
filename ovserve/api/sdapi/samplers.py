"""Names of samplers and schedulers: AUTOMATIC1111's to ours and back.

There, a sampler is the solver and a scheduler the spacing of its noise levels. Here, one name stands for both.
"""

from __future__ import annotations

import re
from typing import Any

from ovserve.errors import InvalidValue, NotFound, Unprocessable
from ovserve.models.families import LCM_SCHEDULER

__all__ = ["SAMPLERS", "resolve_scheduler", "sampler_label", "samplers_document", "schedulers_document", "with_labels"]

# Our scheduler to the sampler's name there, then its aliases.
SAMPLERS: dict[str, tuple[str, ...]] = {
    "dpmpp_2m": ("DPM++ 2M", "k_dpmpp_2m"),
    "euler": ("Euler", "k_euler"),
    "euler_ancestral": ("Euler a", "k_euler_a", "k_euler_ancestral"),
    "ddim": ("DDIM",),
    "pndm": ("PLMS",),
    "unipc": ("UniPC",),
    LCM_SCHEDULER: ("LCM", "k_lcm"),
}
_KARRAS = "dpmpp_2m_karras"
_KARRAS_NAMES = ("DPM++ 2M Karras", "k_dpmpp_2m_ka")  # before schedulers had names of their own
_AUTOMATIC = ("automatic", "")
# Evenly spaced timesteps, as the model's own configuration places them. There, these differ in the first and last step.
_EVEN = ("uniform", "normal", "simple", "ddim", "sgm_uniform")
_KARRAS_SPACING = "karras"
_LABELS = {name: names[0] for name, names in SAMPLERS.items()} | {_KARRAS: "DPM++ 2M Karras"}
# The classes of schedulers in a model's directory.
_CLASSES = {
    "EulerDiscrete": "Euler",
    "EulerAncestralDiscrete": "Euler a",
    "FlowMatchEulerDiscrete": "Euler",
    "DPMSolverMultistep": "DPM++ 2M",
    "UniPCMultistep": "UniPC",
    "DDIM": "DDIM",
    "PNDM": "PLMS",
    "LCM": "LCM",
}


def _plain(name: str) -> str:
    return re.sub(r"[ _-]", "", name.lower())


_BY_NAME = {_plain(name): ours for ours, names in SAMPLERS.items() for name in names}
_PLAIN_EVEN = frozenset(map(_plain, _EVEN))
_BY_NAME |= {_plain(name): _KARRAS for name in _KARRAS_NAMES}


def resolve_scheduler(sampler: str, scheduler: str) -> str:
    """Return our scheduler; "" for the model's own.

    Args:
        sampler: the sampler's name or an alias; case, blanks, `_` and `-` do not count. Empty: the model's own.
        scheduler: automatic, one of the evenly spaced ones, karras, or empty for automatic.

    Raises:
        NotFound: no sampler has this name.
        Unprocessable: the scheduler is unknown, or does not exist with this sampler.
    """
    spacing = _plain(scheduler)
    is_even, is_karras = spacing in _PLAIN_EVEN, spacing == _KARRAS_SPACING
    if not (is_even or is_karras or spacing in _AUTOMATIC):
        choices = ", ".join(("automatic", *_EVEN, _KARRAS_SPACING))
        raise _wrong_scheduler(f"scheduler is {scheduler[:100]!r}; choose one of: {choices}.")
    word = _plain(sampler)
    if word in _AUTOMATIC:
        found = ""
    elif word in _BY_NAME:
        found = _BY_NAME[word]
    else:
        names = ", ".join(names[0] for names in SAMPLERS.values())
        raise NotFound(f"Sampler not found: {sampler[:100]!r}; choose one of: {names}.", param="sampler_name")
    if found == "dpmpp_2m" and not is_even:
        return _KARRAS  # what `automatic` means for this sampler there
    if is_karras and found != _KARRAS:
        chosen = repr(sampler[:100]) if sampler else "left out"
        raise _wrong_scheduler(f"scheduler is 'karras', but sampler_name is {chosen}; only 'DPM++ 2M' has it.")
    return found


def _wrong_scheduler(message: str) -> Unprocessable:
    # Not InvalidValue, in which `scheduler` would be our field of that name: their `sampler_name`.
    return Unprocessable(message, param="scheduler", kind=str(InvalidValue.code))


def sampler_label(scheduler: str, own: str) -> str:
    """Return the name of a sampler as this API writes it; for "" that of the model's own scheduler, a class name."""
    return _LABELS.get(scheduler) or _CLASSES.get(own, own)


def with_labels(message: str) -> str:
    """Return a message of a worker with the names of this API in place of our names of schedulers."""
    ours = sorted(_LABELS, key=len, reverse=True)
    return re.sub(rf"\b({'|'.join(map(re.escape, ours))})\b", lambda match: _LABELS[match[0]], message)


def samplers_document() -> list[dict[str, Any]]:
    """Return the reply of `GET /sdapi/v1/samplers`."""
    return [
        {
            "name": names[0],
            "aliases": list(names[1:]),
            "options": {"scheduler": "karras"} if ours == "dpmpp_2m" else {},
        }
        for ours, names in SAMPLERS.items()
    ]


def schedulers_document() -> list[dict[str, Any]]:
    """Return the reply of `GET /sdapi/v1/schedulers`."""
    return [
        {"name": name, "label": name.capitalize(), "aliases": aliases, "default_rho": rho, "need_inner_model": False}
        for name, aliases, rho in (
            ("automatic", None, -1.0),
            (_EVEN[0], list(_EVEN[1:]), -1.0),
            (_KARRAS_SPACING, None, 7.0),
        )
    ]
