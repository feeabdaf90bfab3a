"""What a kubeconfig says of trust and credentials. lightkube writes keys to files on disk; errors quote the file."""

import base64
import contextlib
import os
import re
import ssl
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

import httpx2
import msgspec
import yaml
from lightkube.core.exceptions import ConfigError

from csi_driver.host.inmemory import in_memory
from csi_driver.host.syscalls import error_name
from csi_driver.model.errors import FailedPrecondition
from csi_driver.model.text import one_line

if TYPE_CHECKING:
    from lightkube.config.kubeconfig import SingleConfig
    from lightkube.config.models import User

_TOKEN: Final = re.compile(r"[!-~]*")


def trust(config: "SingleConfig") -> ssl.SSLContext:
    """Whom a kubeconfig trusts, and the certificate of its user. Raises ConfigError, without what stands in it.

    lightkube's own would write what is there as data, the private key too, to files on disk.
    """
    cluster, user = config.cluster, config.user
    if user is None:
        raise ConfigError("its context names no user")
    with contextlib.ExitStack() as stack:
        if ca := _file(config, "certificate-authority", cluster.certificate_auth, cluster.certificate_auth_data, stack):
            with _usable("the CA certificate of its cluster is no PEM", cluster.certificate_auth):
                context = ssl.create_default_context(cafile=ca)
        else:
            context = httpx2.create_ssl_context(verify=not cluster.insecure, trust_env=False)
        if certificate := _file(config, "client-certificate", user.client_cert, user.client_cert_data, stack):
            key = _file(config, "client-key", user.client_key, user.client_key_data, stack)
            if key is None:
                raise ConfigError("its user has a client certificate and no key")
            with _usable(
                "client certificate and key of its user are no PEM, or do not belong together",
                user.client_cert,
                user.client_key,
            ):
                context.load_cert_chain(certificate, key)
    return context


def without_tls(config: "SingleConfig") -> "SingleConfig":
    """What lightkube is given: our transport has all of TLS."""
    cluster = msgspec.structs.replace(config.cluster, certificate_auth=None, certificate_auth_data=None)
    bare = dict.fromkeys(("client_cert", "client_cert_data", "client_key", "client_key_data"))
    user = None if config.user is None else msgspec.structs.replace(config.user, **bare)
    return config._replace(cluster=cluster, user=user)


def sendable(user: "User | None") -> "User | None":
    """The kubeconfig's user with its token as it is sent. Raises FailedPrecondition where that cannot be."""
    token = None if user is None or user.token is None else token_of(user.token)
    return None if user is None else msgspec.structs.replace(user, token=token or None)


def token_of(text: str) -> str:
    """A token without the white space around it, such as a block of YAML ends with. Raises FailedPrecondition."""
    token = text.strip()
    if _TOKEN.fullmatch(token) is None:
        raise FailedPrecondition(
            "the token of the kubeconfig's user cannot be sent to the Kubernetes API: it has white space or characters "
            "that are not ASCII in it; put it there as it was given out"
        )
    return token


def unusable(error: Exception) -> str:
    """Why a kubeconfig is none, without what stands in it: YAML's errors have the line, those of an address a part."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        return f"the kubeconfig cannot be read from line {mark.line + 1}, column {mark.column + 1} on, as YAML"
    if isinstance(error, httpx2.InvalidURL):
        return "the kubeconfig has a cluster whose server is no URL"
    if isinstance(error, KeyError):
        return f"{one_line(str(error), 200)} is missing"
    if isinstance(error, ConfigError | OSError | msgspec.ValidationError):
        return one_line(str(error), 200)
    return f"the kubeconfig cannot be read ({type(error).__name__})"


def _file(
    config: "SingleConfig", entry: str, path: str | None, data: str | None, stack: contextlib.ExitStack
) -> str | None:
    """Where an entry of a kubeconfig can be read while the stack is open: its data if it has that, as for kubectl."""
    if not data:
        return os.fspath(config.abs_file(path)) if path else None
    try:
        return stack.enter_context(in_memory(base64.b64decode(data)))
    except ValueError:
        raise ConfigError(f"its {entry}-data is no base64") from None


@contextlib.contextmanager
def _usable(wrong: str, *paths: str | None) -> Iterator[None]:
    """Raises ConfigError for what OpenSSL does not take: it says of files neither which, nor what is wrong."""
    try:
        yield
    except ssl.SSLError:
        raise ConfigError(wrong) from None
    except OSError as error:
        read = ", ".join(each for each in paths if each)
        raise ConfigError(f"{read} cannot be read: {error_name(error)}") from None
