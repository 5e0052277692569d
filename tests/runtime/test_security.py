"""Secrets and certificates: what their files must be, and that none of it gets out."""

import ssl
import stat

import pytest

from aiosgd.errors import ConfigError
from aiosgd.runtime import security
from aiosgd.runtime.security import OPEN, Security, SecurityFiles, read_secret, write_secret
from tests.runtime.certificates import Authority, openssl

SECRET = b"correct horse battery staple"


@pytest.fixture(autouse=True)
def _no_secret_from_outside(monkeypatch):
    monkeypatch.delenv(security.ENVIRONMENT, raising=False)


@pytest.fixture
def secret_file(tmp_path):
    """`secret_file(text, mode)`: the path of a new file."""

    def write(text=SECRET, mode=0o600):
        path = tmp_path / "cluster.secret"
        path.write_bytes(text)
        path.chmod(mode)
        return path

    return write


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    return Authority(tmp_path_factory.mktemp("ca"))


@pytest.fixture(scope="module")
def files(authority):
    return authority.issue("node")


def refusal(call, *arguments):
    with pytest.raises(ConfigError) as error:
        call(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


# Secrets --------------------------------------------------------------------------------------


def test_equal_secrets_give_equal_keys_whatever_surrounds_them(secret_file):
    keys = {read_secret(secret_file(text)) for text in (SECRET, SECRET + b"\n", b" " + SECRET)}
    (key,) = keys
    assert len(key) == 32
    assert SECRET not in key
    assert read_secret(secret_file(SECRET + b"!")) != key


def test_the_key_of_a_secret_never_changes(secret_file):
    """Nodes of different versions must agree on it."""
    expected = "d8ee5dc78af6c556e320c304543e3f64bc816f9144994192dca14f5c46587902"
    assert read_secret(secret_file()).hex() == expected


@pytest.mark.parametrize("mode", [0o400, 0o600, 0o700])
def test_a_file_that_only_its_owner_can_use_is_read(secret_file, mode):
    assert read_secret(secret_file(mode=mode))


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o602, 0o610, 0o601, 0o644])
def test_a_file_that_others_can_get_at_is_refused(secret_file, mode):
    path = secret_file(mode=mode)
    assert refusal(read_secret, path) == (
        f"secret file {path} has mode {mode:04o}, so that others can get at it; chmod 600 {path}"
    )


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (b"", "0 bytes"),
        (b"x" * 15, "15 bytes"),
        (b" " * 20, "0 bytes"),
        (b"x" * 15 + b"\n" * 9, "15 bytes"),
        (b"x" * 4097, "more bytes"),
        (b"x" * 100_000, "more bytes"),
    ],
)
def test_a_secret_of_another_size_is_refused(secret_file, text, size):
    message = refusal(read_secret, secret_file(text))
    assert f"has {size}; a secret has 16 to 4096: `aiosgd new secret FILE` writes" in message
    assert "xxx" not in message


@pytest.mark.parametrize("size", [16, 4096])
def test_the_smallest_and_the_largest_secret_are_read(secret_file, size):
    assert read_secret(secret_file(b"x" * size))


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    missing = tmp_path / "none"
    assert refusal(read_secret, missing) == (
        f"secret file {missing} cannot be read: No such file or directory"
    )
    assert refusal(read_secret, tmp_path).endswith("cannot be read: Is a directory")


def test_a_new_secret_is_good_random_and_only_ours(tmp_path):
    paths = [tmp_path / "a", tmp_path / "b"]
    for path in paths:
        write_secret(path)
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert len(bytes.fromhex(path.read_text())) == 32
    assert read_secret(paths[0]) != read_secret(paths[1])


def test_a_new_secret_takes_the_place_of_nothing(tmp_path):
    (tmp_path / "kept").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("kept", "link"):
        assert "exists; a secret never takes" in refusal(write_secret, tmp_path / name)
    assert (tmp_path / "kept").read_text() == "old"
    assert not (tmp_path / "nowhere").exists()
    assert "cannot be written: " in refusal(write_secret, tmp_path / "no" / "secret")


# What a node or a submitter is given ----------------------------------------------------------


def test_without_files_links_are_open():
    assert SecurityFiles().load() == OPEN
    assert not OPEN


def test_the_environment_names_the_file_unless_another_is_given(secret_file, tmp_path, monkeypatch):
    other = tmp_path / "other"
    write_secret(other)
    monkeypatch.setenv(security.ENVIRONMENT, str(secret_file()))
    assert SecurityFiles().load() == Security(read_secret(secret_file()))
    assert SecurityFiles(other).load() == Security(read_secret(other))
    monkeypatch.setenv(security.ENVIRONMENT, "")
    assert SecurityFiles().load() == OPEN
    monkeypatch.setenv(security.ENVIRONMENT, str(tmp_path / "none"))
    assert "none cannot be read" in refusal(SecurityFiles().load)


def test_no_secret_is_shown(secret_file):
    loaded = SecurityFiles(secret_file()).load()
    assert loaded
    assert repr(loaded.key)[2:-1] not in repr(loaded)
    assert "key" not in repr(loaded)


def test_tls_is_tls_1_3_with_certificates_and_names(files):
    tls = SecurityFiles(**files).load().tls
    for context in (tls.server, tls.client):
        assert context.minimum_version == ssl.TLSVersion.TLSv1_3
        assert context.verify_mode == ssl.CERT_REQUIRED
    assert tls.client.check_hostname
    assert Security(None, tls)


@pytest.mark.parametrize("missing", ["tls_cert", "tls_key", "tls_ca"])
def test_tls_needs_all_its_files(files, missing):
    given = {name: path for name, path in files.items() if name != missing}
    assert refusal(SecurityFiles(**given).load).endswith(f"not given: {missing}")


@pytest.mark.parametrize("name", ["tls_cert", "tls_key", "tls_ca"])
def test_a_tls_file_that_is_missing_or_something_else_is_named(files, tmp_path, name):
    something = tmp_path / "something"
    message = refusal(SecurityFiles(**{**files, name: something}).load)
    assert message == f"{name} {something} cannot be read: No such file or directory"
    something.write_text("else")
    message = refusal(SecurityFiles(**{**files, name: something}).load)
    what = "is no private key as PEM" if name == "tls_key" else "has no certificate in PEM format"
    assert message == f"{name} {something} {what}"


def test_a_key_of_another_certificate_is_named(files, authority):
    other = authority.issue("other")["tls_key"]
    message = refusal(SecurityFiles(**{**files, "tls_key": other}).load)
    assert message == f"tls_key {other} is not the key of tls_cert {files['tls_cert']}"


def test_nobody_is_asked_for_a_password(files, tmp_path):
    key = tmp_path / "encrypted.key"
    openssl("ec", "-in", files["tls_key"], "-aes128", "-passout", "pass:word", "-out", key)
    assert "is encrypted; expected a key without a password" in refusal(
        SecurityFiles(**{**files, "tls_key": key}).load
    )
