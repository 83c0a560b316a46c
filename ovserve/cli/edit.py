"""`ovserve edit`: change pictures after a prompt, with a running server."""

from __future__ import annotations

from collections.abc import Sequence

from ovserve.cli.arguments import ArgumentParser, usage_error
from ovserve.cli.pictures import add_options, run_pictures

__all__ = ["run"]

_DESCRIPTION = """Change pictures after a prompt, with a running server. Writes NAME-edited.png beside each picture
unless -o says otherwise. With a mask, only its white or transparent part is repainted."""


def run(arguments: Sequence[str]) -> int:
    """Edit the pictures; return the exit code."""
    parser = ArgumentParser("edit", _DESCRIPTION)
    parser.usage = "ovserve edit PICTURE... -p PROMPT [options]"
    parser.add_argument("pictures", nargs="*", metavar="PICTURE", help="files or glob patterns; -: standard input")
    parser.add_argument("-p", "--prompt", default="", metavar="TEXT", help="what the picture should show")
    parser.add_argument("--strength", default="", metavar="X", help="how much may change, 0 to 1")
    parser.add_argument(
        "--mask", default=None, metavar="FILE", help="picture that is white or transparent where to repaint"
    )
    parser.add_argument("--mask_box", default="", metavar="X,Y,W,H", help="rectangle to repaint, in pixels")
    add_options(parser)
    values = parser.parse(arguments)
    pictures, box = values["pictures"], None
    if not isinstance(pictures, list) or not pictures:
        usage_error("edit: name a picture")
    if not values["prompt"]:
        usage_error("edit: say what the picture should show with -p PROMPT")
    if values["mask"] and values["mask_box"]:
        usage_error("edit: use --mask or --mask_box, not both")
    if values["mask_box"]:
        from ovserve.client.masks import parse_box  # noqa: PLC0415 - loads Pillow

        try:
            box = parse_box(str(values["mask_box"]))
        except ValueError as error:
            usage_error(f"--mask_box {error}")
    fields = {"prompt": str(values["prompt"]), "strength": str(values["strength"])}
    mask = str(values["mask"]) if values["mask"] else None
    return run_pictures("edits", values, fields, inputs=tuple(map(str, pictures)), mask=mask, box=box)
