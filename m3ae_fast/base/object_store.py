"""Writes an object of s3:// or gs:// to standard output: python -m m3ae_fast.base.object_store URL

A process for each object, since the threads of obstore do not outlive a fork, and loader workers are forked.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from typing import Any

from m3ae_fast.base.errors import UserError

SCHEMES = ("s3://", "gs://")
NOT_THERE = 66  # EX_NOINPUT of sysexits.h: another try would not help
_LONGEST = "1d"  # for a request; who reads the output has limits of its own


def require(url: str) -> None:
    """Raise UserError where what reads such URLs is not installed."""
    if url.startswith(SCHEMES) and not (find_spec("obstore") and find_spec("boto3")):
        raise UserError(
            f"{url}: pip install 'm3ae-fast[remote]' to read it, or name it by a command: 'pipe:aws s3 cp {url} -'"
        )


def command(url: str) -> list[str]:
    """Return the words of a command that writes the object, or exits with NOT_THERE, or 1, and says why on stderr."""
    return [sys.executable, "-m", "m3ae_fast.base.object_store", url]


def main(url: str) -> int:
    import obstore  # after `require`
    from obstore.exceptions import PermissionDeniedError, UnauthenticatedError

    bucket, _, path = url.partition("://")[2].partition("/")
    try:
        for chunk in obstore.get(_open(url.partition("://")[0], bucket), path).stream(min_chunk_size=1 << 20):
            sys.stdout.buffer.write(chunk)
        sys.stdout.buffer.flush()
    except BrokenPipeError:  # who reads it has enough
        return 1
    except (FileNotFoundError, PermissionDeniedError, UnauthenticatedError) as error:
        return _said(error, NOT_THERE)
    except Exception as error:  # credentials of all kinds raise anything
        return _said(error, 1)
    return 0


def _open(scheme: str, bucket: str) -> Any:
    """Return the store, with credentials where boto3 or Google's defaults know some."""
    from obstore.store import GCSStore, S3Store

    options: Any = {"allow_http": True, "timeout": _LONGEST, "connect_timeout": "60s"}
    if scheme == "gs":
        return GCSStore(bucket, client_options=options)
    from boto3 import Session
    from obstore.auth.boto3 import Boto3CredentialProvider

    session = Session()  # profiles, single sign-on, roles: all that `aws` knows
    if session.get_credentials() is None:
        return S3Store(bucket, client_options=options, skip_signature=True)
    return S3Store(bucket, client_options=options, credential_provider=Boto3CredentialProvider(session))


def _said(error: Exception, code: int) -> int:
    print(" ".join(str(error).partition("Debug source")[0].split())[:500], file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
