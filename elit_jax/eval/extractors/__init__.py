"""Networks whose features metrics are made of: a file each, found by features.py."""
