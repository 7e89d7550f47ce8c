"""TLS to the router: the system's certificates, or SSL_CERT_FILE; who answered is named when they are not enough."""

import _ssl  # for ENCODING_DER, which `ssl` has no public name for
import contextlib
import os
import ssl
from typing import Any

import httpx
from cryptography import x509

from xim_agent.errors import AgentError, Exit
from xim_agent.text import printable

MOST = 200  # characters of a name that somebody else has made up


class _Naming(ssl.SSLObject):
    """Notes on the error whose certificate was refused: after a failed handshake nobody can ask for it any more.

    `_sslobj` is what the standard library's own get_unverified_chain (public from Python 3.13 on) uses.
    """

    def do_handshake(self) -> None:
        try:
            super().do_handshake()
        except ssl.SSLCertVerificationError as error:
            with contextlib.suppress(ValueError, x509.InvalidVersion):  # a certificate that cannot be read has no names
                error.add_note(_names(self))
            raise


def _names(tls: Any) -> str:
    chain = tls._sslobj.get_unverified_chain() or ()
    if not chain:
        return "it sent no certificate"
    cert = x509.load_der_x509_certificate(chain[0].public_bytes(_ssl.ENCODING_DER))
    subject, issuer = (printable(name.rfc4514_string())[:MOST] or "-" for name in (cert.subject, cert.issuer))
    return f"it was issued to `{subject}` by `{issuer}`"


def verified() -> ssl.SSLContext:
    """For httpx. SSL_CERT_FILE or SSL_CERT_DIR, else what certifi and this system trust.

    Raises AgentError `ca_unreadable`, exit 78.
    """
    given = next((name for name in ("SSL_CERT_FILE", "SSL_CERT_DIR") if os.environ.get(name)), None)
    try:
        context = httpx.create_ssl_context()
    except OSError as error:  # ssl.SSLError is one
        raise AgentError(
            "ca_unreadable",
            f"{given or 'the bundled list'}: the certificates in {os.environ.get(given or '', '')} cannot be used: "
            f"{error.strerror or error}",
            hint=f"let {given} name a readable PEM file, or unset it" if given else "install the agent again",
            exit_code=Exit.CONFIG,
        ) from None
    if given is None:
        context.load_default_certs()
    context.sslobject_class = _Naming
    return context
