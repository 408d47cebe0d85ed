"""Whether files of a certificate and its key can be used, told before anything else is done."""

from __future__ import annotations

import ssl
from pathlib import Path


class TLSError(ValueError):
    """A certificate or a key that cannot be used; the message names the file."""


def check_tls(certificate: Path, private_key: Path | None = None) -> None:
    """Raises TLSError unless a server can show `certificate` and has its key: in `private_key`, or
    in the certificate's file. Nobody is asked for a passphrase."""
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_verify_locations(certificate)
    except OSError as error:
        raise TLSError(f"certificate {certificate} cannot be used: {_why(error)}") from error
    key = f"private key {private_key or certificate}"

    def passphrase() -> str:
        raise TLSError(f"{key} is encrypted: give one that is not")

    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(
            certificate, private_key, passphrase
        )
    except OSError as error:
        if isinstance(error, ssl.SSLError) and error.reason == "KEY_VALUES_MISMATCH":
            raise TLSError(f"{key} is not that of certificate {certificate}") from error
        raise TLSError(f"{key} cannot be used: {_why(error)}") from error


def _why(error: OSError) -> str:
    """`SSLError` says little where a file is none of PEM."""
    if isinstance(error, ssl.SSLError):
        return f"there is none in it ({error.reason or error.strerror or 'no PEM'})"
    return error.strerror or str(error)
