"""Pieces used inside kernels, one subject a file; nothing here launches anything."""
