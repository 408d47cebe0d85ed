"""Fetches checkpoints from the Hugging Face hub, into the hub's own cache.

huggingface_hub does the download, so that its cache and its settings apply: HF_HOME, HF_TOKEN,
HF_ENDPOINT, HF_HUB_OFFLINE and the rest. A connection that is cut resumes where it was, and files
that are complete are never fetched again. A file of which a stopped run had a part begins anew:
that is the library's doing (2.4), and why few files are fetched at a time here.

What is added: only the files that loading needs, an answer within seconds where there is no hub,
Ctrl-C that does not wait for files of gigabytes, and errors in one line.
"""

from __future__ import annotations

import contextlib
import glob
import re
import shutil
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from models.errors import DownloadError
from models.hub_errors import INSTEAD, HubErrors
from models.messages import listed, tell
from models.safetensors_folder import INDEX, SHARD_NAME, SINGLE, SUFFIX

REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w.-]+(@[\w./-]+)?", re.ASCII)
SMALL_SUFFIXES = (".json", ".jinja")
SMALL_NAMES = ("tokenizer.model",)
SECONDS_BEYOND_TIMEOUT = 5.0
FILES_AT_A_TIME = 2

Result = TypeVar("Result")


def fetch_repository(name: str) -> Path:
    """Folder of the checkpoint `name`, "org/name" or "org/name@revision", downloaded when needed.

    Only weights in safetensors and what belongs to them are fetched, never pickles. When the hub
    cannot be reached and the cache has all of the checkpoint, that is used, and a line on stderr
    says so. Progress goes to stderr when that is a terminal.

    Raises DownloadError, in one line, when the checkpoint cannot be had.
    """
    try:
        import huggingface_hub
        import huggingface_hub.constants
        import huggingface_hub.errors
        import huggingface_hub.utils
    except ImportError as error:
        raise DownloadError(
            f"fetching {name} needs the package huggingface_hub; install it with "
            f"pip install 'jax_chunkattn[experiments]', or {INSTEAD}"
        ) from error
    repository, _, revision = name.partition("@")
    return _Fetch(huggingface_hub, repository, revision or None).run()


def is_repository_name(name: str) -> bool:
    """Whether `name` can be a repository's: "org/name" or "org/name@revision", and no file's."""
    return bool(REPOSITORY.fullmatch(name)) and not name.endswith((".gguf", SUFFIX))


def files_to_fetch(names: Sequence[str]) -> list[str]:
    """Those of a repository's files that loading needs; none of them is in a subfolder.

    Raises ValueError, which says what is there, when there are no weights in safetensors or it is
    not clear which are the model's.
    """
    names = [name for name in names if "/" not in name]
    small = [name for name in names if name.endswith(SMALL_SUFFIXES) or name in SMALL_NAMES]
    weights = [name for name in names if name.endswith(SUFFIX)]
    if SINGLE in weights:
        return [*small, SINGLE]
    if INDEX in names:
        return [*small, *(name for name in weights if SHARD_NAME.search(name))]
    if len(weights) == 1:
        return [*small, *weights]
    if weights:
        raise ValueError(f"several weights and no {INDEX}: {listed(weights)}")
    others = [name for name in names if name not in small]
    raise ValueError(f"no weights in safetensors; it has {listed(others) or 'none at all'}")


class _Fetch:
    """One call of `fetch_repository`; `hub` is the package huggingface_hub."""

    def __init__(self, hub: Any, repository: str, revision: str | None) -> None:
        self.hub = hub
        self.repository = repository
        self.revision = revision
        self.cache = Path(hub.constants.HF_HUB_CACHE)
        self.endpoint = hub.constants.ENDPOINT
        self.errors = HubErrors(hub, repository, revision, self.endpoint, self.cache)
        self.name = self.errors.name

    def run(self) -> Path:
        with _quiet(self.hub):
            timeout = self.hub.constants.HF_HUB_ETAG_TIMEOUT
            try:
                info = _within(timeout + SECONDS_BEYOND_TIMEOUT, lambda: self._ask(timeout))
            except Exception as error:
                if not self.errors.is_unreachable(error):
                    raise self.errors.explained(error) from error
                return self._from_cache(error)
            sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
            try:
                wanted = files_to_fetch(list(sizes))
            except ValueError as error:
                raise DownloadError(
                    f"{self.name} on {self.endpoint} has {error}; {INSTEAD}"
                ) from None
            lacking = self._lacking(wanted, info.sha)
            self._check_disk({name: sizes[name] for name in lacking})
            try:
                return self._download(wanted, sum(sizes[name] for name in lacking))
            except Exception as error:
                raise self.errors.explained(error) from error

    def _ask(self, timeout: float) -> Any:
        return self.hub.HfApi().model_info(
            self.repository, revision=self.revision, files_metadata=True, timeout=timeout
        )

    def _lacking(self, names: Sequence[str], commit: str) -> list[str]:
        """Those of the files that the cache does not have."""
        at = {"repo_id": self.repository, "revision": commit}
        return [
            name
            for name in names
            if not isinstance(self.hub.try_to_load_from_cache(filename=name, **at), str)
        ]

    def _check_disk(self, sizes: Mapping[str, int]) -> None:
        """Refuse a download that the disk has no room for, and report its size."""
        if not sizes:
            return
        needed = sum(sizes.values())
        existing = next(folder for folder in (self.cache, *self.cache.parents) if folder.exists())
        free = shutil.disk_usage(existing).free
        if needed > free:
            raise DownloadError(
                f"{self.name} needs {_bytes(needed)} more, and {self.cache} has {_bytes(free)} "
                "free; choose another disk with HF_HOME"
            )
        tell(
            f"Fetching {self.name} from {self.endpoint}: {len(sizes)} files, {_bytes(needed)}, "
            f"into {self.cache}"
        )

    def _download(self, wanted: Sequence[str], needed: int) -> Path:
        with _progress(self.hub, needed) as bar_class:
            folder = _within(
                None,
                lambda: self.hub.snapshot_download(
                    self.repository,
                    revision=self.revision,
                    allow_patterns=[glob.escape(name) for name in wanted],
                    max_workers=FILES_AT_A_TIME,
                    tqdm_class=bar_class,
                ),
            )
        return Path(folder)

    def _from_cache(self, why: Exception) -> Path:
        """The checkpoint as it was last downloaded, if all of it was."""
        try:
            files = self.hub.get_cached_repo_tree(self.repository, revision=self.revision)
            wanted = files_to_fetch([file.path for file in files])
            folder = self.hub.snapshot_download(
                self.repository,
                revision=self.revision,
                allow_patterns=[glob.escape(name) for name in wanted],
                local_files_only=True,
            )
        except self.hub.errors.IncompleteSnapshotError:
            raise self.errors.unreachable(why, "only a part of it is cached") from why
        except (
            ValueError,
            self.hub.errors.CachedRepoTreeNotFoundError,
            self.hub.errors.LocalEntryNotFoundError,
        ):
            raise self.errors.unreachable(why, "it is not cached") from why
        tell(f"{self.name}: {self.errors.reason(why)}; using the copy in {folder}")
        return Path(folder)


@contextlib.contextmanager
def _progress(hub: Any, total: int) -> Iterator[type]:
    """Shows bytes on stderr where that is a terminal; yields the bar class to give the library.

    Its own bars are never shown. They are what its threads call for each piece of a file, so they
    are where those are stopped when the context is left by an exception: an interrupt reaches the
    main thread only.
    """
    import tqdm
    from huggingface_hub.utils._xet import abort_xet_session  # as the library does on Ctrl-C

    stop = threading.Event()
    hidden = not sys.stderr.isatty() or hub.utils.are_progress_bars_disabled()
    shown = tqdm.tqdm(total=total, unit="B", unit_scale=True, leave=False, disable=hidden)

    class Bar(hub.utils.tqdm):
        def __init__(self, *arguments: Any, **settings: Any) -> None:
            self.counts_bytes = settings.get("name") == "huggingface_hub.snapshot_download"
            super().__init__(*arguments, **settings | {"disable": True})

        def update(self, n: float | None = 1) -> None:
            if stop.is_set():
                raise InterruptedError("stopped")
            if self.counts_bytes:
                shown.update(n)

    try:
        yield Bar
    except BaseException:
        stop.set()
        abort_xet_session()
        raise
    finally:
        shown.close()


def _within(seconds: float | None, call: Callable[[], Result]) -> Result:
    """The result of `call`, made in another thread; TimeoutError after `seconds`.

    Timeouts of sockets do not bound looking up a name, nor trying one address after another.
    """
    results: list[Result] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(call())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not results:
        raise TimeoutError(f"no answer in {seconds:.0f} seconds")
    return results[0]


@contextlib.contextmanager
def _quiet(hub: Any) -> Iterator[None]:
    """Suppress the library's warnings; this module reports everything that matters itself."""
    logging = hub.utils.logging
    before = logging.get_verbosity()
    if before == logging.WARNING:  # another level was set on purpose
        logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(before)


def _bytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
