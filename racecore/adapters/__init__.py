"""Adapters to other frameworks: convert, call, convert back; no mathematics."""
