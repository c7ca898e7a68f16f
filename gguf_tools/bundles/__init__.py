"""Bundles: making, checking, listing. The only part that uses pyengine: the engine itself packs the records."""
