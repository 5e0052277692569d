"""What links are protected with: a shared secret and certificates, read from files.

A secret authenticates both ends of a link at its beginning (see `handshake`); TLS authenticates and
encrypts all of it. Neither the secret nor what is made from it is ever logged, sent or shown.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import ssl
import stat
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path

from aiosgd.errors import ConfigError

ENVIRONMENT = "AIOSGD_SECRET_FILE"
"""The variable that may name the secret file."""
MIN_SECRET = 16
"""Bytes of a secret: whoever reaches a node's port gets a proof to try guesses on at home."""
MAX_SECRET = 4096


@dataclass(frozen=True)
class SecurityFiles:
    """Where the secret and the certificates are; None is not used.

    Attributes:
        secret_file: the secret that all nodes and submitters share.
        tls_cert, tls_key: this end's certificate with its chain, and its private key, as PEM.
        tls_ca: certificates of the authorities that may issue the other ends' certificates.
    """

    secret_file: Path | None = None
    tls_cert: Path | None = None
    tls_key: Path | None = None
    tls_ca: Path | None = None

    def load(self) -> Security:
        """Read the files; AIOSGD_SECRET_FILE names the secret file where none is given.

        Raises:
            ConfigError: a file is missing, unreadable or not what it must be; some of the TLS
                files are given, but not all.
        """
        secret_file = self.secret_file
        if secret_file is None and os.environ.get(ENVIRONMENT):
            secret_file = Path(os.environ[ENVIRONMENT])
        key = None if secret_file is None else read_secret(secret_file)
        return Security(key, self._tls())

    def _tls(self) -> Tls | None:
        given = {f.name: getattr(self, f.name) for f in fields(self) if f.name.startswith("tls")}
        missing = [name for name, path in given.items() if path is None]
        if len(missing) == len(given):
            return None
        if missing:
            raise ConfigError(f"TLS needs {', '.join(given)}; not given: {', '.join(missing)}")
        return load_tls(**given)


@dataclass(frozen=True)
class Tls:
    """TLS 1.3 in which both ends show a certificate; one context for each role."""

    server: ssl.SSLContext
    client: ssl.SSLContext


@dataclass(frozen=True)
class Security:
    """What an end of a link protects it with.

    Attributes:
        key: made from the shared secret; None without one.
        tls: None without TLS.
    """

    key: bytes | None = field(default=None, repr=False)
    tls: Tls | None = None

    def __bool__(self) -> bool:
        return self.key is not None or self.tls is not None


OPEN = Security()
"""No secret and no TLS: for links within one machine, and networks that are trusted."""


# Secrets --------------------------------------------------------------------------------------


def read_secret(path: Path) -> bytes:
    """Return the key that is made from a secret file.

    The key is stretched (scrypt, 10 ms and 4 MiB a guess), for a person may have chosen the secret.

    Raises:
        ConfigError: it cannot be read, others can read it, or it has less than 16 bytes or more
            than 4096; white space around the secret does not count.
    """
    try:
        with path.open("rb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            text = file.read(MAX_SECRET + 1)
    except (OSError, ValueError) as error:
        raise ConfigError(f"secret file {path} cannot be read: {_reason(error)}") from error
    if mode & 0o077:
        raise ConfigError(
            f"secret file {path} has mode {mode:04o}, so that others can get at it; chmod 600 {path}"
        )
    return key_of(text, f"secret file {path}")


def key_of(text: bytes, place: str) -> bytes:
    """Return the key that is made from a secret's text; see `read_secret`.

    Raises:
        ConfigError: it has less than 16 bytes or more than 4096; `place` says where it is from.
    """
    secret = text.strip()
    if not MIN_SECRET <= len(secret) <= MAX_SECRET:
        size = f"{len(secret)} bytes" if len(text) <= MAX_SECRET else "more bytes"
        raise ConfigError(
            f"{place} has {size}; a secret has {MIN_SECRET} to {MAX_SECRET}: "
            "`aiosgd new secret FILE` writes one"
        )
    return hashlib.scrypt(secret, salt=b"aiosgd", n=1 << 12, r=8, p=1, dklen=32)


def write_secret(path: Path) -> None:
    """Write a new secret that only this user can read: 32 random bytes as hexadecimal digits.

    Raises:
        ConfigError: the file exists or cannot be written.
    """
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError as error:
        raise ConfigError(f"{path} exists; a secret never takes the place of a file") from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be written: {_reason(error)}") from error
    with os.fdopen(descriptor, "w") as file:
        file.write(secrets.token_hex(32) + "\n")


# TLS ------------------------------------------------------------------------------------------


def load_tls(tls_cert: Path, tls_key: Path, tls_ca: Path) -> Tls:
    """Return contexts for both roles: TLS 1.3, certificates of both ends, names checked.

    The end that connects checks that the certificate is for the host name or IP address that it
    connects to; the other end checks only that its authority issued the certificate.

    Raises:
        ConfigError: a file cannot be read or is no PEM; the key is not the certificate's.
    """
    contexts = []
    for protocol in (ssl.PROTOCOL_TLS_SERVER, ssl.PROTOCOL_TLS_CLIENT):
        context = ssl.SSLContext(protocol)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.verify_mode = ssl.CERT_REQUIRED
        _read("tls_ca", tls_ca, context.load_verify_locations)
        _read("tls_cert", tls_cert, _first_certificate)
        _read("tls_key", tls_key, Path.read_bytes)
        _load_pair(context, tls_cert, tls_key)
        contexts.append(context)
    return Tls(*contexts)


def _read(name: str, path: Path, read: Callable[[Path], object]) -> None:
    try:
        read(path)
    except ssl.SSLError as error:
        raise ConfigError(f"{name} {path} has no certificate in PEM format") from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"{name} {path} cannot be read: {_reason(error)}") from error


def _first_certificate(path: Path) -> None:
    """Raise what is wrong with a certificate, if anything: `load_cert_chain` does not say where."""
    ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(path)


def _load_pair(context: ssl.SSLContext, certificate: Path, key: Path) -> None:
    def no_password() -> bytes:
        raise ConfigError(f"tls_key {key} is encrypted; expected a key without a password")

    try:
        context.load_cert_chain(certificate, key, no_password)
    except ssl.SSLError as error:
        wrong = error.reason == "KEY_VALUES_MISMATCH"
        reason = (
            f"is not the key of tls_cert {certificate}" if wrong else "is no private key as PEM"
        )
        raise ConfigError(f"tls_key {key} {reason}") from error


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else "") or str(error)
