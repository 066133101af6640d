"""Adapters that keep things: the ledger, blobs and journals.

Nothing is imported here, so that a gateway worker that needs the journal loads nothing else.
"""
