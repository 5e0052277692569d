"""Certificates for tests: an authority, and what it issues, made by the openssl command."""

import shutil
import subprocess

import pytest

CURVE = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
HERE = "DNS:localhost,IP:127.0.0.1"


class Authority:
    """A certificate authority in a folder; `path` is its certificate."""

    def __init__(self, folder, name="ca"):
        if shutil.which("openssl") is None:
            pytest.skip("needs openssl to make certificates")
        self.folder, self.name = folder, name
        self.path = folder / f"{name}.pem"
        openssl("req", "-x509", *CURVE, "-subj", f"/CN={name}", *self._files(name))

    def _files(self, name):
        return "-keyout", self.folder / f"{name}.key", "-out", self.folder / f"{name}.pem"

    def issue(self, name, subject=HERE, days=30):
        """Return the files of a new certificate: those that TLS needs, by option."""
        request = self.folder / f"{name}.csr"
        extensions = self.folder / f"{name}.ext"
        extensions.write_text(f"subjectAltName={subject}")
        key, certificate = self.folder / f"{name}.key", self.folder / f"{name}.pem"
        openssl("req", *CURVE, "-subj", f"/CN={name}", "-keyout", key, "-out", request)
        signed_by = "-CA", self.path, "-CAkey", self.folder / f"{self.name}.key", "-CAcreateserial"
        openssl(
            *("x509", "-req", "-in", request, *signed_by, "-days", days),
            *("-extfile", extensions, "-out", certificate),
        )
        return {"tls_cert": certificate, "tls_key": key, "tls_ca": self.path}


def openssl(*words):
    subprocess.run(["openssl", *map(str, words)], check=True, capture_output=True)
