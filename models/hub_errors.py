"""What huggingface_hub's errors mean, in one line with what to do."""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.errors import DownloadError

INSTEAD = (
    "pass the path of a folder with config.json and *.safetensors instead, such as one downloaded "
    "elsewhere"
)
SETTINGS = (
    "(HF_ENDPOINT names a mirror, HTTPS_PROXY a proxy, HF_HOME the folder of a cache filled "
    "elsewhere)"
)
BUSY = (408, 429)


@dataclass(frozen=True)
class HubErrors:
    """Explains the errors of fetching one revision of one repository. `hub` is the package."""

    hub: Any
    repository: str
    revision: str | None
    endpoint: str
    cache: Path

    @property
    def name(self) -> str:
        return self.repository + (f"@{self.revision}" if self.revision else "")

    def is_unreachable(self, error: Exception) -> bool:
        """Whether the hub gave no answer of its own, or was too busy for one."""
        errors = self.hub.errors
        status = self._status(error)
        if status is not None:
            return status in BUSY or status >= 500
        if isinstance(error, errors.HFValidationError):
            return False
        # `HTTPError` there is the base of all that the HTTP client raises. A ValueError comes from
        # reading an answer that is not the hub's, such as a login page.
        kinds = (errors.HTTPError, errors.OfflineModeIsEnabled, TimeoutError, ValueError)
        return isinstance(error, kinds)

    def reason(self, error: Exception) -> str:
        """Why the hub could not be asked."""
        if isinstance(error, self.hub.errors.OfflineModeIsEnabled):
            return "HF_HUB_OFFLINE is set"
        if (status := self._status(error)) is not None:
            return f"the hub at {self.endpoint} answers {status}"
        if isinstance(error, ValueError):
            return f"what answers at {self.endpoint} is not the hub"
        return f"cannot reach the hub at {self.endpoint} ({first_line(error)})"

    def unreachable(self, error: Exception, cached: str) -> DownloadError:
        """The hub cannot be asked, and the cache does not help: `cached` says why."""
        return DownloadError(
            f"{self.name}: {self.reason(error)}, and {cached} in {self.cache}; {INSTEAD} {SETTINGS}"
        )

    def explained(self, error: Any) -> DownloadError:
        """The hub refused, or the download failed."""
        errors = self.hub.errors
        status = self._status(error)
        if isinstance(error, errors.GatedRepoError):
            account = "an account that has access" if self.hub.get_token() else "that account"
            text = (
                f"{self.repository} is gated: accept its licence on "
                f"{self.endpoint}/{self.repository}, and set HF_TOKEN to a token of {account}"
            )
        elif isinstance(error, errors.RevisionNotFoundError):
            text = f"{self.repository} has no revision {self.revision!r} on {self.endpoint}"
        elif isinstance(error, errors.RepositoryNotFoundError) or (
            status == 404 and not isinstance(error, errors.EntryNotFoundError)
        ):
            text = (
                f"no repository {self.repository} on {self.endpoint}; if it is private, set "
                "HF_TOKEN to a token that may read it"
            )
        elif isinstance(error, errors.HFValidationError):
            text = f"{self.repository!r} cannot be the name of a repository: {first_line(error)}"
        elif status == 401:
            text = f"the hub at {self.endpoint} does not accept the token given by HF_TOKEN"
        elif isinstance(error, errors.HfHubHTTPError):
            why = error.server_message or "no reason given"
            text = f"{self.name}: {self.reason(error)}: {first_line(why)}"
        else:
            text = self._local(error)
        return DownloadError(text)

    def _local(self, error: Exception) -> str:
        causes: list[BaseException] = [error]
        while causes[-1].__cause__ is not None:
            causes.append(causes[-1].__cause__)
        if any(_is_disk_full(cause) for cause in causes):
            return f"the disk is full, at {self.cache}; make room or choose another with HF_HOME"
        if isinstance(error, PermissionError):
            return f"cannot write to {self.cache}: {error}; choose another folder with HF_HOME"
        return (
            f"the download of {self.name} broke off ({first_line(causes[-1])}); run it again: "
            "files that are complete stay"
        )

    def _status(self, error: Any) -> int | None:
        is_answer = isinstance(error, self.hub.errors.HfHubHTTPError)
        return error.response.status_code if is_answer else None


def first_line(error: BaseException | str) -> str:
    """The first line of a message, without its full stop; the error's type when it has none."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else type(error).__name__


def _is_disk_full(error: BaseException) -> bool:
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    return full or os.strerror(errno.ENOSPC) in str(error)
