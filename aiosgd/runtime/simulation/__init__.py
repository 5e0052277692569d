"""Whole jobs in one process, in virtual time: the same sessions, codecs and models, no sockets."""
