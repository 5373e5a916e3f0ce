"""Writes the object at an s3:// or gs:// URL to standard output: python -m m3ae_fast.base.s3_and_gs URL

Each object is read by a separate process, because the threads of obstore do not survive a fork, and loader workers are
forked.
"""

from __future__ import annotations

import sys
from typing import Any

from m3ae_fast.base.libraries import require_libraries

SCHEMES = ("s3://", "gs://")
# exit code if there is no such object or access is denied, so that a retry would not help: EX_NOINPUT of sysexits.h
NOT_FOUND = 66
_LONGEST = "1d"  # timeout of a request; the process that reads the output has its own timeout


def require(*shards: str) -> None:
    """Raise UserError if a shard, or a pattern of shards, is an s3:// or gs:// URL and the library that reads it is not
    installed."""
    urls = (url for pattern in shards for url in pattern.split("::") if url.startswith(SCHEMES))
    if (url := next(urls, None)) is not None:
        otherwise = f", or read it with a command: 'pipe:aws s3 cp {url} -'"
        require_libraries({"boto3": url, "obstore": url}, otherwise)


def command(url: str) -> list[str]:
    """Return the arguments of a command that writes the object to stdout. If the command fails, it exits with NOT_FOUND
    or 1 and prints the reason on stderr."""
    return [sys.executable, "-m", "m3ae_fast.base.s3_and_gs", url]


def main(url: str) -> int:
    """Write the object to stdout, and return the exit code: 0, NOT_FOUND, or 1 for an error that may be temporary. The
    reason of an error is printed on stderr."""
    import obstore  # `require` has checked that obstore is installed
    from obstore.exceptions import PermissionDeniedError, UnauthenticatedError

    bucket, _, path = url.partition("://")[2].partition("/")
    try:
        for chunk in obstore.get(_open(url.partition("://")[0], bucket), path).stream(min_chunk_size=1 << 20):
            sys.stdout.buffer.write(chunk)
        sys.stdout.buffer.flush()
    except BrokenPipeError:  # the reader has closed the pipe
        return 1
    except (FileNotFoundError, PermissionDeniedError, UnauthenticatedError) as error:
        return _print_reason(error, NOT_FOUND)
    except Exception as error:  # different kinds of credentials raise different kinds of errors
        return _print_reason(error, 1)
    return 0


def _open(scheme: str, bucket: str) -> Any:
    """Return the object store, with credentials if boto3 or Google's default credentials provide them."""
    from obstore.store import GCSStore, S3Store

    options: Any = {"allow_http": True, "timeout": _LONGEST, "connect_timeout": "60s"}
    if scheme == "gs":
        return GCSStore(bucket, client_options=options)
    from boto3 import Session
    from obstore.auth.boto3 import Boto3CredentialProvider

    session = Session()  # supports the same profiles, single sign-on and roles as the program `aws`
    if session.get_credentials() is None:
        return S3Store(bucket, client_options=options, skip_signature=True)
    return S3Store(bucket, client_options=options, credential_provider=Boto3CredentialProvider(session))


def _print_reason(error: Exception, code: int) -> int:
    print(" ".join(str(error).partition("Debug source")[0].split())[:500], file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
