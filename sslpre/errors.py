"""The only error a user sees without `--debug`, and how text of unknown origin is shown."""

import errno


class SslpreError(Exception):
    """A failure the user can act on: printed as `error: MESSAGE`, then `hint: HINT`, and the process exits with `code`.

    Exit codes: 2 usage or recipe · 3 environment · 4 no or unreadable data, no labels · 5 unreadable checkpoint ·
    6 resume refused · 10 non-finite loss · 12 out of memory · 13 disk · 15 another process failed ·
    20 too many bad images · 128 + n after signal n.
    `everywhere`: every process of the run raises it, the first one tells. A message is one line, whatever it quotes.
    """

    def __init__(self, message: str, hint: str = "", code: int = 2):
        self.message, self.hint, self.code = printable(message), printable(hint), code
        super().__init__(self.message)
        self.everywhere = False


def disk_code(error: OSError) -> int:
    """The exit code of what could not be written: 13 where the disk is full or fails, 3 where the place is wrong."""
    return 13 if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ESTALE) else 3


def printable(text: str) -> str:
    """`text` on one line, with control characters and undecodable bytes written out."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
