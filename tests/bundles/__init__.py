"""Bundles: their format, making them, reading experts from them, and everything that can be wrong with them."""
