"""What every method must keep, run over the table of methods: a new method costs no new test here."""

from sslpre.contract import *  # noqa: F403
