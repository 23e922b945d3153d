"""Readers of public formats, one file a format.

A reader module has ``NAME``, ``NEEDS`` (the files, for people), ``CITATION``, ``LICENCE``,
``recognise(folder) -> bool`` (by file names alone) and ``read(folder) -> Source``.
"""
