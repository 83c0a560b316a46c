"""Pull one repository: check it, download its files several at once, convert it if necessary, put it in place.

    listing ──▶ class, memory, space ──▶ lock ──▶ files ──▶ (conversion) ──▶ profile ──▶ directory

Everything before the lock reads only the listing and one small file, so what cannot be served is not downloaded.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from ovserve.errors import HubError, StartupError
from ovserve.hub.client import HubClient
from ovserve.hub.convert import Converter
from ovserve.hub.listing import Listing, RemoteFile
from ovserve.hub.progress import INTERVAL_S, Meter, Reporter, shown_bytes
from ovserve.hub.selection import INDEX, is_openvino, select_adapter, select_model, select_source
from ovserve.hub.stored import Place, PullRecord, is_complete, locked, put_in_place, read_record
from ovserve.hub.transfer import Download, Retries, Stopped, part_size, receive, with_retries
from ovserve.machine import machine_memory_bytes
from ovserve.models.classes import class_named
from ovserve.models.profile import read_profile
from ovserve.models.safetensors import read_header
from ovserve.settings.options import ModelSettings

__all__ = ["PullRequest", "Puller", "find_pulled"]

DEFAULT_FORMAT = "int8"  # of a conversion: on a CPU as fast as fp16, and half its size
# Bytes of a converted model for one byte of fp16 weights, rounded up.
_SIZE_OF = {"fp16": 1.0, "int8": 0.6, "int4": 0.4}
SPACE_MARGIN_BYTES = 64 * 1024 * 1024
# Of a worker beside the weights: the libraries, and the buffers of one picture.
MEMORY_MARGIN_BYTES = 512 * 1024 * 1024
STOP_LIMIT_S = 10.0
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class PullRequest:
    """What to pull.

    Attributes:
        repository: OWNER/NAME.
        root: directory of all pulled repositories.
        revision: branch, tag or commit.
        adapter: the repository holds an adapter: its file, or "" for the only one; None: it holds a model.
        weight_format: of a conversion; "": int8. An OpenVINO export is never converted.
        connections: files that are received at once.
        is_offline: use only what is on disk.
        replaces: replace a directory that was not made by a pull.
        converts: convert a pipeline that is no OpenVINO export; otherwise refuse it.
        checks_memory: refuse a model that does not fit into this machine's memory.
        arguments: further arguments for optimum-cli.
    """

    repository: str
    root: Path
    revision: str = "main"
    adapter: str | None = None
    weight_format: str = ""
    connections: int = 4
    is_offline: bool = False
    replaces: bool = False
    converts: bool = True
    checks_memory: bool = True
    arguments: tuple[str, ...] = ()

    @property
    def directory(self) -> Path:
        """Where the complete files are put."""
        return Place(self.root, self.repository).directory


def find_pulled(root: Path, repository: str, revision: str, weight_format: str = "") -> Path | None:
    """Return the directory of a repository that was pulled completely at this revision, or None."""
    directory = Place(root, repository).directory
    record = read_record(directory)
    if record is None or record.repository != repository or revision not in (record.revision, record.commit):
        return None
    if weight_format and record.weight_format not in ("", weight_format):
        return None
    return directory if is_complete(directory, record) else None


class Puller:
    """Pulls one repository.

    Args:
        client: the hub.
        request: what to pull.
        reporter: gets the progress.
        stop: ends the pull when it is set; what has arrived stays.
        converter: converts pipelines that are no OpenVINO export.
        retries: for requests that fail for a reason that may pass.
        memory_bytes: memory of this machine.
        free_bytes: returns the free space of a directory's file system.
    """

    def __init__(
        self,
        client: HubClient,
        request: PullRequest,
        reporter: Reporter,
        stop: threading.Event,
        *,
        converter: Converter | None = None,
        retries: Retries | None = None,
        memory_bytes: int = 0,
        free_bytes: Callable[[Path], int] | None = None,
    ) -> None:
        self._client = client
        self._request = request
        self._reporter = reporter
        self._stop = stop
        self._converter = converter or Converter(reporter, stop)
        self._retries = retries or Retries()
        self._memory_bytes = memory_bytes or machine_memory_bytes()
        self._free_bytes = free_bytes or _free_bytes
        self._place = Place(request.root, request.repository)

    def run(self) -> Path:
        """Pull the repository; return its directory, or the file of an adapter.

        Raises:
            HubError: it cannot be pulled, or what it holds cannot be served.
            OSError: its directory cannot be written.
            Stopped: the pull was stopped.
        """
        request = self._request
        if request.is_offline:
            return self._from_disk()
        listing = self._retry(lambda: self._client.listing(request.repository, request.revision))
        if request.adapter is not None:
            file = select_adapter(listing, request.adapter)
            self._pull(listing, [file], "")
            return self._place.directory / file.path
        converts = not is_openvino(listing)
        weight_format = (request.weight_format or DEFAULT_FORMAT) if converts else ""
        files = select_source(listing) if converts else select_model(listing)
        self._check_class(listing)
        self._check_memory(files, weight_format)
        if converts and not request.converts:
            raise HubError(
                f"{request.repository} is no OpenVINO export, and a server converts none; convert it before with "
                f"`ovserve pull {request.repository} --model-repository-path {request.root}`"
            )
        if converts:
            self._converter.check()
        elif request.weight_format:
            self._reporter.event("note", f"{request.repository} is an OpenVINO export: --weight-format has no effect")
        self._pull(listing, files, weight_format)
        return self._place.directory

    # --- checks before the download -----------------------------------------------------------------------------------

    def _from_disk(self) -> Path:
        request = self._request
        directory = find_pulled(request.root, request.repository, request.revision, request.weight_format)
        name = request.adapter
        if directory is not None and name is not None:
            record = read_record(directory)
            found = [path for path in (record.files if record else {}) if path == name or not name]
            if len(found) == 1:
                return directory / found[0]
        elif directory is not None:
            return directory
        raise HubError(
            f"{request.repository} at {request.revision} is not completely in {request.root}, and the pull is offline"
        )

    def _check_class(self, listing: Listing) -> None:
        """Raise HubError if the pipeline's class is none that is served."""
        index = self._retry(lambda: self._client.document(listing, INDEX))
        name = index.get("_class_name") if isinstance(index, dict) else None
        try:
            class_named(str(name)[:200], Path(listing.repository))
        except StartupError as error:
            raise HubError(str(error)) from None

    def _check_memory(self, files: Sequence[RemoteFile], weight_format: str) -> None:
        """Raise HubError if the model, or its conversion, needs more memory than this machine has."""
        weights = sum(file.size for file in files if file.path.endswith((".bin", ".safetensors")))
        # The conversion holds the PyTorch weights, and one component of the result beside them.
        needed = weights + MEMORY_MARGIN_BYTES if not weight_format else 2 * weights + MEMORY_MARGIN_BYTES
        if self._request.checks_memory and needed > self._memory_bytes:
            what = "converting it" if weight_format else "serving it"
            raise HubError(
                f"{self._request.repository} has {shown_bytes(weights)} of weights; {what} needs about "
                f"{shown_bytes(needed)} of memory, this machine has {shown_bytes(self._memory_bytes)}; choose a "
                "smaller model, or skip this check with --no-memory-check"
            )

    def _check_space(self, files: Sequence[RemoteFile], weight_format: str, present: int) -> None:
        missing = sum(file.size for file in files) - present
        if weight_format:
            missing += int(_SIZE_OF[weight_format] * sum(file.size for file in files))
        free = self._free_bytes(self._place.staging)
        if missing + SPACE_MARGIN_BYTES > free:
            raise HubError(
                f"{self._request.repository} needs {shown_bytes(missing + SPACE_MARGIN_BYTES)} more in "
                f"{self._request.root}, where {shown_bytes(free)} are free",
                is_transient=True,
            )

    # --- files --------------------------------------------------------------------------------------------------------

    def _pull(self, listing: Listing, files: list[RemoteFile], weight_format: str) -> None:
        """Bring the files of the listing to their place. Adapters that are there already stay."""
        place = self._place
        sizes = {file.path: file.size for file in files}
        record = PullRecord(listing.repository, self._request.revision, listing.commit, weight_format, sizes)
        with locked(place, self._stop, self._note_wait):
            existing = read_record(place.directory)
            if existing is None and place.directory.exists() and not self._request.replaces:
                raise HubError(
                    f"{place.directory} exists and was not made by a pull; remove it, or replace it with "
                    "--overwrite-models"
                )
            if existing and self._is_current(existing, record):
                self._reporter.event("done", f"{place.directory} is complete", path=str(place.directory))
                return
            if existing and self._request.adapter is not None:
                record.files.update({**existing.files, **sizes})
            if existing and not weight_format and not existing.weight_format:
                self._link_existing(existing, record)
            self._download(listing, files, weight_format, set(record.files))
            source = place.staging
            if weight_format:
                source, record = self._convert(record)
            if self._request.adapter is None:
                self._check_profile(source)
            else:
                for file in files:
                    self._check_adapter(source / file.path)
            put_in_place(source, place, record)
            shutil.rmtree(place.staging, ignore_errors=True)
        self._reporter.event(
            "done",
            f"pulled {listing.repository} at {listing.commit[:12]} to {place.directory}",
            path=str(place.directory),
            commit=listing.commit,
        )

    def _is_current(self, existing: PullRecord, wanted: PullRecord) -> bool:
        same = (existing.repository, existing.commit, existing.weight_format)
        if same != (wanted.repository, wanted.commit, wanted.weight_format):
            return False
        if not wanted.weight_format and not wanted.files.items() <= existing.files.items():
            return False
        return is_complete(self._place.directory, existing)

    def _note_wait(self) -> None:
        name = self._request.repository
        self._reporter.event("wait", f"another pull of {name} is running; waiting for it", repository=name)

    def _link_existing(self, existing: PullRecord, wanted: PullRecord) -> None:
        """Use files of the commit that is in place; their sums are checked like those of parts."""
        for path, size in wanted.files.items():
            if existing.files.get(path) != size:
                continue
            target = self._place.staging / path
            with contextlib.suppress(OSError):
                target.parent.mkdir(parents=True, exist_ok=True)
                os.link(self._place.directory / path, target, follow_symlinks=False)

    def _download(self, listing: Listing, files: list[RemoteFile], weight_format: str, kept: set[str]) -> None:
        """Receive all files into the staging directory, where only these and those `kept` stay.

        Raises HubError, OSError and Stopped.
        """
        staging = self._place.staging
        staging.mkdir(parents=True, exist_ok=True)
        _remove_others(staging, kept)
        present = sum(part_size(staging, file) for file in files)
        total = sum(file.size for file in files)
        self._check_space(files, weight_format, present)
        kind = "OpenVINO export" if not weight_format else "to be converted"
        self._reporter.event(
            "plan",
            f"{listing.repository} at {listing.commit[:12]}: {len(files)} files, {shown_bytes(total)}"
            f"{f', {shown_bytes(present)} of them here' if present else ''} ({kind})",
            repository=listing.repository, commit=listing.commit, files=len(files), total_bytes=total,
            done_bytes=present,
        )  # fmt: skip
        meter = Meter(total, present)
        abort = threading.Event()  # stops the other transfers when one fails
        download = Download(self._client, listing, meter, self._retries, abort)
        root = os.open(staging, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        pool = ThreadPoolExecutor(self._request.connections, thread_name_prefix="pull")
        try:
            transfers = [pool.submit(receive, download, file, root) for file in files]
            self._await(transfers, meter, abort)
        finally:
            abort.set()
            pool.shutdown(wait=True, cancel_futures=True)
            os.close(root)

    def _await(self, transfers: list[Future[None]], meter: Meter, abort: threading.Event) -> None:
        """Report progress until all transfers are done; raise the error of the first one that fails."""
        waiting = set(transfers)
        try:
            while waiting:
                done, waiting = wait(waiting, timeout=INTERVAL_S)
                self._reporter.progress(meter.snapshot())
                if self._stop.is_set():
                    raise Stopped
                for transfer in done:
                    transfer.result()
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise HubError(
                    f"{self._request.root}: {error.strerror}; make space and run the pull again, it continues",
                    is_transient=True,
                ) from None
            raise
        finally:
            if waiting:
                abort.set()
                self._client.stop()
                wait(waiting, timeout=STOP_LIMIT_S)

    # --- after the download -------------------------------------------------------------------------------------------

    def _convert(self, record: PullRecord) -> tuple[Path, PullRecord]:
        """Convert what was downloaded; return the result and its record."""
        place = self._place
        shutil.rmtree(place.converted, ignore_errors=True)
        log = place.directory.with_name(f"{place.directory.name}.convert.log")
        log.unlink(missing_ok=True)
        self._converter.convert(place.staging, place.converted, record.weight_format, self._request.arguments, log)
        log.unlink(missing_ok=True)
        sizes = {
            str(path.relative_to(place.converted)): path.stat().st_size
            for path in place.converted.rglob("*")
            if path.is_file() and not path.is_symlink()
        }
        made = PullRecord(record.repository, record.revision, record.commit, record.weight_format, sizes)
        return place.converted, made

    def _check_profile(self, directory: Path) -> None:
        """Raise HubError if a server could not serve the directory."""
        try:
            read_profile(ModelSettings(name="pulled", path=directory))
        except StartupError as error:
            message = str(error).replace(str(directory), self._request.repository)
            raise HubError(f"{self._request.repository} cannot be served: {message}") from None

    def _check_adapter(self, path: Path) -> None:
        """Raise HubError if the file is no valid safetensors file; it is removed."""
        try:
            read_header(path)
        except StartupError as error:
            path.unlink(missing_ok=True)
            raise HubError(f"{self._request.repository}: {error}") from None

    def _retry(self, attempt: Callable[[], _T]) -> _T:
        return with_retries(attempt, self._retries, self._stop, lambda: 0)


def _free_bytes(directory: Path) -> int:
    return shutil.disk_usage(directory).free


def _remove_others(staging: Path, paths: set[str]) -> None:
    """Remove from a staging directory what does not belong to these files: those of an earlier listing."""
    for folder, folders, names in os.walk(staging):
        folders[:] = [name for name in folders if not (Path(folder) / name).is_symlink()]
        for name in names:
            path = Path(folder) / name
            relative = str(path.relative_to(staging))
            if relative.removesuffix(".part").removesuffix(".etag") not in paths:
                path.unlink(missing_ok=True)
