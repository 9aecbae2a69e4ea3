"""How a script starts and ends: Ctrl-C, and errors that a user can mend.

Every script imports this module first of all, since it may be stopped in the seconds that importing
torch takes. Whoever else imports it keeps Python's own way to end.
"""

import errno
import os
import re
import signal
import sys
import time


def end_quietly(kind, error, traceback):
    """End on Ctrl-C without a traceback, also before `run_main`; show any other error."""
    if issubclass(kind, KeyboardInterrupt):
        os._exit(130)
    sys.__excepthook__(kind, error, traceback)


script = getattr(sys.modules["__main__"], "__file__", None)  # None: at a prompt, or python -c
if script and os.path.dirname(os.path.abspath(script)) == os.path.dirname(__file__):
    sys.excepthook = end_quietly


# torchrun starts many processes of one script and numbers them; one on its own is the first
WORLD = int(os.environ.get("WORLD_SIZE", 1))
RANK = int(os.environ.get("RANK", 0)) if WORLD > 1 else 0


class UserError(Exception):
    """Something the user can put right: shown as one line on stderr, exit status 2.
    What comes from a file is told as it is written in Python, and not without end."""

    def __init__(self, told):
        shown = [c if c.isprintable() else c.encode("unicode_escape").decode() for c in told[:2000]]
        super().__init__("".join(shown))


def fail(told):
    """End with one line on stderr and status 2."""
    if RANK:  # where all fail alike, the first says so, and torchrun ends the others
        time.sleep(3)
    print(f"{os.path.basename(sys.argv[0])}: error: {told}", file=sys.stderr)
    sys.exit(2)


def run_main(main):
    """Call main() as a command line does: UserError ends with status 2, Ctrl-C with status 130."""
    for stream in filter(None, (sys.stdout, sys.stderr)):  # None if it was closed
        stream.reconfigure(errors="backslashreplace")  # a terminal may not have every letter
    if RANK:  # the first process speaks for all
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    for name in ("SIGTERM", "SIGHUP"):  # as Ctrl-C does, where nothing else takes them
        if hasattr(signal, name) and signal.getsignal(getattr(signal, name)) == signal.SIG_DFL:
            signal.signal(getattr(signal, name), signal.default_int_handler)
    try:
        main()
        if sys.stdout:
            sys.stdout.flush()
    except UserError as error:
        fail(error)
    except KeyboardInterrupt:
        sys.exit(130)
    except (MemoryError, RuntimeError) as error:  # torch raises the second
        if WORLD > 1 and re.search("peer|gloo|NCCL|timed out", str(error)):
            fail("another process has ended or does not answer; --resume goes on without loss")
        if not isinstance(error, MemoryError) and "allocate" not in str(error):
            raise
        fail("out of memory; a smaller batch, fewer clips or a smaller model may fit")
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.ENOSPC):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if error.errno == errno.EPIPE:  # nobody reads it, as in `python data.py | head -1`
            sys.exit(1)
        fail("no space left for what is written or printed")
